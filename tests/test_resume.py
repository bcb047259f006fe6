"""03 --resume: a run that was stopped anywhere ends as one that was never stopped, to the bit."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    Crash,
    check_refusal,
    check_success,
    crash_in_training,
    load_script,
    load_weights,
    quick,
    run_function,
    run_patched,
    run_process,
    run_script,
    same_weights,
    write_small_base,
)

import common

SHORT = "--quick --forget 3 --steps 6 --batch-size 8 --n 20 --nfe 2".split()
METHODS = {
    "obt-rel": (),
    "siss": ("--method", "siss"),
    "erasediff": ("--method", "erasediff"),
    "split batch": ("--method", "ort", "--grad-accum", "2"),
    "from scratch": ("--method", "obt", "--from-scratch"),
}


def run_main(monkeypatch, *argv):
    """Run 03 as a program does, by common.run, but in this process -> Run."""
    monkeypatch.setattr(sys, "argv", ["03_unlearn.py", *map(str, argv)])
    handlers = {signum: signal.getsignal(signum) for signum in common.ending_signals()}
    run = run_function(common.run, load_script("03")["main"])
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    return run


def crash_in_drawing(monkeypatch, step, *argv):
    """Run 03 until an exception while it draws the samples "after"."""
    draw = common.sample_images

    def draw_or_crash(*args, label, **more):
        if "after" in label:
            raise Crash
        return draw(*args, label=label, **more)

    with monkeypatch.context() as patch:
        patch.setattr(common, "sample_images", draw_or_crash)
        with pytest.raises(Crash):
            run_patched({}, *argv)


def forget_folder(out):
    """The folder of all runs with --quick --forget 3 --out `out`."""
    return quick(out) / "mnist/forget-3"


def only_file(out, name):
    """The path of the one file of this name among the finished runs."""
    (path,) = forget_folder(out).glob(f"[!.]*/{name}")
    return path


def resume_files(out):
    """The files from which a run would go on."""
    return sorted(forget_folder(out).glob("*.resume.pt"))


def check_same_end(whole, parts):
    """Two --out hold the same run, to the bit, and nothing to go on from."""
    names = ("model.pt", "log.jsonl", "result.json")
    models, logs, results = [[only_file(out, name) for out in (whole, parts)] for name in names]
    assert same_weights(*[load_weights(path) for path in models]), "the weights differ"
    assert len({path.read_bytes() for path in logs}) == 1, "the losses differ"
    counts = [common.json.loads(path.read_text())["class_counts"] for path in results]
    assert counts[0] == counts[1]
    assert resume_files(whole) == resume_files(parts) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The function whole(*flags) -> the --out of an uninterrupted run, made once."""
    made = {}

    def run(*flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("whole")
            write_small_base(made[flags])
            check_success(run_script("03", *SHORT, *flags, "--out", made[flags]))
        return made[flags]

    return run


# ---- it ends with the same weights ---------------------------------------------------------------


@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
def test_after_a_crash_in_training_the_end_is_the_same(small_base, whole, monkeypatch, flags):
    out = small_base.parents[2]
    argv = (*SHORT, *flags, "--out", out)
    crash_in_training(monkeypatch, 4, *argv)
    assert not list(forget_folder(out).glob("*/")), "a folder is there before the run is finished"
    run = run_script("03", *argv, "--resume")
    check_success(run)
    assert "at step 3" in run.out
    check_same_end(whole(*flags), out)


def test_a_run_can_be_stopped_again_and_again(small_base, whole, monkeypatch):
    argv = (*SHORT, "--out", small_base.parents[2])
    crash_in_training(monkeypatch, 2, *argv)
    for _ in range(2):
        crash_in_training(monkeypatch, 3, *argv, "--resume")
    check_success(run_script("03", *argv, "--resume"))
    check_same_end(whole(), small_base.parents[2])


def test_a_run_that_was_stopped_while_it_drew_only_measures(small_base, whole, monkeypatch):
    argv = (*SHORT, "--out", small_base.parents[2])
    crash_in_drawing(monkeypatch, 0, *argv)
    monkeypatch.setattr(common, "guarded_step", None)  # a step would be a TypeError
    run = run_script("03", *argv, "--resume")
    check_success(run)
    assert "at step 6" in run.out
    check_same_end(whole(), small_base.parents[2])


KILLED = """
import os, runpy, signal, sys, common
draw = common.sample_images
def draw_or_die(*args, label, **more):
    if "after" in label:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*args, label=label, **more)
common.sample_images = draw_or_die
runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
"""


def test_a_run_that_was_killed_while_it_drew_only_measures(small_base, whole):
    argv = (*SHORT, "--out", small_base.parents[2])
    assert run_process("-c", KILLED, SCRIPTS["03"], *argv, cwd=ROOT).status == -signal.SIGKILL
    run = run_script("03", *argv, "--resume")
    check_success(run)
    assert "at step 6" in run.out
    check_same_end(whole(), small_base.parents[2])


def test_a_skipped_step_is_remembered(small_base, monkeypatch):
    """Five in a row end the run: three before the crash and two after it."""
    argv = (*SHORT, "--out", small_base.parents[2])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    crash_in_training(monkeypatch, 4, *argv)
    check_refusal(run_script("03", *argv, "--resume"), "five times in a row")


# ---- Ctrl-C and `kill` ---------------------------------------------------------------------------


def test_sigterm_saves_and_the_line_that_it_prints_goes_on(small_base, tmp_path):
    """The run is stopped after step 50 at the earliest, and long before its 3 minutes are over."""
    argv = [*SHORT, "--steps", "2000", "--batch-size", "2", "--out", tmp_path]
    command = [sys.executable, SCRIPTS["03"], *argv]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert err.count("\n") == 1, err
    (path,) = resume_files(tmp_path)
    step = torch.load(path, weights_only=True)["step"]
    assert 50 <= step < 2000
    _, line = err.strip().split("go on with: ")
    python, script, *flags = shlex.split(line)
    assert (python, Path(script).name) == ("python", SCRIPTS["03"].name)

    # Few steps more are enough to see that it goes on.
    def stop_soon(args, data, model, *_):
        raise Crash(len(model.losses))

    with pytest.raises(Crash, match=re.escape(str((step // 50 + 1) * 50))):
        run_patched({"print_progress": stop_soon}, *flags)


def test_ctrl_c_while_it_draws_names_the_command_that_goes_on(small_base, tmp_path, monkeypatch):
    draw = common.sample_images

    def draw_or_stop(*args, label, **more):
        if "after" in label:
            raise KeyboardInterrupt
        return draw(*args, label=label, **more)

    monkeypatch.setattr(common, "sample_images", draw_or_stop)
    run = run_main(monkeypatch, *SHORT, "--out", tmp_path)
    assert run.status == 130
    assert run.err.count("\n") == 1
    assert run.err.endswith(" --resume\n")


def test_a_disk_that_fills_before_the_result_loses_no_training(small_base, tmp_path, monkeypatch):
    """model.pt is written by then, into the hidden folder, which goes."""

    def no_space(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(common, "write_json", no_space)
        run = run_main(monkeypatch, *SHORT, "--out", tmp_path)
    assert run.status == 2
    assert run.err.count("\n") == 1
    assert "make room, then go on with: python " in run.err
    monkeypatch.setattr(common, "guarded_step", None)  # a step would be a TypeError
    _, line = run.err.split("go on with: python ")
    check_success(run_script("03", *shlex.split(line)[1:]))
    assert only_file(tmp_path, "model.pt").exists()
    assert resume_files(tmp_path) == []


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def stopped(small_base, tmp_path, monkeypatch):
    """The flags of a run that was stopped after three steps."""
    argv = (*SHORT, "--out", tmp_path)
    crash_in_training(monkeypatch, 4, *argv)
    return argv


def test_a_stopped_run_is_not_begun_again_unasked(stopped, tmp_path):
    """Both commands of the line work as they are printed."""
    (path,) = resume_files(tmp_path)
    before = path.read_bytes()
    run = run_script("03", *stopped)
    check_refusal(run, str(path), "--resume goes on", "--overwrite begins again")
    assert path.read_bytes() == before
    commands = re.findall(r"python \S*03_unlearn.py (.*?) (?:goes on|begins)", run.err)
    assert [command.split()[-1] for command in commands] == ["--resume", "--overwrite"]
    for command in commands:
        path.write_bytes(before)
        run = run_script("03", *shlex.split(command))
        check_success(run)
        assert ("at step 3" in run.out) == ("--resume" in command)
        assert not path.exists()


def test_resume_without_a_stopped_run_names_the_command_that_begins(small_base, tmp_path):
    run = run_script("03", *SHORT, "--out", tmp_path, "--resume")
    check_refusal(run, "no run was stopped", "begin one with: python ")
    assert "--resume" not in run.err.split("begin one with")[1]


def test_resume_of_a_finished_run_says_so_and_does_nothing(small_base, tmp_path):
    argv = (*SHORT, "--out", tmp_path)
    check_success(run_script("03", *argv))
    path = only_file(tmp_path, "model.pt")
    before = path.stat().st_mtime_ns
    run = run_script("03", *argv, "--resume")
    check_success(run)
    assert "nothing was left to do" in run.out
    assert str(path.parent) in run.out
    assert path.stat().st_mtime_ns == before


def test_resume_of_a_run_that_made_things_worse_says_where_it_is(small_base, tmp_path):
    """It has ended with status 1, and does so once more."""
    folder = forget_folder(tmp_path) / "obt-rel-vp-steps6-batch-size8-worse"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    run = run_script("03", *SHORT, "--out", tmp_path, "--resume")
    assert run.status == 1
    assert f"in {folder}/" in run.out


def test_a_run_that_made_things_worse_with_other_settings_is_not_this_run(small_base, tmp_path):
    folder = forget_folder(tmp_path) / "obt-rel-vp-steps6-batch-size8-worse"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"args": {"n": 7777}}')
    run = run_script("03", *SHORT, "--out", tmp_path, "--resume")
    check_refusal(run, "no run was stopped", "begin one with: python ")


CHANGES = {
    "a flag": {"args": {"lr": 0.5}},
    "the seed": {"args": {"seed": 7}},
    "the method": {"args": {"method": "ort"}},
    "the Standard model": {"made_from": {"base": "another"}},
    "the data": {"made_from": {"data": 7}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_run_of_other_settings_is_not_gone_on_with(stopped, tmp_path, changes):
    (path,) = resume_files(tmp_path)
    content = torch.load(path, weights_only=True)
    for key, values in changes.items():
        content[key] = {**content[key], **values}
    common.save_checkpoint(path, **content)
    before = path.read_bytes()
    check_refusal(run_script("03", *stopped, "--resume"), str(path), "begin again with: python ")
    assert path.read_bytes() == before


def test_another_base_is_noticed(stopped, tmp_path):
    """The base in its place has been trained anew since the run was stopped."""
    path = quick(tmp_path) / "mnist/base.pt"
    content = torch.load(path, weights_only=True)
    content["ema"] = {name: value + 0.01 for name, value in content["ema"].items()}
    common.save_checkpoint(path, **content)
    check_refusal(run_script("03", *stopped, "--resume"), "the Standard model is another one")


def test_other_images_are_noticed(stopped, tmp_path, monkeypatch):
    load = common.load_train_and_test

    def load_without_the_last(*args):
        train, test = load(*args)
        return train._replace(images=train.images[:-1], labels=train.labels[:-1]), test

    monkeypatch.setattr(common, "load_train_and_test", load_without_the_last)
    check_refusal(run_script("03", *stopped, "--resume"), "the images are others")


def test_a_stopped_run_may_be_measured_in_another_way(stopped, tmp_path):
    """No weight depends on --n and --nfe."""
    check_success(run_script("03", *stopped, "--resume", "--n", 30))
    assert common.json.loads(only_file(tmp_path, "result.json").read_text())["n"] == 30


@pytest.mark.parametrize("more", [("--resume", "--overwrite"), ("--resume", "--redraw")])
def test_flags_that_contradict_each_other_are_refused(tmp_path, more):
    check_refusal(run_script("03", *SHORT, "--out", tmp_path, *more), "--resume")


def test_a_run_that_was_to_replace_another_may_go_on_to_do_so(small_base, tmp_path, monkeypatch):
    """--overwrite need not be given again, and cannot be given beside --resume."""
    argv = (*SHORT, "--out", tmp_path)
    check_success(run_script("03", *argv))
    other = (*argv, "--n", 30)
    crash_in_training(monkeypatch, 4, *other, "--overwrite")
    assert common.json.loads(only_file(tmp_path, "result.json").read_text())["n"] == 20
    check_success(run_script("03", *other, "--resume"))
    assert common.json.loads(only_file(tmp_path, "result.json").read_text())["n"] == 30


def test_going_on_replaces_no_other_run_unasked(small_base, tmp_path, monkeypatch):
    argv = (*SHORT, "--out", tmp_path)
    check_success(run_script("03", *argv))
    crash_in_training(monkeypatch, 4, *argv)
    check_refusal(run_script("03", *argv, "--resume", "--n", 30), "--n was 20 and is now 30")
    check_success(run_script("03", *argv, "--resume"))


@pytest.mark.parametrize(
    "changes",
    [{"args": 7}, {"made_from": None}, {"losses": [1.0]}, {"seconds": "long"}, {"model": {}}],
)
def test_a_file_that_does_not_fit_is_one_line(stopped, tmp_path, changes):
    (path,) = resume_files(tmp_path)
    content = torch.load(path, weights_only=True)
    common.save_checkpoint(path, **{**content, **changes})
    check_refusal(run_script("03", *stopped, "--resume"), "cannot be resumed", "--overwrite")


def test_a_damaged_file_names_the_command_that_begins_again(stopped, tmp_path):
    (path,) = resume_files(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    run = run_script("03", *stopped, "--resume")
    check_refusal(run, "is damaged", "--overwrite")
    _, line = run.err.split("with: python ")
    check_success(run_script("03", *shlex.split(line)[1:]))


# ---- how often it saves --------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, expected", [(10**9, [6]), (-1, [1, 2, 3, 4, 5, 6])])
def test_it_saves_every_few_minutes_and_at_the_last_step(
    small_base, tmp_path, monkeypatch, seconds, expected
):
    steps = []
    save = common.save_checkpoint

    def note_and_save(path, **content):
        if path.name.endswith(".resume.pt"):
            steps.append(content["step"])
        save(path, **content)

    monkeypatch.setattr(common, "save_checkpoint", note_and_save)
    check_success(run_patched({"SAVE_SECONDS": seconds}, *SHORT, "--out", tmp_path))
    assert steps == expected


def test_the_time_of_a_run_is_that_of_all_its_parts(stopped, tmp_path):
    (path,) = resume_files(tmp_path)
    content = torch.load(path, weights_only=True)
    common.save_checkpoint(path, **{**content, "seconds": 1000.0})
    start = time.time()
    check_success(run_script("03", *stopped, "--resume"))
    seconds = common.json.loads(only_file(tmp_path, "result.json").read_text())["seconds"]
    assert 1000 < seconds <= 1000 + time.time() - start
