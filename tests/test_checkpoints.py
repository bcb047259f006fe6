"""Broken and foreign checkpoints: refused in one line, or computed anew; never taken as such."""

import shutil
import zipfile

import pytest
import torch
from conftest import (
    ROOT,
    arguments,
    check_refusal,
    check_success,
    load_script,
    quick,
    run_function,
    run_script,
    same_weights,
    write_small_base,
)

import common

QUICK = ("--dataset", "mnist", "--quick")
SHAPE = (1, 28, 28)

# ---- damaged bytes -------------------------------------------------------------------------------


def flip(content, place, generator):
    """Turn one bit round."""
    bit = int(torch.randint(8, (), generator=generator))
    content[place] ^= 1 << bit


def zero(content, place, generator):
    """A sector that was never written."""
    content[place : place + 512] = bytes(512)


def splice(content, place, generator):
    """A sector of another place in the file."""
    source = int(torch.randint(len(content) - 512, (), generator=generator))
    content[place : place + 512] = content[source : source + 512]


@pytest.mark.parametrize("mutate", [flip, zero, splice])
def test_no_damaged_byte_becomes_another_weight(tmp_path, mutate):
    """Of 20 damaged files each is refused, or holds the old weights: padding was hit."""
    whole = write_small_base(tmp_path)
    weights = common.load_net(whole, "").state_dict()
    path = tmp_path / "damaged.pt"
    num_refused = 0
    for k in range(20):
        generator = common.rng(k)
        content = bytearray(whole.read_bytes())
        mutate(content, int(torch.randint(len(content) - 512, (), generator=generator)), generator)
        path.write_bytes(content)
        loaded = []
        run = run_function(
            lambda loaded=loaded: loaded.append(common.load_net(path, "the command"))
        )
        if run.status:
            check_refusal(run, "damaged.pt", "the command")
            num_refused += 1
        else:
            assert same_weights(weights, loaded[0].state_dict()), f"mutant {k}"
    assert num_refused > 10, "hardly anything was damaged"


def flip_in_the_middle(path):
    """Damage a file of tensors where only its checksums tell: in the data, not in the headers."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        data = archive.read(largest)
    content[content.index(data) + len(data) // 2] ^= 0x40
    path.write_bytes(content)


def test_a_damaged_judge_is_refused(tmp_path):
    path = tmp_path / "mnist/judge.pt"
    path.parent.mkdir()
    shutil.copy(ROOT / "data/mnist_judge.pt", path)
    flip_in_the_middle(path)
    data = common.load_dataset("mnist")
    run = run_function(common.load_judge, arguments(tmp_path), data)
    check_refusal(run, str(path), "02_train_sde.py --dataset mnist --judge")


def test_a_damaged_kept_result_is_computed_again(tmp_path):
    read_cache = load_script("04")["read_cache"]
    path = tmp_path / "x.pt"
    common.save_checkpoint(path, key={"n": 1}, images=torch.zeros(10000, dtype=torch.uint8))
    assert read_cache(path, {"n": 1}) is not None
    flip_in_the_middle(path)
    assert read_cache(path, {"n": 1}) is None


def test_damaged_samples_of_the_benchmark_are_drawn_again(tmp_path):
    import benchmark

    path = tmp_path / "chunk.pt"
    torch.save({"images": torch.zeros(10000, dtype=torch.uint8)}, path)
    assert benchmark.read_kept_images(path) is not None
    flip_in_the_middle(path)
    assert benchmark.read_kept_images(path) is None


# ---- whole files that do not fit -----------------------------------------------------------------


@pytest.fixture
def base(small_base):
    """The content of a small base that lies where the scripts look first."""
    return torch.load(small_base, weights_only=True)


def write_base(out, base, **changes):
    """Write the base again with some entries changed; None leaves an entry out."""
    content = {name: value for name, value in {**base, **changes}.items() if value is not None}
    common.save_checkpoint(quick(out) / "mnist/base.pt", **content)


def unet_content(**arch):
    """A checkpoint of a network of random weights."""
    net = common.UNet(**{"width": 16, **arch})
    return {"arch": net.arch, "ema": net.state_dict()}


@pytest.mark.parametrize("what", ["channels", "sides", "size"])
def test_a_base_for_other_images_is_refused(tmp_path, base, what):
    changes = {"shape": (1, 32, 32)}  # the same network, trained on larger images
    if what == "channels":
        changes = unet_content(channels=3)
    if what == "sides":  # 28 cannot be halved four times
        changes = unet_content(mult=(1, 1, 1, 1), attn=(False,) * 4)
    write_base(tmp_path, base, **changes)
    path = quick(tmp_path) / "mnist/base.pt"
    run = run_function(common.load_net, path, "the command", "cpu", SHAPE)
    check_refusal(run, "base.pt", "(1, 28, 28)", "the command")


@pytest.mark.parametrize("number, flags", [("03", ("--forget", 3)), ("02", ("--measure",))])
def test_each_script_compares_the_base_with_its_images(tmp_path, base, number, flags):
    write_base(tmp_path, base, **unet_content(channels=3))
    run = run_script(number, *QUICK, *flags, "--out", tmp_path)
    check_refusal(run, "base.pt", "(1, 28, 28)", "02_train_sde.py --dataset mnist")


@pytest.mark.parametrize("number", ["04", "05"])
def test_a_run_for_other_images_is_refused(tmp_path, base, number):
    folder = quick(tmp_path) / "mnist/forget-3/ort-vp"
    folder.mkdir(parents=True)
    args = {"method": "ort", "sde": "vp", "seed": 0}
    common.save_checkpoint(folder / "model.pt", **unet_content(channels=3), args=args)
    run = run_script(number, *QUICK, "--forget", 3, "--out", tmp_path)
    check_refusal(run, "ort-vp/model.pt", "(1, 28, 28)")


@pytest.mark.parametrize("args", [None, {}, 7])
def test_a_run_without_a_method_is_refused(tmp_path, base, args):
    folder = quick(tmp_path) / "mnist/forget-3/ort-vp"
    folder.mkdir(parents=True)
    common.save_checkpoint(folder / "model.pt", **base, args=args)
    run = run_script("04", *QUICK, "--forget", 3, "--out", tmp_path)
    check_refusal(run, "ort-vp/model.pt", "03_unlearn.py")


@pytest.mark.parametrize("forgotten", [3, [3], "3", {"3": 1}])
def test_a_run_whose_forgotten_classes_are_no_names_is_refused(tmp_path, base, forgotten):
    folder = quick(tmp_path) / "mnist/forget-3/ort-vp"
    folder.mkdir(parents=True)
    args = {"method": "ort", "forget": forgotten}
    common.save_checkpoint(folder / "model.pt", **base, args=args)
    run = run_script("04", *QUICK, "--forget", 3, "--out", tmp_path)
    check_refusal(run, "ort-vp/model.pt", "which classes", "03_unlearn.py")


NO_BASE = {
    "no arch": {"arch": None},
    "no weights": {"ema": None},
    "arch is a number": {"arch": 7},
    "arch of another program": {"arch": {"layers": 5}},
    "odd width": {"arch": {"width": 13}},
    "weights are a list": {"ema": [1, 2]},
    "too few weights": {"ema": {}},
}


@pytest.mark.parametrize("changes", NO_BASE.values(), ids=NO_BASE)
def test_a_base_without_what_it_needs_is_refused(tmp_path, base, changes):
    write_base(tmp_path, base, **changes)
    run = run_function(common.load_net, quick(tmp_path) / "mnist/base.pt", "the command")
    check_refusal(run, "base.pt", "the command")


def test_a_checkpoint_that_is_a_list_is_refused(tmp_path):
    torch.save(["arch", "ema"], tmp_path / "x.pt")
    run = run_function(common.load_checkpoint, tmp_path / "x.pt", "the command")
    check_refusal(run, "x.pt", "the command")


def judge_content(channels=1, classes=10, names=True):
    """A checkpoint of a judge with random weights."""
    judge = common.Judge(channels, classes)
    content = {"arch": judge.arch, "model": judge.state_dict()}
    if names:
        content["classes"] = [str(i) for i in range(classes)]
    return content


OTHER_JUDGES = {
    "no classes": judge_content(names=False),
    "nine classes": judge_content(classes=9),
    "nine classes without names": judge_content(classes=9, names=False),
    "other names": {**judge_content(), "classes": list("abcdefghij")},
    "no weights": {**judge_content(), "model": {}},
    "classes are a number": {**judge_content(), "classes": 0},
    "classes are their number": {**judge_content(), "classes": 10},
    "weights are not finite": {
        **judge_content(),
        "model": {name: w * float("nan") for name, w in judge_content()["model"].items()},
    },
    "colours": judge_content(channels=3),
}


@pytest.mark.parametrize("content", OTHER_JUDGES.values(), ids=OTHER_JUDGES)
def test_another_judge_is_refused(tmp_path, content):
    (tmp_path / "fashion_mnist").mkdir()
    common.save_checkpoint(tmp_path / "fashion_mnist/judge.pt", **content)
    images = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    data = common.Dataset(images, torch.arange(10), [str(i) for i in range(10)])
    args = arguments(tmp_path, dataset="fashion_mnist")
    run = run_function(common.load_judge, args, data)
    check_refusal(run, "judge.pt")


# ---- resuming ------------------------------------------------------------------------------------


TRAINING = ("--batch-size", 4, "--width", 16)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The --out of a training of two steps, and the content of its base.pt."""
    out = tmp_path_factory.mktemp("stopped")
    check_success(run_script("02", *QUICK, *TRAINING, "--steps", 2, "--out", out))
    return out, torch.load(quick(out) / "mnist/base.pt", weights_only=True)


def misfits(content):
    """What can be wrong with a file to resume, as changes of its content."""
    first, *others = content["optimizers"]
    return {
        "another optimizer's shapes": {"optimizers": [turn_averages(first), *others]},
        "an optimizer without its averages": {"optimizers": [drop_an_average(first), *others]},
        "more steps than are wanted": {"step": 9},
        "steps below zero": {"step": -1},
        "one optimizer": {"optimizers": content["optimizers"][:1]},
        "no optimizer": {"optimizers": []},
        "exchanged optimizers": {"optimizers": content["optimizers"][::-1]},
        "too few weights": {"model": {}},
        "no random state": {"rng": None},
        "short random state": {"rng": content["rng"][:100]},
        "step is a word": {"step": "two"},
        "other images": {"shape": (1, 32, 32)},
        "no settings": {"args": 7},
    }


def turn_averages(optimizer):
    """The state of an optimizer with its averages flattened."""
    state = {}
    for index, entry in optimizer["state"].items():
        state[index] = {name: value.flatten() for name, value in entry.items()}
    return {**optimizer, "state": state}


def drop_an_average(optimizer):
    """The state of an optimizer without that of its first weight."""
    state = dict(list(optimizer["state"].items())[1:])
    return {**optimizer, "state": state}


NOTHING = {"optimizers": [{"state": {}}], "rng": []}


@pytest.mark.parametrize("what", list(misfits(NOTHING)))
def test_a_resume_file_that_does_not_fit_is_refused(stopped, what):
    out, content = stopped
    write_base(out, content, **misfits(content)[what])
    run = run_script("02", *QUICK, *TRAINING, "--steps", 4, "--resume", "--out", out)
    check_refusal(run, "base.pt")


def test_the_command_that_begins_again_trains_the_same_network(stopped):
    """Not one of the usual width, with the usual batches."""
    out, content = stopped
    write_base(out, content, rng=None)
    run = run_script("02", *QUICK, *TRAINING, "--steps", 4, "--resume", "--out", out)
    check_refusal(run, "--batch-size 4 --width 16", "--steps 4", "--overwrite")
