"""What a data set must be, and one's own pictures: as a viewer shows them, and never stale."""

import errno
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import check_refusal, check_success, load_script, run_function, run_script
from PIL import Image, ImageCms

import common

RAMP = np.tile(np.arange(256, dtype=np.uint16) * 257, (256, 1))  # 16 bits, from black to white


# ---- what a data set must be ---------------------------------------------------------------------


def whole_data():
    """The four arrays of a small mnist.npz that is as it should be."""
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (60, 28, 28), dtype=np.uint8),
        "y_train": np.arange(60, dtype=np.uint8) % 10,
        "x_test": generator.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        "y_test": np.arange(40, dtype=np.uint8) % 10,
    }


def read_npz(folder, **changes):
    """Write a mnist.npz with some arrays changed and read it -> Run."""
    np.savez(folder / "mnist.npz", **{**whole_data(), **changes})
    return run_function(common.load_train_and_test, "mnist", folder)


def test_a_small_mnist_is_read(tmp_path):
    check_success(read_npz(tmp_path))


DATA = whole_data()
BAD_DATA = {
    "floats": ({"x_train": DATA["x_train"] / np.float32(255)}, "float32"),
    "float test images": ({"x_test": DATA["x_test"] / 255}, "float64"),
    "wide integers": ({"x_train": DATA["x_train"].astype(np.int64)}, "int64"),
    "zeros and ones": ({"x_train": DATA["x_train"] % 2}, "0 and 1"),
    "label 17": ({"y_train": np.full(60, 17)}, "from 17 to 17"),
    "label -1": ({"y_train": np.full(60, -1)}, "from -1 to -1"),
    "one label too large": ({"y_test": np.append(DATA["y_test"][1:], 10)}, "to 10"),
    "labels of floats": ({"y_train": DATA["y_train"] + 0.5}, "float64"),
    "too few labels": ({"y_train": DATA["y_train"][:40]}, "60 images"),
    "too many labels": ({"y_test": np.zeros(41, np.uint8)}, "40 images"),
    "labels one-hot": ({"y_train": np.eye(10, dtype=np.uint8)[DATA["y_train"]]}, "(60, 10)"),
    "27x27": ({"x_train": DATA["x_train"][:, :27, :27]}, "(1, 27, 27)"),
    "colours": ({"x_train": np.zeros((60, 28, 28, 3), np.uint8)}, "(1, 28, 28)"),
    "flat": ({"x_train": DATA["x_train"].reshape(60, 784)}, "(1, 28, 28)"),
    "no training images": (
        {"x_train": DATA["x_train"][:0], "y_train": DATA["y_train"][:0]},
        "the training part has no images",
    ),
    "no test images": (
        {"x_test": DATA["x_test"][:0], "y_test": DATA["y_test"][:0]},
        "the test part has no images",
    ),
}


@pytest.mark.parametrize("changes, word", BAD_DATA.values(), ids=BAD_DATA)
def test_data_that_is_not_what_it_should_be_is_refused(tmp_path, changes, word):
    check_refusal(read_npz(tmp_path, **changes), "mnist", word)


# ---- too few images ------------------------------------------------------------------------------


def write_pictures(root, counts, size=40):
    """A folder of pictures: {class: how many}."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")


def read_folder(root, *forget, **options):
    """Read a folder of pictures -> Run."""
    return run_function(lambda: common.load_train_and_test("folder", root, list(forget), **options))


def test_three_and_three_pictures_are_too_few(tmp_path):
    write_pictures(tmp_path, {"cat": 3, "dog": 3})
    check_refusal(read_folder(tmp_path), "'cat' has 3", "'dog' has 3", "10")


def test_a_class_of_one_picture_lacks_a_test_picture(tmp_path):
    write_pictures(tmp_path, {"cat": 1, "dog": 30})
    check_refusal(read_folder(tmp_path, "cat"), "'cat' has no test image", "needs 10")


def test_one_test_picture_is_too_few_to_keep(tmp_path):
    write_pictures(tmp_path, {"cat": 10, "dog": 10})
    check_refusal(read_folder(tmp_path, "cat"), "1 test images (2 are needed)")


def test_few_pictures_are_enough_without_a_class_to_forget(tmp_path):
    write_pictures(tmp_path, {"cat": 10, "dog": 1})
    check_success(read_folder(tmp_path))


def test_every_class_has_its_own_tenth_pictures(tmp_path):
    write_pictures(tmp_path, {"cat": 15, "dog": 20})
    train, test = common.load_train_and_test("folder", tmp_path)
    assert torch.bincount(train.labels).tolist() == [14, 18]
    assert torch.bincount(test.labels).tolist() == [1, 2]


def test_a_training_part_without_the_class_is_said_so(tmp_path):
    data = whole_data()
    data["y_train"][data["y_train"] == 3] = 4
    np.savez(tmp_path / "mnist.npz", **data)
    run = run_script("03", "--quick", "--forget", 3, "--data-dir", tmp_path, "--out", tmp_path)
    check_refusal(run, "class '3' has no training image")


def test_a_judge_of_a_class_without_images_is_refused(tmp_path):
    data = whole_data()
    data["y_train"][data["y_train"] == 3] = 4
    np.savez(tmp_path / "mnist.npz", **data)
    run = run_script("02", "--quick", "--judge", "--data-dir", tmp_path, "--out", tmp_path)
    check_refusal(run, "class '3' has no training image")


# ---- as a viewer shows it ------------------------------------------------------------------------


def read_one(root, save, suffix="png"):
    """The picture (3, 64, 64) that is read where save(path) has written the first of a class."""
    write_pictures(root, {"a": 10, "b": 10}, size=64)
    (root / "a/00.png").unlink()
    save(root / f"a/00.{suffix}")
    return common.load_dataset("folder", root).images[0].float()


def test_16_bits_become_8(tmp_path):
    image = read_one(tmp_path, Image.fromarray(RAMP).save)
    assert image.mean().item() == pytest.approx(127.5, abs=1)
    assert image[:, :, 0].mean() < 5
    assert image[:, :, -1].mean() > 250


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    image = read_one(tmp_path, Image.fromarray(RAMP // 256).save)
    assert image.max() <= 1


def test_a_transparent_value_of_16_bits_is_white(tmp_path):
    def save(path):
        Image.fromarray(RAMP * 0).save(path, transparency=0)

    assert read_one(tmp_path, save).min() == 255


@pytest.mark.parametrize("highest", [255, 65535, 2**31 - 1])
def test_32_bits_become_8(tmp_path, highest):
    values = (RAMP / 65535 * highest).astype(np.int32)
    image = read_one(tmp_path, Image.fromarray(values).save, "tiff")
    assert image.mean().item() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("highest", [1, 255, 65535])
def test_real_numbers_become_8_bits(tmp_path, highest):
    values = (RAMP / 65535 * highest).astype(np.float32)
    image = read_one(tmp_path, Image.fromarray(values).save, "tiff")
    assert image.mean().item() == pytest.approx(127.5, abs=1)


def test_a_picture_stands_upright(tmp_path):
    """The camera was turned: what is stored on the left is shown at the top."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation

    def save(path):
        Image.fromarray(pixels).save(path, exif=exif)

    image = read_one(tmp_path, save, "jpg")
    assert image[:, :24].mean() > 240
    assert image[:, 40:].mean() < 15


def save_half_clear(mode):
    """Save a picture that is red on the left and transparent, over black, on the right."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (255, 0, 0, 255)

    def save(path):
        Image.fromarray(pixels).convert(mode).save(path)

    return save


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = read_one(tmp_path, save_half_clear(mode))
    assert image[:, :, 40:].min() > 250
    assert image[:, :, :24].mean() < 100


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    picture = Image.new("P", (64, 64), 1)
    picture.putpalette([255, 0, 0, 0, 0, 0])
    image = read_one(tmp_path, lambda path: picture.save(path, transparency=1))
    assert image.min() == 255


def test_a_palette_is_colours(tmp_path):
    picture = Image.new("P", (64, 64), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    image = read_one(tmp_path, picture.save)
    assert image[:, 0, 0].tolist() == [10, 200, 30]


def test_a_gif_counts_with_its_first_picture(tmp_path):
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]

    def save(path):
        frames[0].save(path, save_all=True, append_images=frames[1:])

    image = read_one(tmp_path, save, "gif")
    assert image[:, 0, 0].tolist() == [255, 0, 0]


def test_colours_are_those_of_the_profile(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    def save(path):
        Image.new("RGB", (64, 64), (10, 200, 30)).save(path, icc_profile=profile)

    image = read_one(tmp_path, save)
    assert image[:, 0, 0].tolist() == pytest.approx([10, 200, 30], abs=2)


def test_a_broken_profile_is_ignored(tmp_path):
    def save(path):
        Image.new("RGB", (64, 64), (10, 200, 30)).save(path, icc_profile=b"no profile")

    assert read_one(tmp_path, save)[:, 0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "LA", "P"])
def test_every_kind_of_picture_is_read(tmp_path, mode):
    picture = Image.new("RGB", (64, 64), "white").convert(mode)
    image = read_one(tmp_path, picture.save, "tiff")
    assert image.min() >= 250


def test_a_mask_is_read_as_a_viewer_shows_it(tmp_path):
    """Bytes, 16 bits and transparency: white is hidden, whatever the file."""
    load_mask = load_script("05")["load_mask"]
    ramp = np.zeros((64, 64), np.uint16)
    ramp[16:48] = 65535
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    grey = Image.fromarray((ramp // 257).astype(np.uint8))
    grey.save(tmp_path / "grey.jpg", quality=95)
    grey.convert("LA").save(tmp_path / "alpha.png")
    for name in ("grey16.png", "grey.jpg", "alpha.png"):
        hidden = load_mask(str(tmp_path / name), 32, 32)
        assert hidden[0, :, 16].tolist() == [8 <= row < 24 for row in range(32)], name


# ---- what is no picture --------------------------------------------------------------------------


def test_hidden_files_and_folders_are_ignored(tmp_path):
    write_pictures(tmp_path, {"a": 10, "b": 10, ".ipynb_checkpoints": 3, "__MACOSX": 3})
    write_pictures(tmp_path / "a", {".ipynb_checkpoints": 4, "__MACOSX": 4})
    (tmp_path / "b/._007.png").write_bytes(b"\0\5\x16\7")
    train, test = common.load_train_and_test("folder", tmp_path)
    assert train.classes == ["a", "b"]
    assert len(train.images) + len(test.images) == 20


def test_what_is_left_out_is_counted(tmp_path):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "a/notes.txt").write_text("x")
    (tmp_path / "b/film.mp4").write_text("x")
    Image.new("RGB", (40, 40)).save(tmp_path / "loose.png")
    run = read_folder(tmp_path)
    check_success(run)
    for word in ("1 of '.txt'", "1 of '.mp4'", "1 pictures beside"):
        assert word in run.out


def cut_off(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_broken_pictures_are_named_and_nothing_is_left(tmp_path):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    before = {path.name for path in tmp_path.iterdir()}
    for name in ("a/00.png", "a/07.png", "b/03.png"):
        cut_off(tmp_path / name)
    check_refusal(read_folder(tmp_path), "3 unreadable", "a/00.png", "a/07.png", "b/03.png")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_of_many_broken_pictures_five_are_named(tmp_path):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    for path in tmp_path.glob("a/*.png"):
        cut_off(path)
    run = read_folder(tmp_path)
    check_refusal(run, "10 unreadable", "and 5 more")
    assert run.err.count(".png") == 5


def test_an_interrupted_decoding_leaves_nothing(tmp_path, monkeypatch):
    write_pictures(tmp_path, {"a": 10, "b": 10})

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    with pytest.raises(KeyboardInterrupt):
        common.load_dataset("folder", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_what_a_killed_decoding_has_left_goes(tmp_path):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    dead = tmp_path / "folder-all.npy.tmp4194305"  # above Linux's largest process number
    dead.write_bytes(b"half")
    living = tmp_path / f"folder-all.npy.tmp{os.getppid()}"
    living.write_bytes(b"half")
    check_success(read_folder(tmp_path))
    assert not dead.exists()
    assert living.exists()


def test_a_class_without_pictures_is_named(tmp_path):
    write_pictures(tmp_path, {"a": 10, "b": 0})
    check_refusal(read_folder(tmp_path), "'b' has no picture")


# ---- links ---------------------------------------------------------------------------------------


def class_sizes(root):
    """How many pictures each class has, in both parts together."""
    train, test = common.load_train_and_test("folder", root)
    counts = torch.bincount(torch.cat([train.labels, test.labels]), minlength=len(train.classes))
    return dict(zip(train.classes, counts.tolist()))


LINKS_ABOVE = {
    "its own class": ("a/again", "a"),
    "the data root": ("a/root", "."),
    "above the data root": ("a/up", ".."),
    "the root beside the classes": ("again", "."),
    "another class": ("a/more", "b"),
    "another class as a class": ("c", "b"),
    "a picture of its class": ("a/again.png", "a/00.png"),
    "a picture of another class": ("a/more.png", "b/00.png"),
}


@pytest.mark.parametrize("link, target", LINKS_ABOVE.values(), ids=LINKS_ABOVE)
def test_a_link_to_what_is_there_already_is_left_out_and_said(tmp_path, link, target):
    root = tmp_path / "data"
    write_pictures(root, {"a": 10, "b": 20})
    write_pictures(tmp_path, {"elsewhere": 10})
    (root / link).symlink_to((root / target).resolve())
    run = read_folder(root)
    check_success(run)
    assert f"1 link to what is there already ({link})" in run.out
    assert class_sizes(root) == {"a": 10, "b": 20}


def test_links_to_elsewhere_are_followed_once(tmp_path):
    """Classes and pictures may lie elsewhere, links may lead to each other in a ring."""
    root = tmp_path / "data"
    write_pictures(tmp_path / "elsewhere", {"cats": 10, "cats/more": 10})
    write_pictures(root, {"b": 10})
    (root / "cat").symlink_to(tmp_path / "elsewhere/cats")
    (root / "cat/back").symlink_to(root / "b")
    (root / "b/ring").symlink_to(root / "cat")
    (root / "b/one.png").symlink_to(tmp_path / "elsewhere/one.png")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "elsewhere/one.png")
    assert class_sizes(root) == {"b": 11, "cat": 20}


def test_what_two_links_lead_to_is_listed_once(tmp_path):
    """The second link leads to a folder that holds what the first one leads to."""
    write_pictures(tmp_path / "elsewhere", {"cats": 2, "cats/more": 3})
    root = tmp_path / "data"
    write_pictures(root, {"b": 1})
    (root / "b/first").symlink_to(tmp_path / "elsewhere/cats/more")
    (root / "b/second").symlink_to(tmp_path / "elsewhere/cats")
    found, left_out = common.list_files(root)
    assert len(found) == 1 + 3 + 2
    assert left_out == [root / "b/second/more"]


@pytest.mark.parametrize("target", ["nowhere.png", "gone.png"])
def test_a_link_to_nothing_is_an_unreadable_picture(tmp_path, target):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "a/gone.png").symlink_to(target)  # gone.png: a link to itself
    check_refusal(
        read_folder(tmp_path), "1 unreadable", "a/gone.png (no file, or a link", "mend the"
    )


def test_a_pipe_among_pictures_is_left_out_and_counted(tmp_path):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    os.mkfifo(tmp_path / "a/pipe.png")
    run = read_folder(tmp_path)
    check_success(run)
    assert "left out, as no pictures of a class: 1 pipes, sockets and devices" in run.out


# ---- names of classes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-x", "--", "-1", "a\nb", "\x1b[2J", "\x7f", "\x9b2J"])
def test_a_class_that_could_not_be_named_on_a_command_line_is_refused(tmp_path, name):
    write_pictures(tmp_path, {"a": 10, name: 10})
    run = read_folder(tmp_path)
    check_refusal(run, "rename the folder '")
    assert run.err[:-1].isprintable()


def test_a_class_may_have_a_name_that_is_no_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9 'x")
    write_pictures(tmp_path, {"a": 10, name: 10})
    for _ in range(2):  # decoded, then from the cache
        assert common.load_dataset("folder", tmp_path).classes == ["a", name]


# ---- where decoded pictures are kept -------------------------------------------------------------


def test_cache_dir_keeps_the_data_folder_clean(tmp_path):
    write_pictures(tmp_path / "data", {"a": 10, "b": 20})
    flags = ("--dataset", "folder", "--data-dir", tmp_path / "data")
    where = ("--cache-dir", tmp_path / "cache", "--out", tmp_path / "out")
    training = ("--quick", "--steps", 2, "--batch-size", 4, "--width", 16)
    check_success(run_script("02", *training, *flags, *where))
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"a", "b"}
    assert list((tmp_path / "cache").glob("folder-all*.npy"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_read_only_data_folder_is_kept_elsewhere(tmp_path, monkeypatch, number):
    write_pictures(tmp_path / "data", {"a": 10, "b": 10})
    open_memmap = np.lib.format.open_memmap

    def refuse_data_folder(path, *options, **more):
        if path.parent == tmp_path / "data":
            raise OSError(number, os.strerror(number))
        return open_memmap(path, *options, **more)

    monkeypatch.setattr(np.lib.format, "open_memmap", refuse_data_folder)
    caches = [tmp_path / "data", tmp_path / "out/cache"]
    check_success(read_folder(tmp_path / "data", caches=caches))
    assert list((tmp_path / "out/cache").glob("folder-all*.npy"))
    run = read_folder(tmp_path / "data")
    check_refusal(run, "--cache-dir", os.strerror(number))
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"a", "b"}


def test_one_cache_serves_two_places(tmp_path):
    caches = [tmp_path / "cache"]
    for name, count in (("one", 10), ("two", 20)):
        write_pictures(tmp_path / name, {"a": count, "b": count})
        check_success(read_folder(tmp_path / name, caches=caches))
    train = common.load_dataset("folder", tmp_path / "one", caches=caches)
    assert len(train.images) == 18


# ---- decoded pictures are those that are there ---------------------------------------------------


def recolour(path):
    """Exchange a picture for a white one."""
    Image.new("RGB", (40, 40), "white").save(path)
    later = time.time() + 10  # another date even on a file system of coarse times
    os.utime(path, (later, later))


def test_a_change_far_below_is_noticed(tmp_path):
    write_pictures(tmp_path / "cat/a", {"b": 10})
    write_pictures(tmp_path, {"dog": 10})
    before = common.load_dataset("folder", tmp_path).images
    recolour(tmp_path / "cat/a/b/00.png")
    after = common.load_dataset("folder", tmp_path).images
    assert not torch.equal(before[0], after[0])
    assert after[0].min() == 255
    assert torch.equal(before[1:], after[1:])


def test_a_picture_that_moves_to_another_class_is_noticed(tmp_path):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    common.load_dataset("folder", tmp_path)
    (tmp_path / "a/09.png").rename(tmp_path / "b/99.png")
    train, test = common.load_train_and_test("folder", tmp_path)
    labels = torch.cat([train.labels, test.labels])
    assert torch.bincount(labels).tolist() == [9, 11]


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_damaged_cache_is_decoded_again(tmp_path, suffix):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    before = common.load_dataset("folder", tmp_path)
    path = tmp_path / f"folder-all.{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    after = common.load_dataset("folder", tmp_path)
    assert torch.equal(before.images, after.images)
    assert torch.equal(before.labels, after.labels)


def test_labels_of_another_decoding_are_decoded_again(tmp_path):
    """The file of labels is whole, but the labels are not those of these images."""
    write_pictures(tmp_path, {"a": 10, "b": 10})
    before = common.load_dataset("folder", tmp_path)
    path = tmp_path / "folder-all.npz"
    with np.load(path) as notes:
        content = dict(notes)
    for key, value in (("labels", content["labels"][::-1]), ("classes", np.array(["b", "a"]))):
        np.savez(path, **{**content, key: value})
        after = common.load_dataset("folder", tmp_path)
        assert after.classes == before.classes
        assert torch.equal(before.labels, after.labels), key


def test_decoded_pictures_serve_without_the_originals(tmp_path):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    before = common.load_dataset("folder", tmp_path)
    for path in tmp_path.glob("*/*.png"):
        path.unlink()
    assert torch.equal(before.images, common.load_dataset("folder", tmp_path).images)


def test_a_float_picture_of_minus_one_is_black(tmp_path):
    """-1 once stood for "nothing is transparent", and became white."""
    Image.fromarray(np.full((40, 40), -1, np.float32)).save(tmp_path / "below.tif")
    picture = common.read_picture(tmp_path / "below.tif")
    assert np.asarray(picture).max() == 0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_float_picture_that_is_not_finite_is_named(tmp_path, value):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    pixels = np.full((40, 40), 0.5, np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "a/hot.tif")
    check_refusal(read_folder(tmp_path), "1 unreadable", "a/hot.tif (values that are not finite)")


def png_of(width, height):
    """The first bytes of a PNG of this size: all that is read before the pixels are."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    pixels = zlib.compress(bytes(1000))
    data = b"IDAT" + pixels
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk
        + struct.pack(">I", len(pixels))
        + data
        + struct.pack(">I", zlib.crc32(data))
    )


@pytest.mark.parametrize("size", [(0, 0), (0, 40), (40000, 30000), (100000, 1), (2**31 - 1, 2)])
def test_a_picture_of_a_senseless_size_is_named(tmp_path, size):
    write_pictures(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "a/000.png").write_bytes(png_of(*size))
    check_refusal(read_folder(tmp_path), "1 unreadable", "a/000.png (")


def test_a_large_picture_is_read_without_a_word(tmp_path):
    """PIL warns on stderr of a picture with more than 89 million pixels, such as a scan."""
    write_pictures(tmp_path, {"a": 10, "b": 10})
    Image.new("1", (10000, 9000)).save(tmp_path / "a/scan.png")
    run = read_folder(tmp_path)
    check_success(run)
    assert run.err == ""
