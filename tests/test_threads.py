"""How many cores a run takes, and types that a device lacks."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import common


@pytest.fixture
def machine(monkeypatch):
    """machine(cores, quotas) makes a machine of it -> the number of threads that a run takes."""
    before = torch.get_num_threads()

    def threads(cores, quotas=()):
        monkeypatch.setattr(common.os, "cpu_count", lambda: cores)
        monkeypatch.setattr(common.os, "sched_getaffinity", lambda _: range(cores), raising=False)
        monkeypatch.setattr(common.os, "process_cpu_count", lambda: cores, raising=False)
        monkeypatch.setattr(common, "cpu_quotas", lambda: list(quotas))
        common.use_all_cores()
        return torch.get_num_threads()

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield threads
    torch.set_num_threads(before)


def test_all_cores_are_taken(machine):
    assert machine(3) == 3


@pytest.mark.parametrize("value, expected", [("1", 1), ("2,4", 2), ("9", 3), ("", 3), ("x", 3)])
def test_omp_num_threads_is_a_limit(machine, monkeypatch, value, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert machine(3) == expected


@pytest.mark.parametrize("name", ["OMP_THREAD_LIMIT", "MKL_NUM_THREADS"])
def test_other_variables_are_limits_too(machine, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert machine(3) == 2


def test_a_quota_is_a_limit(machine):
    assert machine(4, quotas=[3, 2]) == 2


def test_processes_share_what_there_is(machine, monkeypatch):
    monkeypatch.setattr(common, "ranks", lambda: (0, 2))
    assert machine(4) == 2
    assert machine(1) == 1


def test_a_process_count_is_a_limit(monkeypatch):
    """PYTHON_CPU_COUNT, or -X cpu_count."""
    monkeypatch.setattr(common.os, "process_cpu_count", lambda: 1, raising=False)
    assert common.allowed_cores() == 1


def test_the_affinity_is_a_limit(monkeypatch):
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert common.allowed_cores() == 1


QUOTAS = {
    "version 2": ({"cpu.max": "200000 100000"}, "0::/\n", [2]),
    "a part of a core": ({"cpu.max": "50000 100000"}, "0::/\n", [1]),
    "no limit": ({"cpu.max": "max 100000"}, "0::/\n", []),
    "of the job": ({"job/cpu.max": "300000 100000"}, "0::/job\n", [3]),
    "around the job": ({"user/cpu.max": "300000 100000"}, "0::/user/job\n", [3]),
    "of another job": ({"other/cpu.max": "300000 100000"}, "0::/job\n", []),
    "version 1": (
        {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        "4:cpu:/\n",
        [2],
    ),
    "version 1, no limit": (
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        "4:cpu:/\n",
        [],
    ),
    "version 1, of the job": (
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "4000", "cpu,cpuacct/a/cpu.cfs_period_us": "1000"},
        "4:cpu,cpuacct:/a\n",
        [4],
    ),
    "nothing": ({}, "no such lines", []),
}


@pytest.mark.parametrize("files, own, expected", QUOTAS.values(), ids=QUOTAS)
def test_quotas_of_linux_are_read(tmp_path, files, own, expected):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    assert common.cpu_quotas(tmp_path / "cgroup", tmp_path / "own") == expected


def test_no_quotas_without_linux(tmp_path):
    assert common.cpu_quotas(tmp_path / "absent", tmp_path / "absent") == []


# ---- a device without float64 --------------------------------------------------------------------


class NoDoubleOnMeta(TorchFunctionMode):
    """Like mps, the device "meta" takes no float64 here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            assert result.dtype != torch.float64, f"{function} gives float64"
        return result


def test_ddpm_needs_no_float64_on_its_device(monkeypatch):
    monkeypatch.setattr(common, "finest_type", lambda device: torch.float32)
    sde = common.DDPM()
    with NoDoubleOnMeta():
        t = torch.rand(5, device="meta")
        assert sde.s(t).dtype == torch.float32
        assert sde.std(t).dtype == torch.float32
        assert sde.time_of(t).dtype == torch.float32


def test_mps_alone_lacks_float64():
    assert common.finest_type("mps") == torch.float32
    assert common.finest_type("cpu") == torch.float64
    assert common.finest_type("cuda:1") == torch.float64


def test_ddpm_finds_the_same_level_in_float32(monkeypatch):
    sde = common.DDPM()
    sigma = torch.logspace(-2, 2, 200)
    want = sde.time_of(sigma)
    monkeypatch.setattr(common, "finest_type", lambda device: torch.float32)
    assert (sde.time_of(sigma) - want).abs().max() <= 0.0011  # at most one level of 1000
