"""What all tests share: the import path, ways to run a script, a small model, and two oracles."""

import argparse
import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image, ImageSequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # only now: the line above says where it is

ROOT = common.HERE
SCRIPTS = {path.name[:2]: path for path in sorted(ROOT.glob("0*_*.py"))}


# ---- running a script ----------------------------------------------------------------------------


class Run(NamedTuple):
    """How a run of a script has ended."""

    status: int  # the exit status; 0 is success
    out: str  # all that it printed on stdout
    err: str  # all that it printed on stderr


def load_script(number):
    """The names that a numbered script defines, as a dict; its main does not run."""
    return runpy.run_path(str(SCRIPTS[number]))


def run_function(function, *args):
    """Call a function that may end the program, and catch what it prints -> Run."""
    status = 0
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            function(*args)
        except SystemExit as stop:
            status = stop.code or 0
    return Run(status, out.getvalue(), err.getvalue())


def run_script(number, *argv):
    """Call main(argv) of a numbered script in this process -> Run."""
    main = load_script(number)["main"]
    return run_function(main, [str(value) for value in argv])


def run_patched(patches, *argv):
    """Run main(argv) of 03 with some of its names replaced -> Run."""
    main = load_script("03")["main"]
    main.__globals__.update(patches)
    return run_function(main, [str(value) for value in argv])


class Crash(Exception):
    """What ends a run in the middle."""


def crash_in_training(monkeypatch, step, *argv):
    """Run 03 until an exception in this step, counted from 1; it saves after every step."""
    guarded_step = common.guarded_step
    count = 0

    def step_or_crash(*args):
        nonlocal count
        count += 1
        if count == step:
            raise Crash
        return guarded_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(common, "guarded_step", step_or_crash)
        with pytest.raises(Crash):
            run_patched({"SAVE_SECONDS": -1}, *argv)


def run_process(*command, **options):
    """Run a Python file with its arguments as a process of its own -> Run."""
    argv = [sys.executable, *map(str, command)]
    done = subprocess.run(argv, capture_output=True, text=True, **options)
    return Run(done.returncode, done.stdout, done.stderr)


def check_success(run):
    """Fail with the end of stderr if a run did not succeed."""
    assert run.status == 0, run.err[-2000:]


def check_refusal(run, *words):
    """Bad input ends with status 2 and one line that holds all `words`, never with a traceback."""
    assert run.status == 2, f"exit status {run.status} instead of 2: {run.err[-2000:]}"
    assert run.err.startswith("error: "), run.err
    assert run.err.count("\n") == 1, f"more than one line: {run.err}"
    for word in words:
        assert word in run.err, f"{word!r} is not in: {run.err}"


@pytest.fixture
def script():
    """The function script("03", "--forget", "3") -> Run; it runs main(argv) in this process."""
    return run_script


# ---- arguments, models and weights ---------------------------------------------------------------


def arguments(out, **changes):
    """The arguments of a script that load_judge reads, with those changed that are given."""
    values = {"dataset": "mnist", "out": out, "quick": False, "device": "cpu"}
    values |= {"data_dir": None, "cache_dir": None}
    return argparse.Namespace(**{**values, **changes})


def quick(out):
    """The folder in which a run with --quick and --out `out` reads and writes."""
    return out / "quick"


def only_run(out, dataset="mnist"):
    """The folder of the one run of 03 that there is with --quick and --out `out`."""
    (path,) = quick(out).glob(f"{dataset}/forget-*/[!.]*/result.json")
    return path.parent


def write_small_base(out):
    """Save a Standard model with random weights where --quick looks first -> its path.

    One evaluation of it takes a ninth of the shipped model's work.
    """
    shipped = torch.load(common.HERE / "data/mnist_base.pt", weights_only=True)
    arch = {**shipped["arch"], "width": 16}
    torch.manual_seed(0)
    path = quick(out) / "mnist/base.pt"
    path.parent.mkdir(parents=True)
    common.save_checkpoint(path, arch=arch, ema=common.UNet(**arch).state_dict())
    return path


@pytest.fixture
def small_base(tmp_path):
    """The path of a small Standard model with random weights, for --quick --out tmp_path."""
    return write_small_base(tmp_path)


def load_weights(path, key="ema"):
    """The weights that a checkpoint holds under `key`: the average, or "model" for the raw ones."""
    return torch.load(path, weights_only=True)[key]


def same_weights(a, b):
    """Whether two state dicts agree to the bit."""
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- JSON ----------------------------------------------------------------------------------------


def refuse_constant(word):
    """What a strict reader of JSON does when it meets NaN or Infinity."""
    raise ValueError(f"{word} is not JSON")


def parse_json(text):
    """Parse JSON as strictly as other languages do: Python alone knows NaN and Infinity."""
    return json.loads(text, parse_constant=refuse_constant)


def read_animation(path):
    """The pictures of a GIF as bytes, and how many seconds each stands; it has to begin again."""
    pictures = []
    seconds = []
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0
        for frame in ImageSequence.Iterator(animation):
            pictures.append(frame.convert("RGB").tobytes())
            seconds.append(frame.info["duration"] / 1000)
    return pictures, seconds


def read_json(path):
    """The content of a JSON file, read strictly."""
    return parse_json(path.read_text())


# ---- oracles -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def toy():
    """The names of 01_gaussian_toy.py: exact scores of mixtures, the authority of the tests."""
    return load_script("01")


@pytest.fixture
def gaussian():
    """A correlated 2-D Gaussian in float64, as an exact network.

    It is correlated on purpose: with independent coordinates, errors of a trace would not show.
    """
    mean = torch.tensor([[0.4, -0.7]], dtype=torch.float64)
    cov = torch.tensor([[[1.0, 0.55], [0.55, 0.5]]], dtype=torch.float64)
    return common.GaussianMixture(mean, cov, torch.ones(1, dtype=torch.float64), sd=0.8)


# ---- no test writes outside its folder -----------------------------------------------------------

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# The other events that change a disk -> which of their arguments are paths that change.
CHANGES = dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"), (0,))
CHANGES |= {"os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,)}
# What Python, pytest and matplotlib keep for themselves, and what is no file on a disk.
ELSEWHERE = ("__pycache__", ".pytest_cache", "matplotlib", "/dev/", "/proc/")


class WriteWatch:
    """It notes each file that Python opens for writing, makes or removes outside of one folder."""

    def __init__(self):
        self.folder = None  # where everything may be written; None: nothing is watched
        self.found = []  # what was written elsewhere

    def hear(self, event, arguments):
        """Python calls this at each event that it can be asked to report (sys.addaudithook)."""
        if self.folder is None:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self.note(event, arguments[0])
        # A name within an open folder, as shutil.rmtree uses them, says nothing without the folder.
        elif event in CHANGES and not is_within_open_folder(event, arguments):
            for i in CHANGES[event]:
                self.note(event, arguments[i])

    def note(self, event, path):
        """Note one path, unless it is a place where a test may write."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # the number of a file that is open already
        name = os.path.abspath(os.fsdecode(path))
        is_allowed = Path(name).is_relative_to(self.folder)
        if not is_allowed and not any(part in name for part in ELSEWHERE):
            self.found.append(f"{event} {name}")


def is_within_open_folder(event, arguments):
    """Whether the path of os.remove or os.rmdir counts from an open folder, not from the root."""
    return event in ("os.remove", "os.rmdir") and arguments[1] != -1


watch = WriteWatch()
sys.addaudithook(watch.hear)  # for good: Python cannot take it back


@pytest.fixture(scope="session", autouse=True)
def folder_of_all_tests(tmp_path_factory):
    """The folder that holds every tmp_path; temporary files of other programs go there too."""
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))  # for the processes that tests start
        patch.setattr(tempfile, "tempdir", str(folder))
        # PyTorch leaves its choice here, also for a pytest that a test starts (exercise.py).
        patch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        # One higher: pytest itself clears away what earlier runs have left there.
        watch.folder = folder.parent
        yield folder
        watch.folder = None


@pytest.fixture(autouse=True)
def write_nowhere_else(folder_of_all_tests):
    """Fail a test that has written outside of tmp_path."""
    watch.found.clear()
    yield
    assert watch.found == [], "written outside of tmp_path"


# ---- pytest itself -------------------------------------------------------------------------------


def pin_worker_to_one_core():
    """Keep a worker of `pytest -n`, and each process that it starts, to one core.

    PyTorch's threads spin while they wait. Two programs with two threads each on two cores take
    many times as long as one program after the other.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker.startswith("gw") or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    number = int(worker.removeprefix("gw"))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go to files, no screen is needed
    pin_worker_to_one_core()
    config.addinivalue_line("markers", "slow: takes minutes; runs only with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]
