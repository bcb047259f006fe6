"""Settings are used or refused, and what went wrong in a training is said."""

import argparse
import json
import runpy
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    check_refusal,
    check_success,
    load_script,
    quick,
    run_function,
    run_script,
    write_small_base,
)

import common

QUICK = ("--dataset", "mnist", "--quick")
TRAINING = {"--batch-size": 4, "--width": 16, "--steps": 4, "--lr": 1e-3}

# ---- --resume ------------------------------------------------------------------------------------


def train(out, *more, **changes):
    """Run 02 with small settings, of which some may be changed -> Run."""
    flags = []
    for flag, value in {**TRAINING, **changes}.items():
        flags += [flag, value]
    return run_script("02", *QUICK, *flags, *more, "--out", out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The --out of a finished training of 4 steps."""
    out = tmp_path_factory.mktemp("trained")
    check_success(train(out))
    return out


OTHER_FLAGS = {
    "lr": ({"--lr": 1e-5}, ()),
    "seed": ({"--seed": 1}, ()),
    "batch": ({"--batch-size": 8}, ()),
    "ema": ({"--ema": 0.5}, ()),
    "wide": ({"--wide": 0.3}, ()),
    "sde": ({"--sde": "vp"}, ()),
    "log-sigma": ({}, ("--log-sigma", 0, 1)),
}


@pytest.mark.parametrize("name", OTHER_FLAGS)
def test_resume_refuses_another_setting(trained, name):
    changes, more = OTHER_FLAGS[name]
    before = (quick(trained) / "mnist/base.pt").read_bytes()
    run = train(trained, "--resume", *more, **{"--steps": 6, **changes})
    check_refusal(run, "base.pt", f"--{name}")
    assert (quick(trained) / "mnist/base.pt").read_bytes() == before


def test_resume_names_every_setting_that_differs(trained):
    changes = {"--steps": 6, "--lr": 0.5, "--seed": 3}
    run = train(trained, "--resume", **changes)
    check_refusal(run, "--lr was 0.001 and is now 0.5", "--seed was 0 and is now 3")


def test_resume_refuses_fewer_steps(trained):
    run = train(trained, "--resume", **{"--steps": 2})
    check_refusal(run, "4 steps", "--steps 2")


def test_resume_of_a_finished_training_does_not_claim_to_write(trained):
    run = train(trained, "--resume")
    check_success(run)
    assert "wrote" not in run.out
    assert "nothing was left to do" in run.out


def test_resume_goes_on_with_more_steps_and_other_habits(tmp_path):
    check_success(train(tmp_path))
    more = ("--resume", "--save-every", 1, "--sample-every", 3)
    check_success(train(tmp_path, *more, **{"--steps": 6}))
    assert torch.load(quick(tmp_path) / "mnist/base.pt", weights_only=True)["step"] == 6


@pytest.mark.parametrize("left", [None, "", '{"step": 2}\n{"step": 4}\n{"step": 5}\n{"st'])
def test_resume_goes_on_with_the_log_of_its_checkpoint(tmp_path, left):
    """Whatever a crash has left of log.jsonl, and also if nothing is left to be trained."""
    check_success(train(tmp_path))
    log = quick(tmp_path) / "mnist/log.jsonl"
    log.unlink()
    if left is not None:
        log.write_text(left)
    for num_steps, expected in ((4, [4]), (6, [4, 6])):
        check_success(train(tmp_path, "--resume", **{"--steps": num_steps}))
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == expected


# ---- numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("low", [0, float("-inf")])
def test_a_number_has_to_be_finite(low, text):
    parser = common.Parser()
    parser.add_argument("--x", type=common.number(float, low))
    run = run_function(parser.parse_args, ["--x", text])
    check_refusal(run, "--x")


NOT_FINITE = [
    ("01", "--means nan 0 0 0 2 2"),
    ("01", "--weights 1 inf 1"),
    ("02", "--log-sigma nan 1"),
    ("02", "--log-sigma 0 inf"),
    ("02", "--log-sigma 0 0"),
    ("02", "--log-sigma 0 -1"),
    ("02", "--lr inf"),
    ("02", "--wide nan"),
    ("03", "--forget 3 --log-sigma nan 1"),
    ("03", "--forget 3 --log-sigma -1 0"),
    ("03", "--forget 3 --kappa inf"),
    ("03", "--forget 3 --lr nan"),
    ("04", "--forget 3 --relearn --lr inf"),
    ("05", "--forget 3 --task reconstruct --sigmas nan"),
]


@pytest.mark.parametrize("number, flags", NOT_FINITE)
def test_settings_that_are_no_numbers_are_refused(tmp_path, number, flags):
    run = run_script(number, "--quick", *flags.split(), "--out", tmp_path)
    check_refusal(run, "--")
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("relearn, expected", [([], [1, 10]), ([7], [7]), (None, None)])
def test_an_attack_takes_images_that_there_are(relearn, expected):
    args = argparse.Namespace(relearn=relearn)
    load_script("04")["check_attack"](args, 60)
    assert args.relearn == expected


def test_an_attack_with_more_images_than_there_are_is_refused():
    check_attack = load_script("04")["check_attack"]
    run = run_function(check_attack, argparse.Namespace(relearn=[1, 61]), 60)
    check_refusal(run, "--relearn 61", "60 training images")


# ---- steps that were left out --------------------------------------------------------------------


def spoil_some_steps(monkeypatch, script, when):
    """Make the loss of some steps of a script nan: of those for which when(step) holds."""
    space = script["main"].__globals__
    objective = space["objective"]
    calls = []

    def spoiled(*args):
        calls.append(1)
        result = objective(*args)
        if not when(len(calls)):
            return result
        if isinstance(result, tuple):
            return tuple(loss * float("nan") for loss in result)
        return result * float("nan")

    monkeypatch.setitem(space, "objective", spoiled)


def run_spoiled(monkeypatch, number, when, *flags):
    """Run a script of which some steps are not finite -> Run."""
    script = load_script(number)
    spoil_some_steps(monkeypatch, script, when)
    return run_function(script["main"], [*QUICK, *map(str, flags)])


def test_02_counts_skipped_steps(tmp_path, monkeypatch):
    flags = ("--steps", 6, "--batch-size", 4, "--width", 16, "--out", tmp_path)
    run = run_spoiled(monkeypatch, "02", lambda step: step in (2, 3), *flags)
    check_success(run)
    assert "gradient was not finite: 2" in run.out
    last_line = (quick(tmp_path) / "mnist/log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last_line)["skipped_steps"] == 2
    assert torch.load(quick(tmp_path) / "mnist/base.pt", weights_only=True)["skipped_steps"] == 2


def test_02_goes_on_counting_after_resume(tmp_path, monkeypatch):
    flags = ("--batch-size", 4, "--width", 16, "--out", tmp_path)
    check_success(run_spoiled(monkeypatch, "02", lambda step: step == 2, *flags, "--steps", 3))
    more = ("--steps", 6, "--resume")
    check_success(run_spoiled(monkeypatch, "02", lambda step: step == 2, *flags, *more))
    assert torch.load(quick(tmp_path) / "mnist/base.pt", weights_only=True)["skipped_steps"] == 2


def test_03_counts_skipped_steps(tmp_path, small_base, monkeypatch):
    flags = ("--forget", 3, "--n", 10, "--nfe", 2, "--steps", 5, "--out", tmp_path)
    run = run_spoiled(monkeypatch, "03", lambda step: step in (2, 5), *flags)
    check_success(run)
    assert "gradient was not finite: 2" in run.out
    (folder,) = small_base.parent.glob("forget-3/*")
    assert json.loads((folder / "result.json").read_text())["skipped_steps"] == 2
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["skipped"]] == [2, 5]


@pytest.mark.parametrize("number, flags", [("02", ("--width", 16)), ("03", ("--forget", 3))])
def test_a_training_without_a_good_step_is_no_success(tmp_path, monkeypatch, number, flags):
    """Four steps are too few for the guard, which gives up after five in a row."""
    if number == "03":
        write_small_base(tmp_path)
    flags = (*flags, "--steps", 4, "--out", tmp_path)
    run = run_spoiled(monkeypatch, number, lambda step: True, *flags)
    check_refusal(run, "not finite in any of the 4 steps", "--lr")
    assert not list(quick(tmp_path).glob("mnist/forget-3/*/model.pt"))


def test_a_run_without_skipped_steps_says_nothing_of_them(trained):
    line = json.loads((quick(trained) / "mnist/log.jsonl").read_text().splitlines()[-1])
    assert line["skipped_steps"] == 0
    assert common.skipped_text(0) == ""


def test_a_judge_counts_skipped_steps(capsys, monkeypatch):
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)
    data = common.Dataset(images, torch.zeros(8).long(), ["a", "b"])
    monkeypatch.setattr(common, "random_affine", lambda x: x * float("nan"))
    run = run_function(lambda: common.fit_judge(data, epochs=2, batch_size=4))
    check_refusal(run, "not finite in any")


# ---- runs that made things worse -----------------------------------------------------------------

BETTER = {
    "ur_before": 10.0,
    "ur_after": 1.0,
    "ur_interval": [0.5, 2.0],
    "low_confidence_before": 9,
    "low_confidence_after": 9,
    "class_counts": {"before": [20, 30, 19], "after": [25, 0, 0]},
}
# "b" was to be forgotten; of "c" 19 samples are too few to miss it.
DATA = argparse.Namespace(forget_classes=[1], class_names=["a", "b", "c"])
WORSE = {
    "more 3s": ({"ur_after": 14.0, "ur_interval": [12.0, 16.0]}, 1),
    "perhaps more 3s": ({"ur_after": 11.0, "ur_interval": [9.9, 13.0]}, 0),
    "rubbish": ({"low_confidence_after": 50.5}, 1),
    "half rubbish": ({"low_confidence_after": 50.0}, 0),
    "rubbish before": ({"low_confidence_before": 60, "low_confidence_after": 55}, 0),
    "a class is gone": ({"class_counts": {"before": [20, 30, 5], "after": [0, 0, 40]}}, 1),
    "both": ({"ur_interval": [99, 100], "low_confidence_after": 70.0}, 2),
    "better": ({}, 0),
    "no base": ({"ur_before": None, "low_confidence_after": 70.0}, 0),
}


@pytest.mark.parametrize("changes, expected", WORSE.values(), ids=WORSE)
def test_what_counts_as_worse(tmp_path, changes, expected):
    unlearn = load_script("03")
    args = unlearn["arguments"](["--forget", "3", "--out", str(tmp_path)])
    assert len(unlearn["reasons_of_worse"](args, {**BETTER, **changes}, DATA)) == expected


@pytest.mark.parametrize("flags", [["--quick"], ["--from-scratch", "--method", "ort"]])
def test_a_trial_run_is_never_worse(tmp_path, flags):
    unlearn = load_script("03")
    args = unlearn["arguments"](["--forget", "3", *flags, "--out", str(tmp_path)])
    result = {**BETTER, "low_confidence_after": 70.0}
    assert unlearn["reasons_of_worse"](args, result, DATA) == []


@pytest.fixture
def worsening(small_base, monkeypatch):
    """A full run of 03 on few images whose judge is unsure of `unsure` percent -> Run."""
    measure = common.measure
    monkeypatch.setattr(common, "reference_images", lambda images, quick: images[:100])

    def run(unsure):
        def measure_and_change(*args):
            result = {**measure(*args), "ur": 5.0, "ur_interval": [4.0, 6.0], "low_confidence": 0.0}
            if args[-1] is not None:  # not the Standard model
                result["low_confidence"] = unsure
            return result

        monkeypatch.setattr(common, "measure", measure_and_change)
        flags = ("--steps", 2, "--batch-size", 4, "--n", 10, "--nfe", 2)
        out = small_base.parent.parent
        return run_script("03", "--forget", 3, *flags, "--out", out)

    return run


def content(folder):
    """The bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_worse_run_is_saved_beside_and_replaces_nothing(small_base, worsening):
    check_success(worsening(10))
    (good,) = small_base.parent.glob("forget-3/[!.]*")
    before = content(good)

    for name in ("-worse", "-worse2"):
        run = worsening(70)
        assert run.status == 1
        assert run.err.startswith("worse than before: the judge is unsure of 70 %")
        assert run.err.count("\n") == 1
        worse = good.with_name(good.name + name)
        assert f"{worse}/" in run.err
        assert {path.name for path in worse.iterdir()} == set(before)
        assert json.loads((worse / "result.json").read_text())["worse"]
    assert content(good) == before
    left = {path.name for path in good.parent.iterdir()}
    assert left == {good.name, f"{good.name}-worse", f"{good.name}-worse2"}


def test_a_worse_run_is_a_row_of_the_tables(tmp_path, monkeypatch):
    space = runpy.run_path(str(ROOT / "tests/make_tables.py"))["execute"].__globals__
    space["PLACES"].runs = tmp_path

    def main(argv):
        folder = Path(argv[-1]) / "mnist/forget-3/ort-vp-worse"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
        raise SystemExit(1)

    monkeypatch.setitem(space, "load_script", lambda number: {"main": main})
    folder = space["execute"]("a/b", "python 03_unlearn.py --forget 3")
    assert folder.name == "ort-vp-worse"
