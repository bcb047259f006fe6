"""The benchmark itself: score_sde's recipe against exact densities, the choice of a sampler, and both commands."""
import argparse
import json
import runpy

import pytest
import torch
from conftest import ROOT

import common as c

KEYS = "likelihood_speedup likelihood_abs_diff sampler_speedup sampler_fd_pc sampler_fd_fast sampler_n gemm_share".split()


@pytest.fixture(scope="module")
def benchmark():
    return argparse.Namespace(**runpy.run_path(str(ROOT / "tests/benchmark.py")))


def test_the_score_sde_recipe_is_right(benchmark, gaussian):
    """Mean over many probes of one point against the exact density, and image by image against ours with the same probe."""
    x = gaussian.sample(1, c.rng(0)).expand(256, 2).contiguous()
    probe, sde = c.rademacher_probes(x, 1, c.rng(1))[0], c.VP()
    t = torch.tensor([1e-5], dtype=torch.float64)
    theirs, calls = benchmark.score_sde_likelihood(gaussian, sde, x, probe)
    exact = gaussian.log_prob(x[:1] / sde.s(t), sde.sigma(t)) - 2 * sde.s(t).log()
    assert calls > 30 and theirs.std() > 1e-3 and abs(theirs.mean() - exact) < 4 * theirs.std() / 16 + 2e-3
    ours = c.ode_log_likelihood(gaussian, sde, x, [probe], steps=60, sigma_min=sde.sigma(t).item())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)


def test_the_cheapest_sampler_within_the_spread_is_chosen(benchmark):
    row = lambda nfe, *fd: dict(nfe=nfe, fd=fd)
    rows = dict(pc=row(2001, 0.5, 0.6), bad=row(10, 0.9, 0.9), good=row(15, 0.62, 0.64), better=row(15, 0.6, 0.6), best=row(30, 0.3, 0.3))
    assert benchmark.choose(rows) == ("better", True)
    assert benchmark.choose(dict(pc=rows["pc"], bad=rows["bad"], good=row(15, 0.7, 0.7))) == ("good", False)


def test_names_say_how_many_evaluations_are_made(benchmark):
    """The noise-free part of each claim: counted on a network."""
    args = argparse.Namespace(budgets=(6, 9), pc_steps=4)
    for name, (nfe, run) in benchmark.samplers(args).items():
        calls = []
        net = c.ExactNet(lambda x, sigma: calls.append(1) or x / (1 + c.bcast(sigma, x) ** 2).sqrt(), 0.5)
        assert run(net, torch.randn(2, 1, 4, 4, generator=c.rng(0)), c.rng(1)).shape == (2, 1, 4, 4)
        assert len(calls) == nfe and (name == "pc" or name.endswith(f"-{nfe}"))


def run(benchmark, *argv):
    try:
        benchmark.main([str(a) for a in argv])
    except SystemExit as e:
        return e.code
    return 0


def test_both_commands(benchmark, tmp_path, monkeypatch):
    """--samplers keeps its parts, --json reads its table and writes every key."""
    table, report = tmp_path / "samplers.json", tmp_path / "speed.json"
    argv = ("--quick", "--samplers-file", table, "--out", tmp_path / "out")
    assert run(benchmark, *argv, "--samplers", "--json", report) == 0
    content, result = json.loads(table.read_text()), json.loads(report.read_text())
    assert content["n"] == 20 and content["chosen"] in content["samplers"] and all(len(row["fd"]) == 2 for row in content["samplers"].values())
    assert all(result[key] > 0 for key in KEYS) and result["sampler_n"] == 20 and result["sampler"]["chosen"] == content["chosen"]
    pc = content["samplers"]["pc"]["fd"]
    assert result["sampler_fd_pc"] == pytest.approx(sum(pc) / 2) and result["likelihood_abs_diff"] < 0.05
    assert result["gemm_share"] < 4  # 1 at most on a quiet machine; here another test may run while the matrix product is timed
    monkeypatch.setattr(c, "dpmpp_sample", None), monkeypatch.setattr(c, "pc_sample", None), monkeypatch.setattr(c, "ode_sample", None)
    assert run(benchmark, *argv, "--samplers") == 0 and json.loads(table.read_text()) == content


@pytest.mark.parametrize("argv, word", [((), "--samplers"), (("--json", "x.json", "--samplers-file", "nowhere.json"), "python tests/benchmark.py --samplers")])
def test_bad_input_is_one_line(benchmark, tmp_path, capsys, monkeypatch, argv, word):
    monkeypatch.chdir(tmp_path)
    assert run(benchmark, *argv, "--quick", "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err and not (tmp_path / "x.json").exists()
