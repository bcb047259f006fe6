"""Files and folders: written whole or not at all; nothing finished is lost, nothing left over."""

import argparse
import itertools
import math
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    arguments,
    check_refusal,
    check_success,
    load_script,
    only_run,
    parse_json,
    quick,
    read_json,
    run_function,
    run_script,
    watch,
)

import common

QUICK = ("--dataset", "mnist", "--quick")


def names(folder):
    """The names of all that lies in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def dead_pid():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


# ---- fresh_folder: neither the old run nor the new one is lost -----------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a finished run, with the file "a" in it."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "a").write_text("old")
    return path


def replace_folder(path):
    """Write the folder anew, with the file "a"."""
    with common.fresh_folder(path) as new:
        (new / "a").write_text("new")


def break_replace(monkeypatch, moment, error):
    """Let os.replace raise `error`: "before" or "after" its first move, or "second" of two."""
    replace = os.replace
    calls = []

    def broken(source, target):
        calls.append(source)
        if moment == "before" or (moment == "second" and len(calls) == 2):
            raise error
        replace(source, target)
        if moment == "after":
            raise error

    monkeypatch.setattr(os, "replace", broken)


ERRORS = [OSError(5, "Input/output error"), KeyboardInterrupt()]


@pytest.mark.parametrize("moment", ["before", "after", "second"])
@pytest.mark.parametrize("error", ERRORS, ids=["OSError", "Ctrl-C"])
def test_a_folder_that_cannot_be_replaced_is_put_back(run_folder, monkeypatch, moment, error):
    break_replace(monkeypatch, moment, error)
    with pytest.raises(type(error)):
        replace_folder(run_folder)
    assert (run_folder / "a").read_text() == "old"
    assert not list(run_folder.parent.glob(".*.old*")), "the old folder stands under two names"


@pytest.mark.parametrize("moment", ["before", "after", "second"])
def test_a_finished_folder_survives_and_a_line_says_where(run_folder, monkeypatch, capsys, moment):
    break_replace(monkeypatch, moment, OSError(5, "Input/output error"))
    with pytest.raises(OSError):
        replace_folder(run_folder)
    (hidden,) = run_folder.parent.glob(".run.*")
    assert (hidden / "a").read_text() == "new"
    err = capsys.readouterr().err
    assert str(hidden) in err
    assert err.count("\n") == 1


def test_an_interrupt_after_the_second_move_leaves_the_new_folder(run_folder, monkeypatch):
    replace = os.replace

    def late(source, target):
        replace(source, target)
        if target == run_folder:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(run_folder)
    assert (run_folder / "a").read_text() == "new"
    assert names(run_folder.parent) == ["run"]


def test_fresh_folder_does_not_mix_with_a_leftover_of_its_own_number(run_folder):
    leftover = run_folder.with_name(f".run.tmp{os.getpid()}")
    leftover.mkdir()
    (leftover / "b").write_text("of a killed program")
    replace_folder(run_folder)
    assert names(run_folder) == ["a"]


def test_a_file_in_the_place_of_a_folder_stays(tmp_path):
    path = tmp_path / "run"
    path.write_text("precious")
    check_refusal(run_function(replace_folder, path), str(path), "is a file")
    assert path.read_text() == "precious"
    assert names(tmp_path) == ["run"]


# ---- leftovers of killed programs ----------------------------------------------------------------


def make_leftover(path):
    """A folder with one file, as a killed program leaves it."""
    path.mkdir(parents=True)
    (path / "a").write_text(path.name)
    return path


def test_leftovers_of_dead_processes_are_removed(tmp_path, run_folder, dead_pid):
    make_leftover(tmp_path / f".run.tmp{dead_pid}")
    make_leftover(tmp_path / f".run.old{dead_pid}")
    make_leftover(tmp_path / f"forget-3/kept/.new.tmp{dead_pid}")
    (tmp_path / f"forget-3/kept/x.pt.tmp{dead_pid}").write_text("half")
    (tmp_path / f"base.pt.tmp{dead_pid}").write_text("half")
    common.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["forget-3", "run"]
    assert names(tmp_path / "forget-3/kept") == []
    assert (run_folder / "a").read_text() == "old"


def test_an_old_folder_whose_successor_is_missing_is_put_back(tmp_path, dead_pid):
    make_leftover(tmp_path / f".run.old{dead_pid}")
    make_leftover(tmp_path / f".run.tmp{dead_pid}")
    common.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run/a").read_text() == f".run.old{dead_pid}"


def test_a_program_killed_between_the_two_moves_has_finished(tmp_path, dead_pid):
    make_leftover(tmp_path / f".run.old{dead_pid}")
    make_leftover(tmp_path / f".run.finished{dead_pid}")
    common.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run/a").read_text() == f".run.finished{dead_pid}"


def test_a_finished_folder_that_found_no_place_stays(tmp_path, run_folder, dead_pid):
    finished = make_leftover(tmp_path / f".run.finished{dead_pid}")
    common.remove_leftovers(tmp_path)
    assert finished.exists()
    assert (run_folder / "a").read_text() == "old"


@pytest.mark.parametrize("pid", [os.getpid(), os.getppid()], ids=["itself", "another"])
def test_what_a_running_process_writes_stays(tmp_path, pid):
    folder = make_leftover(tmp_path / f".run.tmp{pid}")
    file = tmp_path / f"base.pt.tmp{pid}"
    file.write_text("in work")
    common.remove_leftovers(tmp_path)
    assert folder.exists()
    assert file.exists()


def test_an_earlier_program_with_the_same_number_is_dead(tmp_path):
    """In a container every program may have the same number."""
    file = tmp_path / f"base.pt.tmp{os.getpid()}"
    file.write_text("half")
    os.utime(file, (common.PROGRAM_START - 60, common.PROGRAM_START - 60))
    common.remove_leftovers(tmp_path)
    assert not file.exists()


@pytest.mark.parametrize("name", ["photos.tmp2", "run", ".hidden.tmpx", "base.pt.tmp"])
def test_other_names_are_no_leftovers(tmp_path, name):
    folder = make_leftover(tmp_path / name)
    common.remove_leftovers(tmp_path)
    assert folder.exists()


STARTS = {
    "02": (*QUICK, "--resume"),
    "03": (*QUICK, "--forget", 11),
    "04": (*QUICK, "--forget", 11),
    "05": (*QUICK, "--forget", 11),
}


@pytest.mark.parametrize("number", STARTS)
def test_every_script_clears_away_when_it_starts(tmp_path, dead_pid, number):
    make_leftover(quick(tmp_path) / f"mnist/forget-3/.run.tmp{dead_pid}")
    (quick(tmp_path) / f"mnist/base.pt.tmp{dead_pid}").write_text("half")
    (quick(tmp_path) / "mnist/.base.pt.lock").touch()
    run = run_script(number, *STARTS[number], "--out", tmp_path)  # ends soon: bad input
    assert run.status == 2
    assert not list(tmp_path.rglob("*.tmp*"))
    assert not list(tmp_path.rglob(".*.lock"))


# ---- single files --------------------------------------------------------------------------------


def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), common.whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_two_processes_do_not_share_an_unfinished_file(tmp_path, monkeypatch):
    with common.whole_file(tmp_path / "a") as mine:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with common.whole_file(tmp_path / "a") as other:
            assert mine != other
            other.write_text("other")
        mine.write_text("mine")
    assert (tmp_path / "a").read_text() == "mine"


# ---- what is not ours in a folder that is replaced -----------------------------------------------


def refuse_other(number, folder):
    """Ask 03 or 05 whether it may replace a folder, with --overwrite -> Run."""
    function = "refuse_other_run" if number == "03" else "refuse_other_table"
    script = load_script(number)
    args = arguments(None, overwrite=True, **dict.fromkeys(script.get("TABLE_FLAGS", ())))
    return run_function(script[function], args, folder, {})


@pytest.fixture(params=["03", "05"])
def number(request, monkeypatch):
    """Of a script that replaces the folder of an earlier run."""
    monkeypatch.setattr(common, "refuse_other_result", lambda *_, **__: None)
    return request.param


def test_a_note_in_the_folder_of_a_run_is_not_replaced(number, tmp_path):
    for name in ("result.json", "table.json", "my notes.txt"):
        (tmp_path / name).write_text("mine")
    check_refusal(refuse_other(number, tmp_path), "move it away")
    assert (tmp_path / "my notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}], ids=["a list", "another's"])
def test_a_foreign_model_goes_only_by_overwrite(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    args = arguments(None, overwrite=False, command="python 03_unlearn.py")
    refuse = load_script("03")["refuse_other_run"]
    check_refusal(run_function(refuse, args, tmp_path, {}), "model.pt", "03_unlearn.py --overwrite")
    args.overwrite = True
    check_success(run_function(refuse, args, tmp_path, {}))


def test_the_files_of_a_run_may_be_replaced(number, tmp_path):
    check_success(refuse_other(number, tmp_path / "absent"))
    names_of = {"03": "model.pt result.json log.jsonl curves.png before_after.png .DS_Store"}
    names_of["05"] = "table.json pictures.png curve.png"
    for name in names_of[number].split():
        (tmp_path / name).write_text("a run's")
    check_success(refuse_other(number, tmp_path))


# ---- pipes, sockets, devices and links to nothing ------------------------------------------------


def make_pipe(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def make_socket(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFSOCK | 0o600)


def make_link_to_nothing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("nowhere")


def make_link_to_a_device(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/zero")


NO_FILES = {
    "pipe": (make_pipe, "a pipe"),
    "socket": (make_socket, "a socket"),
    "device": (make_link_to_a_device, "a device"),
    "link": (make_link_to_nothing, "a link to nowhere"),
}


@pytest.fixture
def alarm():
    """Whoever waits for a pipe is woken up after a minute, and the test fails."""

    def wake_up(signum, frame):
        raise TimeoutError("it waits for a pipe")

    old_handler = signal.signal(signal.SIGALRM, wake_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old_handler)


def read_with_lock(path):
    with common.locked(path.with_name(path.name.removeprefix(".").removesuffix(".lock"))):
        pass


def read_samplers_file(path):
    import benchmark

    benchmark.read_samplers_file(argparse.Namespace(samplers_file=path))


def read_checkpoint(path):
    common.load_checkpoint(path, "the command")


def read_command(path):
    common.run_command(arguments(path.parent), path.with_name("model.pt"), ["3"])


def read_images(path):
    """Read the data set in whose folder the file lies; the name of the file says which it is."""
    name = "fashion_mnist" if path.name.endswith("-ubyte") else "mnist"
    root = path.parent
    for part in ("raw", "FashionMNIST", "cifar-10-batches-py"):
        if root.name == part:
            root = root.parent
    if path.name == "data_batch_1":
        name = "cifar10"
    common.load_dataset(name, root, not path.name.startswith("t10k"))


READERS = {
    "a.pt": read_checkpoint,
    "written": common.refuse_unwritable,
    "mask.png": load_script("05")["read_grey"],
    "weights of CLIP": load_script("05")["load_clip"],
    "mnist.npz": read_images,
    "t10k-labels-idx1-ubyte": read_images,
    "FashionMNIST/raw/train-images-idx3-ubyte": read_images,
    "cifar-10-batches-py/data_batch_1": read_images,
    "ort/log.jsonl": load_script("03")["read_log"],
    "ort/command.txt": read_command,
    ".a.pt.lock": read_with_lock,
    "samplers.json": read_samplers_file,
}
CASES = set(itertools.product(READERS, NO_FILES))
CASES -= {("ort/command.txt", "link")}  # there are other ways to find the command


@pytest.mark.parametrize("name, kind", sorted(CASES))
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, alarm, kind, name):
    path = tmp_path / name
    make, _ = NO_FILES[kind]
    make(path)
    if name.startswith("t10k-labels"):
        images = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 7])
        path.with_name("t10k-images-idx3-ubyte").write_bytes(images)
    before = path.lstat()
    check_refusal(run_function(READERS[name], path), path.name)
    assert path.lstat().st_ino == before.st_ino, "it was replaced"


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_lies_in_the_place_of_a_checkpoint_is_said(tmp_path, alarm, kind):
    make, words = NO_FILES[kind]
    make(tmp_path / "a.pt")
    words = words.removeprefix("a ") if kind != "link" else words
    check_refusal(run_function(common.load_checkpoint, tmp_path / "a.pt", "the command"), words)


FLAGS_OF_02 = {"begin": (), "overwrite": ("--overwrite",), "resume": ("--resume",)}


@pytest.mark.parametrize("flags", FLAGS_OF_02.values(), ids=FLAGS_OF_02)
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_02_leaves_what_is_no_file_in_the_place_of_its_base(tmp_path, alarm, kind, flags):
    path = quick(tmp_path) / "mnist/base.pt"
    make, words = NO_FILES[kind]
    make(path)
    run = run_script("02", *QUICK, "--steps", 1, "--width", 8, *flags, "--out", tmp_path)
    check_refusal(run, str(path), words.removeprefix("a "))
    assert not path.is_file()


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_kept_result_that_is_no_file_is_none(tmp_path, alarm, kind):
    make, _ = NO_FILES[kind]
    make(tmp_path / "x.pt")
    assert load_script("04")["read_cache"](tmp_path / "x.pt", {}) is None


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_decoded_pictures_that_are_no_files_are_none(tmp_path, alarm, kind, suffix):
    np.save(tmp_path / "a.npy", np.zeros(3))
    np.savez(tmp_path / "a.npz", labels=np.zeros(3), classes=["a"], source="", checksum=0)
    path = tmp_path / f"a{suffix}"
    path.unlink()
    make, _ = NO_FILES[kind]
    make(path)
    assert common._first_cached([tmp_path / "a.npy"], "") is None


def test_a_pipe_that_looks_like_a_lock_is_no_leftover(tmp_path, alarm):
    make_pipe(tmp_path / ".a.lock")
    common.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".a.lock"]


@pytest.mark.parametrize("number", ["04", "05"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_model_that_is_no_file_is_not_passed_over(tmp_path, small_base, alarm, number, kind):
    path = quick(tmp_path) / "mnist/forget-3/ort-vp/model.pt"
    make, words = NO_FILES[kind]
    make(path)
    run = run_script(number, *QUICK, "--forget", 3, "--out", tmp_path)
    check_refusal(run, str(path), words.removeprefix("a "))


def test_a_link_to_a_run_that_is_gone_is_not_passed_over(tmp_path):
    make_link_to_nothing(tmp_path / "mnist/forget-3/ort-vp")
    run = run_function(common.find_runs, arguments(tmp_path), ["3"])
    check_refusal(run, "ort-vp is a link to nowhere")


@pytest.mark.parametrize("name", ["base.pt", "judge.pt"])
def test_a_link_to_nothing_is_not_taken_for_an_absent_file(tmp_path, alarm, name):
    """The shipped file does not stand in for it, and no judge is trained in its place."""
    make_link_to_nothing(tmp_path / "mnist" / name)
    args = arguments(tmp_path)
    if name == "base.pt":
        run = run_function(lambda: common.load_net(*common.find_base(args)))
    else:
        run = run_function(common.load_judge, args, common.load_dataset("mnist"))
    check_refusal(run, name, "a link to nowhere")


# ---- JSON ----------------------------------------------------------------------------------------


NOT_FINITE = {
    "nan": math.nan,
    "rows": [{"fd": math.inf, "n": 3}, (1.5, -math.inf)],
    "name": "NaN",
    "yes": True,
}
FINITE = {"nan": None, "rows": [{"fd": None, "n": 3}, [1.5, None]], "name": "NaN", "yes": True}


def test_write_json_writes_null_for_what_is_not_finite(tmp_path):
    common.write_json(tmp_path / "a.json", NOT_FINITE)
    assert read_json(tmp_path / "a.json") == FINITE


def test_json_line_is_one_line_with_null_for_what_is_not_finite():
    line = common.json_line(NOT_FINITE)
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert parse_json(line) == FINITE


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    common.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        common.write_json(path, {"new": torch.zeros(1)})
    assert read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def read_all_json(folder):
    """Parse every .json and .jsonl below a folder strictly -> {name: content}."""
    result = {}
    for path in folder.rglob("*.json"):
        result[path.name] = read_json(path)
    for path in folder.rglob("*.jsonl"):
        result[path.name] = [parse_json(line) for line in path.read_text().splitlines()]
    return result


@pytest.fixture
def broken_measures(monkeypatch):
    """Distances are infinite and ratios NaN, as those of a model that has broken down can be."""
    measure = common.measure

    def measure_nothing(*args):
        return {**measure(*args), "class_min_ratio": math.nan}

    monkeypatch.setattr(common, "measure", measure_nothing)
    monkeypatch.setattr(common, "frechet_distance", lambda *_: math.inf)


@pytest.fixture
def broken_losses(monkeypatch):
    """The loss of D_g is infinite. Its gradient is not, so training goes on."""
    dsm_loss = common.dsm_loss

    def infinite_loss(*args, **more):
        return dsm_loss(*args, **more) + math.inf

    monkeypatch.setattr(common, "dsm_loss", infinite_loss)


def test_every_script_writes_strict_json(tmp_path, small_base, broken_measures, broken_losses):
    out = ("--out", tmp_path)
    forget = ("--forget", 3, *out)
    training = ("--steps", 2, "--batch-size", 8)
    check_success(run_script("02", *QUICK, *training, "--width", 8, "--without", 3, *out))
    check_success(run_script("03", *QUICK, *training, "--n", 10, "--method", "ort", *forget))
    check_success(run_script("04", *QUICK, "--n", 20, "--nll", "none", *forget))
    check_success(run_script("05", *QUICK, "--n", 3, "--steps", 2, *forget))
    found = read_all_json(tmp_path)
    assert set(found) == {"log.jsonl", "result.json", "table.json"}
    assert found["result.json"]["fd_after"] is None
    assert found["result.json"]["class_min_ratio"] is None
    lines = read_all_json(only_run(tmp_path))["log.jsonl"]
    assert {line["loss_g"] for line in lines} == {None}


# ---- the tests themselves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "a").write_text("x"),
        lambda folder: (folder / "b").mkdir(),
        lambda folder: (folder / "c").unlink(missing_ok=True),
        lambda folder: common.save_checkpoint(folder / "d.pt", arch=1),
    ],
    ids=["write", "make a folder", "remove", "save_checkpoint"],
)
def test_a_test_that_writes_elsewhere_is_noticed(tmp_path, monkeypatch, write):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.setattr(watch, "folder", inside)
    monkeypatch.setattr(watch, "found", [])
    write(inside)
    assert watch.found == []
    write(tmp_path)
    assert len(watch.found) > 0


def test_temporary_files_of_other_programs_are_below_tmp_path(tmp_path):
    code = "import tempfile; print(tempfile.gettempdir())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in map(str, tmp_path.parents)
