"""Where things are written: nothing finished is lost, no two outputs share a name, lines work."""

import argparse
import fcntl
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    arguments,
    check_refusal,
    check_success,
    load_script,
    load_weights,
    quick,
    run_function,
    run_script,
    same_weights,
    write_small_base,
)
from PIL import Image

import common

TRAINING = ("--dataset", "mnist", "--batch-size", 4, "--width", 16)
UNLEARN = ("--dataset", "mnist", "--quick", "--forget", 3, "--n", 10, "--nfe", 2)

# ---- --quick -------------------------------------------------------------------------------------


def test_a_quick_run_leaves_the_trained_base_alone(tmp_path):
    path = tmp_path / "mnist/base.pt"
    path.parent.mkdir()
    path.write_bytes(b"a long training")
    check_success(run_script("02", *TRAINING, "--quick", "--steps", 1, "--out", tmp_path))
    assert path.read_bytes() == b"a long training"
    assert (quick(tmp_path) / "mnist/base.pt").exists()


def test_a_full_run_does_not_take_a_quick_base(tmp_path):
    write_small_base(tmp_path)
    args = load_script("03")["arguments"](["--forget", "3", "--out", str(tmp_path)])
    path, _ = common.find_base(args)
    assert path == ROOT / "data/mnist_base.pt"


# ---- 02: a training is not replaced by a shorter or another one ----------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The --out of a full run of 02, of four steps."""
    out = tmp_path_factory.mktemp("trained")
    check_success(run_script("02", *TRAINING, "--steps", 4, "--out", out))
    return out


@pytest.fixture
def base(trained, tmp_path):
    """The path of a copy of its base.pt, for runs with --out tmp_path."""
    path = tmp_path / "mnist/base.pt"
    path.parent.mkdir()
    path.write_bytes((trained / "mnist/base.pt").read_bytes())
    return path


OTHER_TRAININGS = {
    "shorter": ("--steps", 2),
    "lr": ("--steps", 9, "--lr", 1e-5),
    "sde": ("--steps", 9, "--sde", "ve"),
    "noise": ("--steps", 9, "--log-sigma", -2, 1),
    "share of wide noise": ("--steps", 9, "--wide", 0.5),
    "width": ("--steps", 9, "--width", 24),
    "ema": ("--steps", 9, "--ema", 0.5),
    "batch": ("--steps", 9, "--batch-size", 8),
    "seed": ("--steps", 9, "--seed", 1),
    "data": ("--steps", 9, "--data-dir", ROOT / "data"),
}


@pytest.mark.parametrize("flags", OTHER_TRAININGS.values(), ids=OTHER_TRAININGS)
def test_another_training_is_refused_and_both_ways_are_named(tmp_path, base, flags):
    before = base.read_bytes()
    run = run_script("02", *TRAINING, *flags, "--out", tmp_path)
    check_refusal(run, str(base), "--overwrite", "--resume")
    assert base.read_bytes() == before
    assert [path.name for path in base.parent.iterdir()] == ["base.pt"]


def test_overwrite_replaces_a_longer_training(tmp_path, base):
    flags = ("--steps", 1, "--overwrite", "--out", tmp_path)
    check_success(run_script("02", *TRAINING, *flags))
    assert torch.load(base, weights_only=True)["step"] == 1


def test_a_longer_run_of_the_same_training_replaces_it(tmp_path, base):
    check_success(run_script("02", *TRAINING, "--steps", 5, "--out", tmp_path))
    assert torch.load(base, weights_only=True)["step"] == 5


def test_a_training_on_other_images_of_the_same_place_is_not_replaced(tmp_path, base):
    content = torch.load(base, weights_only=True)
    common.save_checkpoint(base, **{**content, "data": [7]})
    run = run_script("02", *TRAINING, "--steps", 9, "--out", tmp_path)
    check_refusal(run, "the images are others", "--overwrite")


def test_a_base_without_arguments_is_not_replaced(tmp_path, base):
    content = torch.load(base, weights_only=True)
    common.save_checkpoint(base, arch=content["arch"], ema=content["ema"])
    check_refusal(run_script("02", *TRAINING, "--steps", 9, "--out", tmp_path), "--overwrite")


def test_a_damaged_base_is_replaced_only_by_overwrite(tmp_path, base):
    damaged = base.read_bytes()[:1000]
    base.write_bytes(damaged)
    run = run_script("02", *TRAINING, "--steps", 1, "--out", tmp_path)
    check_refusal(run, str(base), "--overwrite")
    assert base.read_bytes() == damaged
    check_success(run_script("02", *TRAINING, "--steps", 1, "--overwrite", "--out", tmp_path))
    assert torch.load(base, weights_only=True)["step"] == 1


FOREIGN = {
    "a list": [1, 2],
    "of another project": {"state_dict": {"weight": torch.zeros(2)}, "epoch": 3},
    "step is a word": {"arch": {}, "ema": {}, "args": {}, "step": "two"},
    "args are a number": {"arch": {}, "ema": {}, "args": 7, "step": 1},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_in_the_place_of_the_base_is_not_replaced(tmp_path, content):
    path = tmp_path / "mnist/base.pt"
    path.parent.mkdir()
    torch.save(content, path)
    before = path.read_bytes()
    run = run_script("02", *TRAINING, "--steps", 1, "--out", tmp_path)
    check_refusal(run, str(path), "--overwrite")
    assert path.read_bytes() == before


def test_the_old_training_stays_until_the_new_one_has_come_as_far(tmp_path, base, monkeypatch):
    before = base.read_bytes()
    guarded_step = common.guarded_step
    numbers = itertools.count()

    def crash_at_the_third(*args):
        if next(numbers) == 2:
            raise SystemExit(9)
        return guarded_step(*args)

    monkeypatch.setattr(common, "guarded_step", crash_at_the_third)
    flags = ("--steps", 5, "--save-every", 1, "--out", tmp_path)
    assert run_script("02", *TRAINING, *flags).status == 9
    assert base.read_bytes() == before


# ---- a finished result is not replaced by another one --------------------------------------------


def contents(folder):
    """The files below a folder, with when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def change_base(out):
    """Train the small base anew, as it were."""
    path = quick(out) / "mnist/base.pt"
    content = torch.load(path, weights_only=True)
    content["ema"] = {name: value + 0.01 for name, value in content["ema"].items()}
    common.save_checkpoint(path, **content)


def copy_mnist(folder):
    """A folder with the same images as data/."""
    folder.mkdir()
    (folder / "mnist.npz").symlink_to(ROOT / "data/mnist.npz")
    return folder


@pytest.fixture
def unlearned(tmp_path):
    """The flags of a finished run of 03."""
    write_small_base(tmp_path)
    argv = (*UNLEARN, "--method", "ort", "--steps", 2, "--batch-size", 4, "--out", tmp_path)
    check_success(run_script("03", *argv))
    return argv


def test_a_finished_run_is_replaced_by_itself_alone(unlearned, tmp_path):
    """Other samples, another place of the data, another base: the folder has the same name."""
    before = contents(tmp_path)
    for flags, word in (
        (("--n", 20), "--n was 10 and is now 20"),
        (("--nfe", 3), "--nfe was 2 and is now 3"),
        (("--data-dir", copy_mnist(tmp_path / "data")), "--data-dir was None"),
    ):
        check_refusal(run_script("03", *unlearned, *flags), word, "result.json", "--overwrite")
    check_success(run_script("03", *unlearned))  # the same once more
    change_base(tmp_path)
    check_refusal(run_script("03", *unlearned), "the Standard model is another one")
    assert set(contents(quick(tmp_path))) == {path for path in before if path in contents(tmp_path)}
    check_success(run_script("03", *unlearned, "--overwrite", "--n", 20))
    (path,) = tmp_path.rglob("result.json")
    assert common.json.loads(path.read_text())["n"] == 20


def test_no_work_is_done_before_a_run_is_refused(unlearned, monkeypatch):
    monkeypatch.setattr(common, "sample_images", None)
    monkeypatch.setattr(common, "load_judge", None)
    check_refusal(run_script("03", *unlearned, "--n", 20), "--n")


SPELLED_OUT = """--forget 3 --method obt-rel --sde vp --steps 260 --batch-size 64 --lr 0.001
    --kappa 2.8
    --retain distill --no-uniform-t --log-sigma 0 0.7 --ema 0.98 --n 2000 --nfe 20 --seed 0"""
SAME_RUNS = {
    "a fixed length and its flags": ("--forget 3 --steps 260", SPELLED_OUT),
    "classes in another order": ("--forget 3 7", "--forget 7 3"),
    "elementwise": ("--forget 3 --method ort", "--forget 3 --method ort --ort elementwise"),
    "another device": ("--forget 3", "--forget 3 --device cpu --cache-dir x"),
}


@pytest.mark.parametrize("first, second", SAME_RUNS.values(), ids=SAME_RUNS)
def test_two_spellings_of_one_command_are_the_same_run(tmp_path, first, second):
    unlearn = load_script("03")
    made_from = {"base": "b", "data": 1}
    folder = common.make_folder(tmp_path / "run")
    args = unlearn["arguments"]([*first.split(), "--out", str(tmp_path)])
    common.write_json(folder / "result.json", {"args": vars(args), "made_from": made_from})
    args = unlearn["arguments"]([*second.split(), "--out", str(tmp_path)])
    unlearn["refuse_other_run"](args, folder, made_from)


def readme_commands(number):
    """The arguments of each command of one script that stands on lines of its own on the pages."""
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/results.md"))
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    return [argv[2:] for argv in words if argv[1] == SCRIPTS[number].name]


def test_no_command_of_the_pages_replaces_the_result_of_another(tmp_path):
    """Two with one folder have the same settings."""
    settings = {}
    unlearn = load_script("03")
    restore = load_script("05")
    commands = [*readme_commands("03"), *readme_commands("05")]
    assert len(readme_commands("03")) >= 5
    assert len(readme_commands("05")) >= 2
    for argv in commands:
        script = restore if "--task" in argv else unlearn
        args = script["arguments"]([*argv, "--out", str(tmp_path)])
        if script is restore:
            folder = restore["output_name"](args)
            values = {name: getattr(args, name) for name in restore["TABLE_FLAGS"]}
        else:
            folder = unlearn["output_folder"](args, args.forget)
            others = unlearn["NOT_OF_THE_RESULT"]
            values = {name: value for name, value in vars(args).items() if name not in others}
        before = settings.setdefault(folder, values)
        assert common.differing_flags(values, before, values) == []


def settings_of(path, **changes):
    """Write what a finished result records; `changes` replace its settings, None removes one."""
    settings = {"n": 10, "seed": 0, "fid": None, **changes}
    settings = {name: value for name, value in settings.items() if value is not None}
    common.write_json(path, {"args": settings, "ur": 1.0})
    return argparse.Namespace(overwrite=False)


NOW = {"n": 10, "seed": 0, "fid": True, "data": 7}
RECORDED = {
    "what an older version did not record": ({}, None),
    "another number": ({"n": 11}, "--n was 11 and is now 10"),
    "0 is a value": ({"seed": 1}, "--seed was 1 and is now 0"),
    "False": ({"n": False}, "--n was False"),
    "a column more": ({"fid": False}, None),
    "other images": ({"data": 8}, "the images are others"),
    "the same": ({"data": 7, "fid": True}, None),
}


@pytest.mark.parametrize("changes, word", RECORDED.values(), ids=RECORDED)
def test_what_counts_as_another_result(tmp_path, changes, word):
    path = tmp_path / "result.json"
    args = settings_of(path, **changes)
    argv = (common.refuse_other_result, args, path, NOW, ("fid",))
    if word is None:
        assert run_function(*argv).status == 0
        return
    check_refusal(run_function(*argv), word, str(path))
    args.overwrite = True
    assert run_function(*argv).status == 0


@pytest.mark.parametrize("text", ["", "[1]", '{"args": 1}', "null"])
def test_a_result_that_says_nothing_is_not_replaced(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    args = argparse.Namespace(overwrite=False)
    check_refusal(run_function(common.refuse_other_result, args, path, NOW), "damaged", str(path))


def test_04_replaces_no_table_of_other_settings(unlearned, tmp_path):
    """What only adds to a table may come: the attack, and the likelihood."""
    folder = quick(tmp_path) / "mnist/forget-3"
    small = ("--forget", 3, "--quick", "--n", 20, "--nfe", 2, "--out", tmp_path)
    attack = ("--relearn", 1, "--steps", 1)
    without_nll = (*small, "--nll", "none")
    bound = (*small, "--nll", "bound")

    check_success(run_script("04", *without_nll))
    check_success(run_script("04", *without_nll, *attack))
    check_success(run_script("04", *bound))
    before = contents(folder)
    for flags, word in (
        (without_nll, "--nll was bound and is now none"),
        ((*bound, "--n", 30), "--n was 20 and is now 30"),
        ((*bound, "--sde", "ve"), "--sde was vp and is now ve"),
        ((*bound, "--relearn", 1, "--steps", 2), "--steps was 1 and is now 2"),
        ((*bound, "--relearn", 2, "--steps", 1), "--relearn was [1] and is now [2]"),
    ):
        check_refusal(run_script("04", *flags), word, "--overwrite")
    assert contents(folder) == before
    check_success(run_script("03", *unlearned, "--seed", 1))
    check_success(run_script("04", *bound))  # another run has come: a row more
    check_success(run_script("04", *bound, "--n", 30, "--overwrite"))
    assert common.json.loads((folder / "table.json").read_text())["n"] == 30


def test_05_replaces_no_table_of_other_settings(unlearned, tmp_path):
    small = ("--forget", 3, "--quick", "--n", 3, "--steps", 2, "--out", tmp_path)
    reconstruct = (*small, "--task", "reconstruct", "--sigmas", 1)
    check_success(run_script("05", *small))
    check_success(run_script("05", *reconstruct))
    before = contents(quick(tmp_path))
    for flags, word in (
        ((*small, "--n", 4), "--n was 3 and is now 4"),
        ((*small, "--resample", 1), "--resample was 2 and is now 1"),
        ((*reconstruct, "--sigmas", 1, 2), "--sigmas was [1.0] and is now [1.0, 2.0]"),
    ):
        check_refusal(run_script("05", *flags), word, "--overwrite")
    assert contents(quick(tmp_path)) == before
    check_success(run_script("05", *small, "--n", 4, "--overwrite"))
    check_success(run_script("05", *reconstruct))


def test_01_replaces_no_table_of_another_mixture(tmp_path):
    small = ("--quick", "--steps", 2, "--n", 100, "--out", tmp_path)
    check_success(run_script("01", *small))
    before = contents(tmp_path)
    run = run_script("01", *small, "--weights", 1, 1, 1)
    check_refusal(run, "--weights was [0.8, 0.4, 0.8]", "--overwrite")
    check_refusal(run_script("01", *small, "--seed", 1), "--seed was 0 and is now 1")
    assert contents(tmp_path) == before
    check_success(run_script("01", *small, "--seed", 1, "--overwrite"))
    check_success(run_script("01", *small, "--seed", 1))


# ---- a base that is not fit ----------------------------------------------------------------------


def write_base(out, step):
    """Save a small Standard model that has been trained for so many steps."""
    path = write_small_base(out)
    content = torch.load(path, weights_only=True)
    common.save_checkpoint(path, **content, step=step)


def test_03_04_and_05_warn_before_and_after_of_a_base_of_few_steps(tmp_path):
    write_base(tmp_path, step=30)
    where = ("--dataset", "mnist", "--quick", "--forget", 3, "--out", tmp_path)
    flags = {
        "03": ("--n", 10, "--nfe", 2),
        "04": ("--n", 20, "--nfe", 2, "--nll", "none"),
        "05": ("--n", 3, "--steps", 2),
    }
    for number, own in flags.items():
        run = run_script(number, *where, *own)
        check_success(run)
        lines = [line for line in run.out.splitlines() if line.startswith("WARNING")]
        assert len(lines) >= 2, f"{number}: {run.out}"
        assert "trained for 30 steps, where 30,000 are usual" in lines[0]
    table = quick(tmp_path) / "mnist/forget-3/table.md"
    assert "WARNING" in table.read_text()


@pytest.mark.parametrize("confidence, expected", [(0.1, "unsure of 100 %"), (0.9, None)])
def test_a_base_whose_samples_nobody_recognises_is_not_fit(tmp_path, capsys, confidence, expected):
    write_base(tmp_path, step=30000)
    args = load_script("03")["arguments"](["--forget", "3", "--quick", "--out", str(tmp_path)])
    verdict = common.Verdict(
        torch.zeros(10), torch.full((10,), confidence), torch.zeros(10, 2), torch.zeros(10)
    )
    text = common.warn_if_unfit(args, verdict)
    assert text == capsys.readouterr().out.rstrip("\n")
    assert expected in text if expected else text == ""


def test_the_shipped_base_is_fit(tmp_path):
    args = load_script("03")["arguments"](["--forget", "3", "--out", str(tmp_path)])
    assert common.warn_if_unfit(args) == ""


# ---- names ---------------------------------------------------------------------------------------

RUN_NAMES = {
    "": "obt-rel-vp",
    "--until 1 --max-steps 1000": "obt-rel-vp",
    "--until 0.5": "obt-rel-vp-until0.5",
    "--max-steps 300": "obt-rel-vp-max-steps300",
    "--kappa 2.8": "obt-rel-vp-kappa2.8",
    "--steps 260": "obt-rel-vp-steps260",
    "--kappa 2.8 --steps 260": "obt-rel-vp-steps260",
    "--sde ve --steps 260 --kappa 2.8": "obt-rel-ve-kappa2.8-steps260",
    "--method ort --until 1": "ort-vp-until1",
    "--bf16": "obt-rel-vp-bf16",
    "--kappa 2 --steps 1000": "obt-rel-vp-kappa2-steps1000",
    "--alpha 0.9": "obt-rel-vp-alpha0.9",
    "--kappa 2.8000001": "obt-rel-vp-kappa2.8000001",
    "--sde ve": "obt-rel-ve",
    "--sde ve --kappa 2.8": "obt-rel-ve-kappa2.8",
    "--n 50 --nfe 5": "obt-rel-vp",
    "--method ort --alpha 0.9 --lr 1e-3 --uniform-t --seed 1": "ort-vp-alpha0.9-s1",
    "--method ort --no-uniform-t --lr 3e-4": "ort-vp-no-uniform-t-lr0.0003",
    "--method obt --log-sigma 0 0.7": "obt-vp-no-uniform-t",
    "--uniform-t": "obt-rel-vp-uniform-t",
    "--method ort --ort elementwise": "ort-vp",
    "--method obt --no-floor --forget-every 4": "obt-vp-no-floor-forget-every4",
    "--forget-every 1": "obt-rel-vp",
    "--method ort --ort inner --retain distill": "ort-vp-ort-inner-retain-distill",
    "--method ort --from-scratch": "ort-vp-scratch",
    "--method ort --from-scratch --steps 3000 --seed 2": "ort-vp-scratch-s2",
    "--method erasediff --alpha 0.9": "erasediff-vp-alpha0.9",
    "--method siss --c 0.01": "siss-vp-c0.01",
    "--log-sigma -1 0.5": "obt-rel-vp-log-sigma-1_0.5",
    "--ema 0 --batch-size 8 --grad-accum 2": "obt-rel-vp-batch-size8-ema0-grad-accum2",
}
ORDER = "alpha log-sigma uniform-t steps batch-size lr ema grad-accum scratch s1".split()


def run_name(out, flags):
    """The name of the folder that 03 writes with these flags."""
    unlearn = load_script("03")
    args = unlearn["arguments"](["--forget", "3", *flags.split(), "--out", str(out)])
    return unlearn["output_folder"](args, ["3"]).name


@pytest.mark.parametrize("flags, name", RUN_NAMES.items())
def test_what_was_chosen_by_flag_is_in_the_name(tmp_path, flags, name):
    assert run_name(tmp_path, flags) == name


@pytest.mark.parametrize("name", ["obt-rel-vp", "obt-rel-vp-steps3"])
def test_quick_runs_are_named_after_flags_too(tmp_path, name):
    flags = "--quick" if name == "obt-rel-vp" else "--quick --steps 3"
    assert run_name(tmp_path, flags) == name


def test_a_long_name_ends_in_a_checksum(tmp_path):
    flags = "--method ort --alpha 0.123456789 --lr 0.000123456789 --ema 0.123456789 --steps 12345"
    flags += " --log-sigma 0.123456789 {} --batch-size 1234 --grad-accum 123"
    names = [run_name(tmp_path, flags.format(value)) for value in ("1.23456789", "1.23456788")]
    assert len(set(names)) == 2
    assert [len(name) for name in names] == [100, 100]


def test_two_kappas_are_two_rows_of_04(tmp_path):
    write_small_base(tmp_path)
    for kappa in (1, 2):
        check_success(run_script("03", *UNLEARN, "--kappa", kappa, "--out", tmp_path))
    flags = ("--n", 20, "--nfe", 2, "--nll", "none", "--out", tmp_path)
    check_success(run_script("04", "--dataset", "mnist", "--quick", "--forget", 3, *flags))
    table = (quick(tmp_path) / "mnist/forget-3/table.md").read_text()
    assert "| obt-rel-vp-kappa1 " in table
    assert "| obt-rel-vp-kappa2 " in table


def test_the_unseen_models_of_02_and_of_03_have_two_folders(tmp_path):
    train = load_script("02")
    args = train["arguments"](["--without", "3", "--sde", "vp", "--out", str(tmp_path)])
    args.method = "unseen"
    folder = train["checkpoint_path"](args, ["3"]).parent
    assert folder.name != run_name(tmp_path, "--method unseen --from-scratch --steps 30000")
    assert folder.name != run_name(tmp_path, "--method unseen --from-scratch")


ODD_NAMES = ["a", "b", "a-b", "-", "+", "a+b", "%", "%2B", "/", "..", "../..", ".", " ", "\\", "\n"]


def test_no_two_lists_of_classes_have_one_folder(tmp_path):
    lists = [[name] for name in ODD_NAMES]
    lists += [list(pair) for pair in itertools.product(ODD_NAMES, repeat=2)]
    lists += [list(triple) for triple in itertools.product(ODD_NAMES[:6], repeat=3)]
    lists += [["x" * 300], ["x" * 301], ["é" * 300]]
    folders = {common.forget_folder(tmp_path, "folder", names) for names in lists}
    assert len(folders) == len(lists)
    for folder in folders:
        assert folder.resolve().parent == tmp_path / "folder"
        folder.mkdir(parents=True)


@pytest.mark.parametrize(
    "names, expected",
    [(["3", "7"], "forget-3-7"), (["dog"], "forget-dog"), (["ankle_boot"], "forget-ankle_boot")],
)
def test_usual_classes_keep_their_folder(names, expected):
    assert common.forget_folder("out", "mnist", names) == Path("out/mnist") / expected


def write_mask(path, left):
    """A mask whose hole begins at this column."""
    path.parent.mkdir()
    pixels = np.zeros((28, 28), np.uint8)
    pixels[:, left:] = 255
    Image.fromarray(pixels).save(path)
    return path


def test_two_masks_of_one_file_name_have_two_folders(tmp_path):
    write_small_base(tmp_path)
    check_success(run_script("03", *UNLEARN, "--out", tmp_path))
    for folder, left in (("a", 10), ("b", 20)):
        mask = write_mask(tmp_path / folder / "hole.png", left)
        flags = ("--n", 3, "--steps", 2, "--mask", mask, "--out", tmp_path)
        check_success(run_script("05", "--quick", "--forget", 3, *flags))
    written = (quick(tmp_path) / "mnist/forget-3/downstream").iterdir()
    assert sum(path.name.startswith("inpaint-hole-") for path in written) == 2


def test_temporary_files_of_two_programs_differ(tmp_path, monkeypatch):
    targets = []
    save = torch.save

    def note_and_save(content, target):
        targets.append(Path(target))
        save(content, target)

    monkeypatch.setattr(torch, "save", note_and_save)
    common.save_checkpoint(tmp_path / "base.pt", arch=1)
    assert [path.parent for path in targets] == [tmp_path]
    assert str(os.getpid()) in targets[0].name


# ---- two programs in one place -------------------------------------------------------------------


LOCKED = {
    "02": ((*TRAINING, "--quick", "--steps", 1), "base.pt"),
    "03": (UNLEARN, "forget-3/obt-rel-vp"),
    "04": (("--quick", "--forget", 3, "--n", 20, "--nfe", 2), "forget-3/table.md"),
    "05": (("--quick", "--forget", 3, "--n", 3, "--steps", 2), "forget-3/downstream/inpaint-half"),
}


@pytest.mark.parametrize("number", LOCKED)
def test_the_second_program_in_one_place_is_refused(tmp_path, number):
    flags, place = LOCKED[number]
    write_small_base(tmp_path)
    check_success(run_script("03", *UNLEARN, "--out", tmp_path))
    folder = quick(tmp_path) / "mnist"
    with common.locked(folder / place):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        check_refusal(run_script(number, *flags, "--out", tmp_path), "another program", place)
        after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        assert after == before
    check_success(run_script(number, *flags, "--out", tmp_path))
    assert not list(folder.rglob(".*.lock")), "a lock is left behind"


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, time, common\nwith common.locked(sys.argv[1]):\n print(1, flush=True)\n"
    code += " time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "base.pt")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(SystemExit), common.locked(tmp_path / "base.pt"):
            pass
        process.send_signal(signal.SIGKILL)
    with common.locked(tmp_path / "base.pt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_locks_in_the_file_system_programs_run(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with common.locked(tmp_path / "base.pt"):
        pass
    monkeypatch.setattr(common, "fcntl", None)
    with common.locked(tmp_path / "base.pt"):
        pass


# ---- printed commands ----------------------------------------------------------------------------


def printed_command(text):
    """The command that the last line of a text ends with."""
    return "python " + text.strip().splitlines()[-1].split(": python ")[-1]


def run_line(line, *more):
    """Run a printed line as a shell splits it -> Run."""
    python, script, *argv = shlex.split(line)
    assert python == "python"
    assert (ROOT / script).exists(), line
    return run_script(script[:2], *argv, *more)


def write_pictures(folder):
    """Two classes of pictures, of which one name has a space."""
    generator = np.random.default_rng(0)
    for name in ("black cat", "dog's"):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


# The fast flags that a user might add; what is printed has to bring the rest.
FAST = {
    "02": ("--batch-size", 2, "--steps", 2, "--width", 16),
    "03": ("--n", 10, "--nfe", 2, "--batch-size", 2, "--steps", 2),
    "04": ("--n", 20, "--nfe", 2, "--nll", "none"),
    "05": ("--n", 3, "--steps", 2),
}


@pytest.fixture(params=["mnist", "folder"])
def flags_of_places(request, tmp_path, monkeypatch):
    """--dataset, --out, --data-dir and --quick of a run, with spaces in the paths."""
    monkeypatch.chdir(ROOT)
    data = tmp_path / "my pictures"
    if request.param == "folder":
        write_pictures(data)
    else:
        data.mkdir()
        (data / "mnist.npz").symlink_to(ROOT / "data/mnist.npz")
    out = tmp_path / "my $out"
    return ("--dataset", request.param, "--data-dir", data, "--out", out, "--quick")


def test_every_next_line_works_as_printed(flags_of_places):
    """From 02 to 05, each command is the one that the program before has printed."""
    run = run_script("02", *flags_of_places, *FAST["02"])
    for number in ("03", "04", "05"):
        check_success(run)
        line = printed_command(run.out)
        assert f"python {number}_" in line
        run = run_line(line, *FAST[number])
    check_success(run)
    out = flags_of_places[5]
    assert [path.name for path in out.iterdir()] == ["quick"], "a line has led elsewhere"


def test_every_make_line_works_as_printed(flags_of_places):
    """05 first, and then what each error asks for, until 05 succeeds."""
    forget = "8" if flags_of_places[1] == "mnist" else "dog's"
    wanted = [("05", (*flags_of_places, "--forget", forget))]
    made = []
    while wanted:
        number, argv = wanted[-1]
        run = run_script(number, *argv, *FAST.get(number, ()))
        if run.status == 0:
            made.append(number)
            wanted.pop()
            continue
        check_refusal(run, "with: python ")
        _, script, *flags = shlex.split(printed_command(run.err))
        assert len(wanted) < 4, run.err
        wanted.append((script[:2], flags))
    expected = ["03", "05"] if flags_of_places[1] == "mnist" else ["02", "03", "05"]
    assert made == expected


def test_the_line_for_a_damaged_file_mends_it(tmp_path, monkeypatch):
    """The base, a run with a flag of its own, and the Unseen model."""
    monkeypatch.chdir(ROOT)
    where = ("--dataset", "mnist", "--quick", "--out", tmp_path)
    check_success(run_script("02", *where, *FAST["02"]))
    check_success(run_script("02", *where, *FAST["02"], "--without", 3))
    unlearn = ("--forget", 3, "--method", "ort", "--alpha", 0.5, *FAST["03"])
    check_success(run_script("03", *where, *unlearn))
    evaluate = (*where, "--forget", 3, *FAST["04"])
    folder = quick(tmp_path) / "mnist"
    damaged = [
        folder / "base.pt",
        *folder.glob("forget-3/ort-vp-*/model.pt"),
        *folder.glob("forget-3/unseen-any-*/model.pt"),
    ]
    assert len(damaged) == 3
    for path in damaged:
        path.write_bytes(path.read_bytes()[:500])
        run = run_script("04", *evaluate)
        check_refusal(run, str(path), "make it again with: python ")
        line = printed_command(run.err)
        more = FAST["02"] if "02_train" in line else ()
        check_success(run_line(line, *more))
        check_success(run_script("04", *evaluate))


@pytest.mark.parametrize("flags", ["--out old", "--out=old", "--ou old", "", "--overwrite"])
@pytest.mark.parametrize("note", ["result.json", "command.txt"])
def test_the_line_for_a_run_names_the_place_where_it_lies_now(tmp_path, note, flags):
    """The folder was moved since the command was recorded."""
    script = {"result.json": "03_unlearn.py --forget", "command.txt": "02_train_sde.py --without"}
    command = f"python /elsewhere/{script[note]} 3 {flags} --seed 1"
    path = tmp_path / "new/quick/mnist/forget-3/x/model.pt"
    path.parent.mkdir(parents=True)
    if note == "command.txt":
        path.with_name(note).write_text(command + "\n")
    else:
        common.write_json(path.with_name(note), {"args": {"command": command}})
    args = arguments(tmp_path / "new/quick", quick=True)
    python, name, *argv = shlex.split(common.run_command(args, path, ["3"]))
    assert python == "python"
    assert (ROOT / name).exists(), name
    expected = ["3", "--seed", "1", "--out", str(tmp_path / "new"), "--overwrite"]
    assert argv == [script[note].split()[1], *expected]


@pytest.mark.parametrize("command", ["", 7, "make", "'", None])
def test_a_recorded_command_that_is_none_is_not_named(tmp_path, command):
    path = tmp_path / "mnist/forget-3/x/model.pt"
    path.parent.mkdir(parents=True)
    common.write_json(path.with_name("result.json"), {"args": {"command": command}})
    line = common.run_command(arguments(tmp_path), path, ["3"])
    assert "03_unlearn.py --dataset mnist --forget 3" in line


@pytest.mark.parametrize(
    "changes, word",
    [({"sde": "any"}, "no run of 03"), ({"quick": False}, "leave out --quick")],
)
def test_redraw_says_which_folders_it_cannot_draw(tmp_path, small_base, changes, word):
    """02's model without a class stands beside the runs of 03, and has no pictures of that kind."""
    folder = small_base.parent / "forget-3/x"
    flags = vars(load_script("03")["arguments"](["--forget", "3", "--out", str(tmp_path)]))
    net = common.UNet(width=8, sd=0.6)
    shown = {**flags, "quick": True, **changes}
    folder.mkdir(parents=True)
    common.save_checkpoint(
        folder / "model.pt", arch=net.arch, ema=net.state_dict(), args=shown, step=1
    )
    run = run_script("03", *UNLEARN, "--out", tmp_path, "--redraw", folder)
    check_refusal(run, word)


def test_redraw_of_a_damaged_run_names_its_own_command(tmp_path):
    """It is not the command of the default method."""
    folder = tmp_path / "ort"
    folder.mkdir()
    (folder / "model.pt").write_text("damaged")
    command = "python 03_unlearn.py --forget 3 --method ort --quick"
    common.write_json(folder / "result.json", {"args": {"command": command}})
    run = run_script("03", *UNLEARN, "--out", tmp_path, "--redraw", folder)
    check_refusal(run, "is damaged", "--method ort")


def test_a_copied_run_that_is_damaged_is_mended_where_it_lies(unlearned, tmp_path):
    shutil.copytree(tmp_path / "quick", tmp_path / "copy/quick")
    (path,) = (tmp_path / "copy").rglob("model.pt")
    path.write_bytes(path.read_bytes()[:500])
    original = contents(tmp_path / "quick")
    small = ("--quick", "--forget", 3, "--n", 20, "--nfe", 2, "--nll", "none")
    run = run_script("04", *small, "--out", tmp_path / "copy")
    check_refusal(run, str(path), "make it again with: python ")
    line = printed_command(run.err)
    check_success(run_script("03", *shlex.split(line)[2:]))
    (old,) = (tmp_path / "quick").rglob("model.pt")
    assert same_weights(load_weights(path), load_weights(old))
    assert contents(tmp_path / "quick") == original


def test_a_line_for_another_place_names_the_whole_path(tmp_path, monkeypatch):
    args = load_script("03")["arguments"](["--forget", "3", "--out", str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    assert str(ROOT / "02_train_sde.py") in common.command_line("02_train_sde.py", args)
    monkeypatch.chdir(ROOT)
    assert "python 02_train_sde.py " in common.command_line("02_train_sde.py", args)


def test_the_first_program_names_a_line_that_leads_to_the_same_place(tmp_path):
    toy = load_script("01")
    for flags in ([], ["--quick"]):
        args = toy["arguments"]([*flags, "--out", str(tmp_path)])
        common.separate_quick(args)
        *_, last = shlex.split(toy["next_command"](args))
        assert last == str(tmp_path)


def test_weights_of_a_run_do_not_depend_on_what_lies_beside_it(tmp_path):
    """A second run with another flag leaves the first one's file as it was."""
    write_small_base(tmp_path)
    check_success(run_script("03", *UNLEARN, "--out", tmp_path))
    path = quick(tmp_path) / "mnist/forget-3/obt-rel-vp/model.pt"
    before = path.read_bytes()
    check_success(run_script("03", *UNLEARN, "--lr", 1e-2, "--out", tmp_path))
    other = load_weights(path.parent.with_name("obt-rel-vp-lr0.01") / "model.pt")
    assert path.read_bytes() == before
    assert not same_weights(load_weights(path), other)


# ---- what does not belong together ---------------------------------------------------------------


@pytest.mark.parametrize(
    "recorded", [{"forget": ["7"]}, {"forget": ["3", "7"]}, {"dataset": "fashion_mnist"}]
)
def test_a_run_of_other_classes_or_data_is_left_out_and_named(tmp_path, capsys, recorded):
    args = arguments(tmp_path)
    for name, changes in (("mine", {}), ("copied", recorded)):
        path = tmp_path / f"mnist/forget-3/{name}/model.pt"
        path.parent.mkdir(parents=True)
        run_args = {"method": "ort", "dataset": "mnist", "forget": ["3"], **changes}
        common.save_checkpoint(path, arch={}, ema={}, args=run_args)
    found = [path.parent.name for path in common.find_runs(args, ["3"])]
    assert found == ["mine"]
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["cache", "a/cache"])
def test_decoded_pictures_do_not_lie_among_the_pictures(tmp_path, below):
    """In the folder of a class they would change the pictures while these are decoded."""
    (tmp_path / "pictures/a").mkdir(parents=True)
    data = tmp_path / "pictures"
    flags = ["--dataset", "folder", "--data-dir", data, "--cache-dir", data / below]
    check_refusal(run_script("02", *flags, "--out", tmp_path / "out"), "--cache-dir")
    assert [path.name for path in data.iterdir()] == ["a"]


@pytest.mark.parametrize("is_other", [False, True])
def test_a_run_of_another_standard_model_is_named(tmp_path, capsys, is_other):
    base = common.UNet(width=8, sd=0.6)
    other = common.UNet(width=8, sd=0.5)
    digest = common.weights_digest(other if is_other else base)
    common.write_json(tmp_path / "result.json", {"made_from": {"base": digest}})
    digest = common.weights_digest(base)
    common.warn_of_other_base(tmp_path / "model.pt", digest, "python 03_unlearn.py")
    said = capsys.readouterr().err
    assert ("another Standard model" in said and "python 03_unlearn.py" in said) == is_other
    assert bool(said) == is_other


@pytest.mark.parametrize(
    "data, out",
    [("folder", "."), ("folder/pictures", "."), (".", "results")],
    ids=["the same", "pictures among outputs", "outputs among pictures"],
)
def test_pictures_and_outputs_in_one_folder_are_refused(tmp_path, data, out):
    """With outputs among the pictures, 02's grids of samples would become a class."""
    picture = tmp_path / data / "a/scan.tmp1999999"
    picture.parent.mkdir(parents=True)
    picture.write_text("mine")
    flags = ["--dataset", "folder", "--data-dir", tmp_path / data, "--out", tmp_path / out]
    run = run_script("02", *flags, "--steps", 2)
    check_refusal(run, "--out")
    assert picture.read_text() == "mine", "it is no leftover of ours"
