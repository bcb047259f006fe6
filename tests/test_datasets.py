"""Data sets in their true on-disk format, written small: read right, and carried from 02 to 05."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    arguments,
    check_refusal,
    check_success,
    load_weights,
    only_run,
    quick,
    read_json,
    run_function,
    run_process,
    run_script,
)
from PIL import Image, ImageDraw
from torchvision import datasets

import common

ATTRIBUTES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose
    Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee
    Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard
    Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair
    Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
""".split()
COLORS = "red green blue yellow cyan magenta white gray orange brown".split()
GROUND = (20, 30, 40)  # the dark colour around each disc


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def picture(label, i, size):
    """A PIL picture of a disc. Its colour is the class; place and size change with i."""
    image = Image.new("RGB", (size, size), GROUND)
    radius = size * (0.2 + 0.02 * (i % 5))
    x = size * (0.4 + 0.03 * (i % 7))
    y = size * (0.4 + 0.03 * (i % 6))
    box = [x - radius, y - radius, x + radius, y + radius]
    ImageDraw.Draw(image).ellipse(box, fill=COLORS[label])
    return image


# ---- writers: each makes the files that the authors distribute, a few images long ----------------
#
# write(root, patch) -> the class to forget, the names of all classes. `patch` is pytest's
# monkeypatch: torchvision refuses files whose md5 is not that of the published ones.


def with_own_md5(folder, files):
    """torchvision's list of (name, md5) with the checksums of the files in `folder`."""
    return [[name, md5(folder / name)] for name, _ in files]


def cifar10_batch(first, n):
    """A batch as CIFAR's authors pickle it: a row of 3072 bytes is the red plane, green, blue."""
    rows = []
    for i in range(n):
        pixels = np.asarray(picture(i % 10, first + i, 32))
        rows.append(pixels.transpose(2, 0, 1).ravel())  # (32, 32, 3) -> (3072,)
    return {"data": np.stack(rows), "labels": [i % 10 for i in range(n)]}


def write_cifar10(root, patch):
    """Five pickles of 20 images for training, one of 40 for the test."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for k in range(5):
        (folder / f"data_batch_{k + 1}").write_bytes(pickle.dumps(cifar10_batch(k, 20)))
    (folder / "test_batch").write_bytes(pickle.dumps(cifar10_batch(7, 40)))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    meta = folder / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": names}))

    cifar10 = datasets.CIFAR10
    patch.setattr(cifar10, "train_list", with_own_md5(folder, cifar10.train_list))
    patch.setattr(cifar10, "test_list", with_own_md5(folder, cifar10.test_list))
    patch.setattr(cifar10, "meta", {**cifar10.meta, "md5": md5(meta)})
    return "dog", names


def write_stl10(root, patch):
    """Raw files of 96x96 images whose planes run down the columns; labels count from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    for part, n in (("train", 50), ("test", 40), ("unlabeled", 3)):
        pixels = [np.asarray(picture(i % 10, i, 96)) for i in range(n)]
        planes = [array.transpose(2, 1, 0) for array in pixels]  # (H, W, 3) -> (3, W, H)
        np.stack(planes).tofile(folder / f"{part}_X.bin")
        labels = np.arange(n) % 10 + 1
        labels.astype(np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(names))
    (folder / "fold_indices.txt").write_text("\n".join(["0 1 2"] * 10))

    stl10 = datasets.STL10
    patch.setattr(stl10, "train_list", with_own_md5(folder, stl10.train_list))
    patch.setattr(stl10, "test_list", with_own_md5(folder, stl10.test_list))
    return "monkey", names


def draw_face(i, has_bangs):
    """A little face of 178x218 pixels."""
    face = Image.new("RGB", (178, 218), (90 + i, 120, 150))
    draw = ImageDraw.Draw(face)
    draw.ellipse([45, 60, 133, 180], fill=(230, 190, 160))
    draw.ellipse([65 + i % 3, 110, 75, 120], fill="black")
    draw.ellipse([103, 110, 113, 120], fill="black")
    hair_end = 100 if has_bangs else 72
    draw.rectangle([45, 60, 133, hair_end], fill=(60, 40, 20))
    return face


def write_celeba(root, patch):
    """60 jpgs and the five lists. Each second face has bangs, each third is male."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    files = [f"{i + 1:06d}.jpg" for i in range(60)]

    attributes = ["60", " ".join(ATTRIBUTES)]
    parts = []
    for i, file in enumerate(files):
        draw_face(i, has_bangs=i % 2 == 1).save(folder / "img_align_celeba" / file)
        values = dict.fromkeys(ATTRIBUTES, "-1")
        if i % 2 == 1:
            values["Bangs"] = "1"
        if i % 3 == 0:
            values["Male"] = "1"
        attributes.append(f"{file} {' '.join(values.values())}")
        part = 0 if i < 40 else 2  # 0 is training, 1 validation, 2 test
        parts.append(f"{file} {part}")

    lists = {
        "list_attr_celeba.txt": attributes,
        "list_eval_partition.txt": parts,
        "identity_CelebA.txt": [f"{file} 1" for file in files],
        "list_bbox_celeba.txt": [
            "60",
            "image_id x_1 y_1 width height",
            *[f"{file} 1 2 3 4" for file in files],
        ],
        "list_landmarks_align_celeba.txt": [
            "60",
            "lefteye_x lefteye_y",
            *[f"{file} 1 2" for file in files],
        ],
    }
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines) + "\n")

    table = []
    for address, checksum, name in datasets.CelebA.file_list:
        is_archive = name.endswith("zip")  # it is not read, the unpacked pictures are
        table.append((address, checksum if is_archive else md5(folder / name), name))
    patch.setattr(datasets.CelebA, "file_list", table)
    return "bangs", ["other", "bangs"]


def write_idx(path, array, compress):
    """The idx format of MNIST and Fashion-MNIST, from its published description."""
    header = bytes([0, 0, 8, array.ndim])  # 8: unsigned bytes
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    raw = header + sizes + array.astype(np.uint8).tobytes()
    if compress:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(raw))
    else:
        path.write_bytes(raw)


def write_fashion_mnist(root, patch, compress=True):
    """The four original files, in any folder."""
    root.mkdir(parents=True)
    for part, n in (("train", 60), ("t10k", 40)):
        images = [np.asarray(picture(i % 10, i, 28).convert("L")) for i in range(n)]
        write_idx(root / f"{part}-images-idx3-ubyte", np.stack(images), compress)
        write_idx(root / f"{part}-labels-idx1-ubyte", np.arange(n) % 10, compress)
    names = "t-shirt-top trouser pullover dress coat sandal shirt sneaker bag ankle_boot".split()
    return "sneaker", names


def write_imagenette(root, patch):
    """jpegs of uneven size in imagenette2-160/<part>/<WordNet id>."""
    class_names = datasets.Imagenette._WNID_TO_CLASS
    for k, wordnet_id in enumerate(class_names):
        for part, n in (("train", 6), ("val", 4)):
            folder = root / "imagenette2-160" / part / wordnet_id
            folder.mkdir(parents=True)
            for i in range(n):
                image = picture(k, i, 200).resize((200 + 10 * i, 160))
                image.save(folder / f"{wordnet_id}_{i}.jpeg")
    first_names = [names[0] for names in class_names.values()]
    return "chain_saw", [name.lower().replace(" ", "_") for name in first_names]


def write_folder(root, patch):
    """One's own pictures: a sub-folder per class, names with capitals, png and jpg, one grey."""
    names = ["Apples", "lime", "sky"]
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(40):
            image = picture(k, i, 40)
            if i == 0:
                image = image.convert("L")
            suffix = "png" if i % 2 else "jpg"
            image.save(root / name / f"{i:02d}.{suffix}")
    return "Apples", names


WRITERS = {
    "cifar10": write_cifar10,
    "stl10": write_stl10,
    "celeba": write_celeba,
    "fashion_mnist": write_fashion_mnist,
    "imagenette": write_imagenette,
    "folder": write_folder,
}
SHAPES = {  # of the training images and of the test images
    "cifar10": ((100, 3, 32, 32), (40, 3, 32, 32)),
    "stl10": ((50, 3, 64, 64), (40, 3, 64, 64)),
    "celeba": ((40, 3, 64, 64), (20, 3, 64, 64)),
    "fashion_mnist": ((60, 1, 28, 28), (40, 1, 28, 28)),
    "imagenette": ((60, 3, 64, 64), (40, 3, 64, 64)),
    "folder": ((108, 3, 32, 32), (12, 3, 32, 32)),
}

# ---- reading -------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """One data set read twice; each time a training and a test Dataset."""

    first: tuple
    again: tuple  # from the file of decoded pictures, when there is one
    classes: list  # the names that are expected
    shapes: tuple  # of the images that are expected


@pytest.fixture(scope="module", params=list(WRITERS))
def reading(request, tmp_path_factory):
    """A written data set, read twice; decoding its pictures twice is an error."""
    name = request.param
    root = tmp_path_factory.mktemp(name) / "data"
    with pytest.MonkeyPatch.context() as patch:
        forget, classes = WRITERS[name](root, patch)
        first = common.load_train_and_test(name, root, [forget])
        patch.setattr(common, "_decode", lambda *_: pytest.fail("decoded twice"))
        again = common.load_train_and_test(name, root, [forget])
    return Reading(tuple(first), tuple(again), classes, SHAPES[name])


def test_reads_images_of_the_right_shape(reading):
    assert tuple(tuple(data.images.shape) for data in reading.first) == reading.shapes


def test_reads_bytes(reading):
    assert {data.images.dtype for data in reading.first} == {torch.uint8}


def test_reads_the_names_of_the_classes(reading):
    for data in (*reading.first, *reading.again):
        assert data.classes == reading.classes


def test_reads_labels_of_every_class(reading):
    for data in reading.first:
        assert set(data.labels.tolist()) == set(range(len(reading.classes)))


def test_reads_the_same_images_again(reading):
    for first, again in zip(reading.first, reading.again):
        assert torch.equal(first.images, again.images)


def test_reads_the_same_labels_again(reading):
    for first, again in zip(reading.first, reading.again):
        assert torch.equal(first.labels, again.labels)


@pytest.mark.parametrize("name", ["cifar10", "stl10", "imagenette", "folder"])
def test_reads_the_colour_of_the_class(name, tmp_path, monkeypatch):
    """Labels belong to their images, and red is not blue: the disc's middle has its colour."""
    WRITERS[name](tmp_path / "data", monkeypatch)
    data = common.load_dataset(name, tmp_path / "data")
    middle = int(data.images.shape[-1] * 0.45)
    for i in range(0, len(data.images), 7):
        pixel = data.images[i, :, middle, middle].int()
        if name == "folder" and len(set(pixel.tolist())) == 1:
            continue  # the picture that was saved in grey
        color = Image.new("RGB", (1, 1), COLORS[data.labels[i]]).getpixel((0, 0))
        error = (pixel - torch.tensor(color)).abs().max()
        assert error < 60, f"image {i}: {pixel.tolist()} instead of {color}"


@pytest.fixture
def faces(tmp_path, monkeypatch):
    """faces("male", "bangs") -> the 40 training faces with these attributes as classes."""
    write_celeba(tmp_path / "data", monkeypatch)

    def load(*names):
        return common.load_dataset("celeba", tmp_path / "data", True, names)

    return load


def test_celeba_attribute_becomes_a_class(faces):
    assert faces("bangs").labels.tolist() == [i % 2 for i in range(40)]


def test_celeba_attribute_can_be_negated(faces):
    assert faces("not_bangs").labels.tolist() == [1 - i % 2 for i in range(40)]


def test_celeba_of_two_attributes_the_first_counts(faces):
    both = faces("male", "bangs")
    assert both.classes == ["other", "male", "bangs"]
    assert both.labels.tolist() == [1 if i % 3 == 0 else 2 * (i % 2) for i in range(40)]


def test_celeba_without_attributes_has_one_class(faces):
    assert faces().classes == ["other"]


def test_celeba_unknown_attribute_is_answered_with_the_list(faces):
    check_refusal(run_function(faces, "wings"), "eyeglasses")


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_idx_plain_and_gz(tmp_path, monkeypatch, compress):
    write_fashion_mnist(tmp_path / "any", monkeypatch, compress)
    data = common.load_dataset("fashion_mnist", tmp_path / "any", False)
    assert data.images.shape == (40, 1, 28, 28)
    assert data.labels.tolist() == [i % 10 for i in range(40)]
    written = np.asarray(picture(3, 3, 28).convert("L"))
    assert np.array_equal(data.images[3, 0].numpy(), written)


DAMAGED_IDX = {
    "a count of -1": [255] * 4,
    "a count too large": [0, 0, 0, 61],
    "a count too small": [0, 0, 0, 59],
    "a count that overflows": [127, 255, 255, 255],
}


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("count", DAMAGED_IDX.values(), ids=DAMAGED_IDX)
def test_an_idx_file_of_another_length_is_one_line(tmp_path, monkeypatch, compress, part, count):
    write_fashion_mnist(tmp_path / "any", monkeypatch, compress)
    (path,) = (tmp_path / "any").glob(f"train-{part}*")
    opener = gzip.open if compress else open
    with opener(path, "rb") as file:
        content = bytearray(file.read())
    content[4:8] = bytes(count)
    with opener(path, "wb") as file:
        file.write(content)
    run = run_function(common.load_dataset, "fashion_mnist", tmp_path / "any")
    check_refusal(run, path.name, "bytes", "fetch them again")


@pytest.mark.parametrize("length", [0, 3, 4, 9, 15])
def test_an_idx_file_without_its_header_is_one_line(tmp_path, monkeypatch, length):
    write_fashion_mnist(tmp_path / "any", monkeypatch, compress=False)
    path = tmp_path / "any/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    run = run_function(common.load_dataset, "fashion_mnist", tmp_path / "any")
    check_refusal(run, "fetch them again")


def test_folder_notices_new_pictures(tmp_path, monkeypatch):
    """Ten more pictures are nine more to train with: every tenth is put aside for the test."""
    write_folder(tmp_path / "data", monkeypatch)
    before = len(common.load_dataset("folder", tmp_path / "data").images)
    for i in range(10):
        picture(3, i, 40).save(tmp_path / "data/sky" / f"new{i}.png")
    assert len(common.load_dataset("folder", tmp_path / "data").images) == before + 9


DOWNLOAD_MD5 = {
    "cifar10": datasets.CIFAR10.tgz_md5,
    "stl10": datasets.STL10.tgz_md5,
    "celeba": datasets.CelebA.file_list[0][1],
    "imagenette": datasets.Imagenette._ARCHIVES["160px"][1],
    "fashion_mnist": datasets.FashionMNIST.resources[0][1],
}


@pytest.mark.parametrize("name", list(DOWNLOAD_MD5))
def test_a_failed_download_says_which_file_to_put_where(name, tmp_path, monkeypatch):
    """The line has the md5 that torchvision expects, the folder and the size."""
    real = common._open_torchvision

    def offline(*where, download=False):
        if download:
            raise OSError("no route to host\nmore")
        return real(*where)

    monkeypatch.setattr(common, "_open_torchvision", offline)
    run = run_function(common.load_dataset, name, tmp_path / "data")
    check_refusal(run, DOWNLOAD_MD5[name], str(tmp_path / "data"), "MB")


def test_decoded_pictures_serve_when_the_originals_are_gone(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    before = common.load_dataset("cifar10", tmp_path)
    shutil.rmtree(tmp_path / "cifar-10-batches-py")
    after = common.load_dataset("cifar10", tmp_path)
    assert torch.equal(before.images, after.images)


def test_folder_has_to_be_named():
    check_refusal(run_function(common.load_dataset, "folder", None))


def test_folder_has_to_exist(tmp_path):
    check_refusal(run_function(common.load_dataset, "folder", tmp_path / "absent"))


def test_folder_needs_sub_folders(tmp_path):
    check_refusal(run_function(common.load_dataset, "folder", tmp_path))


def test_folder_with_a_broken_picture_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(b"no picture")
    check_refusal(run_function(common.load_dataset, "folder", tmp_path))


# ---- batches -------------------------------------------------------------------------------------


@pytest.fixture
def striped():
    """Ten images of 2x2 pixels whose left column is ten times their index, the right one black."""
    images = torch.zeros(10, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, :, 0] = 10 * torch.arange(10, dtype=torch.uint8)[:, None]
    torch.manual_seed(0)
    return images


def test_batch_is_drawn_from_the_index(striped):
    x = common.draw_batch(striped, torch.tensor([3, 7]), 400, flip=True)
    brightest = common.to_bytes(x).amax((1, 2, 3))
    assert set(brightest.tolist()) == {30, 70}


def test_half_of_a_batch_is_mirrored(striped):
    x = common.draw_batch(striped, torch.tensor([3, 7]), 400, flip=True)
    upper_row = common.to_bytes(x)[:, 0, 0]
    num_unmirrored = (upper_row[:, 0] > upper_row[:, 1]).sum()
    assert 150 < num_unmirrored < 250


def test_batch_without_flip_is_not_mirrored(striped):
    x = common.draw_batch(striped, torch.tensor([3]), 50)
    assert (common.to_bytes(x)[:, 0, 0, 0] == 30).all()


# ---- memory --------------------------------------------------------------------------------------

# The program takes: the project's folder, a folder for the data, the number of images. It prints
# by how many bytes its memory has grown at most while it read the images, and their own bytes.
MEMORY = """
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

sys.path.insert(0, sys.argv[1])
import common

folder = Path(sys.argv[2])
noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


class Faces:
    classes = ["a", "b"]
    picture = Image.fromarray(noise)

    def __init__(self, num_images):
        self.num_images = num_images

    def __len__(self):
        return self.num_images

    def __getitem__(self, i):
        return self.picture, i % 2


def open_faces(*where, **options):
    return Faces(int(sys.argv[3]))


def peak():
    # The kernel's own high-water mark of this program. getrusage's would count the test process
    # that it was forked from.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024


common._open_torchvision = open_faces
common._decode(Faces(10), folder / "warm.npy", 64, None)  # loads what is loaded only once
before = peak()
data = common.load_dataset("imagenette", folder)
total = sum(int(chunk.sum(dtype=torch.int64)) for chunk in data.images.split(20))  # every page
print(peak() - before, data.images.numel())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's accounts")
def test_peak_memory_of_loading_is_the_tensor_itself(tmp_path):
    """Decoding, caching and reading together hold at most 1.2 times the images, and linearly.

    The images have CelebA's shape; there are fewer of them.
    """
    peaks = []
    sizes = []
    for num_images in (4000, 12000):
        folder = tmp_path / str(num_images)
        folder.mkdir()
        run = run_process("-c", MEMORY, ROOT, folder, num_images)
        check_success(run)
        peak, size = run.out.split()[-2:]
        peaks.append(int(peak))
        sizes.append(int(size))
    found = f"peaks {peaks} bytes of images of {sizes} bytes"
    # A second copy of the images would make both ratios 2. The constant, some 10 MB, differs from
    # run to run: no bound on the small set alone.
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    assert 0.5 < slope < 1.2, found
    assert peaks[1] < 1.2 * sizes[1], found


# ---- the whole chain -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(WRITERS))
def test_chain_from_02_to_05(name, tmp_path, monkeypatch):
    forget, _ = WRITERS[name](tmp_path / "data", monkeypatch)
    where = ("--dataset", name, "--data-dir", tmp_path / "data", "--out", tmp_path / "out")
    training = ("--steps", 2, "--batch-size", 4)
    sampling = ("--n", 20, "--nfe", 2)
    unlearn = ("--quick", *where, "--forget", forget)

    check_success(run_script("02", "--quick", *where, *training, "--width", 16))
    check_success(run_script("03", *unlearn, *training, *sampling))
    check_success(run_script("04", *unlearn, *sampling, "--nll", "bound", "--n-nll", 2))
    check_success(run_script("05", *unlearn, "--n", 3, "--steps", 2))

    folder = quick(tmp_path / "out") / name / f"forget-{forget}"
    for file in ("table.json", "samples.png", "classes.png", "downstream"):
        assert (folder / file).exists(), f"no {file}"
    rows = json.loads((folder / "table.json").read_text())["models"]
    assert [row["model"] for row in rows] == ["standard", "obt-rel-vp-steps2-batch-size4"]


@pytest.fixture
def cifar10_flags(tmp_path, monkeypatch):
    """Flags of 03 for a small CIFAR-10; no Standard model ships for it."""
    write_cifar10(tmp_path / "data", monkeypatch)
    where = ("--data-dir", tmp_path / "data", "--out", tmp_path / "out")
    return ("--dataset", "cifar10", *where, "--quick", "--forget", "dog")


def test_cifar10_without_a_base_names_both_ways_out(cifar10_flags):
    run = run_script("03", *cifar10_flags)
    check_refusal(run, "02_train_sde.py --dataset cifar10", "--from-scratch")


def test_cifar10_from_scratch_needs_no_base(cifar10_flags, tmp_path):
    training = ("--from-scratch", "--method", "ort", "--steps", 2, "--batch-size", 4)
    run = run_script("03", *cifar10_flags, *training, "--n", 12, "--nfe", 2)
    check_success(run)
    folder = only_run(tmp_path / "out", "cifar10")
    result = json.loads((folder / "result.json").read_text())
    assert "class 5 'dog': 10 images; keeping 90" in run.out
    assert result["ur_before"] is None, "there is no Standard model that could be measured"
    assert result["fd_after"] > 0


# ---- judges of colour pictures -------------------------------------------------------------------


def test_colour_judge_learns(tmp_path, monkeypatch):
    """ResNet-18 tells three colours apart after a few passes."""
    write_folder(tmp_path / "data", monkeypatch)
    train, test = common.load_train_and_test("folder", tmp_path / "data")
    judge = common.fit_judge(train, epochs=8, batch_size=36, lr=1e-3)
    is_right = common.judge_images(judge, test.images).labels == test.labels
    assert is_right.float().mean() >= 0.9


@pytest.fixture(scope="module")
def quick_judge(tmp_path_factory):
    """02 --judge --quick of three kinds of pictures -> arguments of load_judge, their Dataset."""
    root = tmp_path_factory.mktemp("quick_judge")
    write_folder(root / "data", None)
    where = ("--dataset", "folder", "--data-dir", root / "data", "--out", root / "out")
    check_success(run_script("02", "--quick", *where, "--judge"))
    args = arguments(quick(root / "out"), dataset="folder", data_dir=root / "data", quick=True)
    return args, common.load_dataset("folder", root / "data")


def test_a_quick_judge_serves_a_quick_run(quick_judge):
    args, data = quick_judge
    assert isinstance(common.load_judge(args, data), common.Judge)


def test_a_judge_of_other_pictures_is_refused(quick_judge):
    """All folders share out/folder, and its judge knows the names of its classes."""
    args, data = quick_judge
    other = data._replace(classes=["cat", "dog", "owl"])
    check_refusal(run_function(common.load_judge, args, other), "Apples, lime, sky")


def test_a_quick_judge_does_not_serve_a_full_run(quick_judge, monkeypatch):
    """A full run with the same --out trains a judge of its own."""
    args, data = quick_judge
    args = arguments(args.out.parent, dataset="folder", data_dir=args.data_dir, quick=False)
    trained = []
    monkeypatch.setattr(common, "train_judge", lambda args, *_: trained.append(args))
    check_refusal(run_function(common.load_judge, args, data), "not found")
    assert [args.quick for args in trained] == [False], "one judge is trained, and not quickly"


# ---- bad input -----------------------------------------------------------------------------------

BAD_FLAGS = {
    "width": ("02", "--width 12", "multiple of 8"),
    "attributes": ("02", "--dataset celeba --measure", "--without"),
    "no folder": ("02", "--dataset folder", "--data-dir"),
    "data set": ("03", "--dataset cifar100 --forget dog", "choose from"),
    "device": ("02", "--device cuda:9", "--device cpu"),
    "compile": ("03", "--forget 3 --method siss --compile", "--compile"),
    "parts": ("02", "--batch-size 10 --grad-accum 4", "--grad-accum"),
    "parts of siss": ("03", "--forget 3 --method siss --grad-accum 2", "--grad-accum"),
    "parts of erasediff": ("03", "--forget 3 --method erasediff --grad-accum 2", "--grad-accum"),
}


@pytest.mark.parametrize("number, flags, word", BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_input_is_one_line(tmp_path, number, flags, word):
    check_refusal(run_script(number, "--quick", *flags.split(), "--out", tmp_path), word)


# ---- devices and processes -----------------------------------------------------------------------


def test_out_of_memory_names_the_way_out():
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory")

    check_refusal(run_function(common.run, main), "--batch-size", "--grad-accum")


@pytest.mark.parametrize("word", [".cuda()", "num_workers"])
@pytest.mark.parametrize(
    "path", [ROOT / "common.py", *SCRIPTS.values()], ids=lambda path: path.stem
)
def test_no_device_is_assumed(path, word):
    """These words would tie the code to one device or to pictures in many files."""
    assert word not in path.read_text()


def launch(num_processes, *command):
    """Run a script under torchrun on this machine, one thread a process -> what it printed."""
    # "--" because torchrun takes --n for its own flag otherwise.
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    argv = [sys.executable, *torchrun, f"--nproc_per_node={num_processes}", "--"]
    argv += [str(value) for value in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def read_log(path, keys):
    """The values of `keys` in each line of a log.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [[line[key] for key in keys] for line in lines]


def test_torchrun_two_processes_train_like_one(tmp_path):
    """02 and 03 end with the same weights and losses, and one of the two processes writes.

    The one process does the same batch in two parts. 03 looks at its samples after four steps, and
    decides by them, in two processes too.
    """
    one = tmp_path / "one"
    two = tmp_path / "two"
    train = ("--quick", "--batch-size", 8)
    commands = {
        "02": (*train, "--steps", 3, "--width", 16),
        "03": (*train, "--max-steps", 6, "--forget", 3, "--n", 20, "--nfe", 2),
    }
    for number, argv in commands.items():
        check_success(run_script(number, *argv, "--grad-accum", 2, "--out", one))
        printed = launch(2, SCRIPTS[number], *argv, "--out", two)
        assert printed.count("model: ") == 1, f"both processes of {number} print"

    files = {
        "base.pt": [quick(out) / "mnist/base.pt" for out in (one, two)],
        "model.pt": [only_run(out) / "model.pt" for out in (one, two)],
    }
    for file, paths in files.items():
        alone, shared = map(load_weights, paths)
        for key in alone:
            close = torch.allclose(alone[key], shared[key], rtol=1e-4, atol=1e-6)
            assert close, f"{file}: {key} differs"

    looks = [read_json(only_run(out) / "result.json")["looks"] for out in (one, two)]
    assert len(looks[0]) > 0
    assert looks[0] == looks[1]

    keys = {"base.pt": ["loss"], "model.pt": ["loss_g", "loss_f"]}
    for file, paths in files.items():
        alone, shared = [read_log(path.with_name("log.jsonl"), keys[file]) for path in paths]
        for losses, expected in zip(alone, shared):
            assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6), file

    left = list(only_run(two).parent.iterdir())
    assert left == [only_run(two)], "something temporary is left"


def test_torchrun_evaluates_to_the_same_table(tmp_path, small_base):
    flags = ("--quick", "--forget", 3, "--out", tmp_path)
    folder = quick(tmp_path) / "mnist/forget-3"
    check_success(run_script("03", *flags, "--steps", 2, "--n", 20, "--nfe", 2))
    argv = (*flags, "--n", 100, "--nfe", 2, "--n-nll", 40)

    check_success(run_script("04", *argv))
    alone = json.loads((folder / "table.json").read_text())["models"]
    for path in (folder / "kept").glob("*.pt"):
        path.unlink()  # or the second evaluation would take its numbers from the first
    launch(2, SCRIPTS["04"], *argv)
    shared = json.loads((folder / "table.json").read_text())["models"]

    for row, expected in zip(shared, alone):
        name = row["model"]
        assert row["class_counts"] == expected["class_counts"], name
        assert row["fd"] == pytest.approx(expected["fd"], rel=1e-3), name
        for key in ("ode_bits_g", "ode_bits_f", "bound_bits_g", "bound_bits_f"):
            assert row[key] == pytest.approx(expected[key], abs=1e-3), f"{name}: {key}"
