"""Shared by all tests: import path, two oracles, and a way to call a script as the command line does."""
import argparse
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MPLBACKEND", "Agg")
# pytest -n: each worker, and each process that it starts, keeps to one core.  PyTorch's threads spin while they wait, so two programs
# with two threads each on two cores take many times as long as one after the other.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")).startswith("gw") and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})
    torch.set_num_threads(1)

import common as c  # after the path is set

SCRIPTS = {s.name[:2]: s for s in sorted(ROOT.glob("0*_*.py"))}


def load_script(number):
    """The names defined in a numbered script, without running its main."""
    return runpy.run_path(str(SCRIPTS[number]))


def arguments(out, **more):
    """What load_judge reads of a script's arguments."""
    return argparse.Namespace(**dict(dataset="mnist", out=out, data_dir=None, quick=False, device="cpu") | more)


@pytest.fixture
def script(monkeypatch, capsys):
    """script("03", "--forget", "3") -> (exit status, stdout, stderr); runs main(argv) in this process."""

    def call(number, *argv):
        status = 0
        try:
            load_script(number)["main"]([str(a) for a in argv])
        except SystemExit as e:
            status = e.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def small_base(tmp_path):
    """A Standard model of a ninth of the shipped one's work, with random weights, where the scripts look first."""
    arch = torch.load(c.HERE / "data/mnist_base.pt", weights_only=True)["arch"] | dict(width=16)
    torch.manual_seed(0)
    (path := tmp_path / "mnist/base.pt").parent.mkdir()
    c.save_checkpoint(path, arch=arch, ema=c.UNet(**arch).state_dict())
    return path


@pytest.fixture(scope="session")
def toy():
    """The names of 01_gaussian_toy.py: exact scores of Gaussian mixtures, the authority of the tests."""
    return load_script("01")


@pytest.fixture
def gaussian():
    """A correlated 2-D Gaussian in float64, as an exact network.  Correlated, or errors of the trace would not show."""
    mean = torch.tensor([[0.4, -0.7]], dtype=torch.float64)
    cov = torch.tensor([[[1.0, 0.55], [0.55, 0.5]]], dtype=torch.float64)
    return c.GaussianMixture(mean, cov, torch.ones(1, dtype=torch.float64), sd=0.8)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs only with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [i for i in items if "slow" in i.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [i for i in items if i not in slow]
