"""tests/benchmark.py: score_sde's recipe, the choice of a sampler, both commands; and shapes.py."""

import argparse
import runpy
from collections import Counter

import pytest
import torch
from conftest import ROOT, read_json
from PIL import Image

import common

KEYS = (
    "likelihood_speedup",
    "likelihood_abs_diff",
    "sampler_speedup",
    "sampler_speedup_euler_maruyama",
    "sampler_fd_pc",
    "sampler_fd_euler_maruyama",
    "sampler_fd_fast",
    "sampler_n",
    "gemm_share",
)


@pytest.fixture(scope="module")
def benchmark():
    return argparse.Namespace(**runpy.run_path(str(ROOT / "tests/benchmark.py")))


# ---- likelihood ----------------------------------------------------------------------------------


def test_the_score_sde_recipe_is_right(benchmark, gaussian):
    """One point with many probes: their mean against the exact density, each one against ours."""
    x = gaussian.sample(1, common.rng(0)).expand(256, 2).contiguous()
    probe = common.rademacher_probes(x, 1, common.rng(1))[0]
    sde = common.VP()
    t = torch.tensor([1e-5], dtype=torch.float64)

    theirs, num_calls = benchmark.score_sde_likelihood(gaussian, sde, x, probe)
    # x is x_t: its density is that of x/s at noise sigma, divided by s^2 in two dimensions.
    exact = gaussian.log_prob(x[:1] / sde.s(t), sde.sigma(t)) - 2 * sde.s(t).log()
    assert num_calls > 30
    assert theirs.std() > 1e-3, "the probes differ, so their estimates have to"
    assert abs(theirs.mean() - exact) < 4 * theirs.std() / 16 + 2e-3

    ours = common.ode_log_likelihood(
        gaussian, sde, x, [probe], steps=60, sigma_min=sde.sigma(t).item()
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)


# ---- samplers ------------------------------------------------------------------------------------

# The better yardstick has mean 0.55 and seeds 0.1 apart: 0.65 is good enough.
YARDSTICKS = {
    "euler-maruyama": {"nfe": 1001, "fd": (0.1, 1.4)},
    "pc": {"nfe": 2001, "fd": (0.5, 0.6)},
}


def test_the_cheapest_sampler_within_the_spread_is_chosen(benchmark):
    rows = {
        **YARDSTICKS,
        "bad": {"nfe": 10, "fd": (0.9, 0.9)},
        "good": {"nfe": 15, "fd": (0.62, 0.64)},
        "better": {"nfe": 15, "fd": (0.6, 0.6)},
        "best": {"nfe": 30, "fd": (0.3, 0.3)},
    }
    assert benchmark.choose(rows) == ("better", True)


def test_the_best_sampler_is_chosen_where_none_is_good_enough(benchmark):
    rows = {
        **YARDSTICKS,
        "bad": {"nfe": 10, "fd": (0.9, 0.9)},
        "good": {"nfe": 15, "fd": (0.7, 0.7)},
    }
    assert benchmark.choose(rows) == ("good", False)


def test_names_say_how_many_evaluations_are_made(benchmark):
    """The part of each claim that has no noise: calls, counted on a network."""
    args = argparse.Namespace(budgets=(6, 9), pc_steps=4)
    for name, sampler in benchmark.samplers(args).items():
        calls = []

        def z_hat(x_hat, sigma, calls=calls):
            """The exact answer for data from N(0, I)."""
            calls.append(1)
            return x_hat / (1 + common.expand_like(sigma, x_hat) ** 2).sqrt()

        net = common.ExactNet(z_hat, 0.5)
        noise = torch.randn(2, 1, 4, 4, generator=common.rng(0))
        assert sampler.run(net, noise, common.rng(1)).shape == (2, 1, 4, 4), name
        assert len(calls) == sampler.nfe, name
        assert name in YARDSTICKS or name.endswith(f"-{sampler.nfe}"), name


@pytest.mark.parametrize("better, chosen", [("pc", "good"), ("euler-maruyama", "best")])
def test_the_better_yardstick_is_the_bar(benchmark, better, chosen):
    rows = {
        **YARDSTICKS,
        "good": {"nfe": 15, "fd": (0.6, 0.6)},
        "best": {"nfe": 30, "fd": (0.3, 0.3)},
        better: {"nfe": 1001, "fd": (0.3, 0.3) if better == "euler-maruyama" else (0.5, 0.6)},
    }
    assert benchmark.choose(rows) == (chosen, True)


@pytest.mark.parametrize(
    "name, predictor, corrector",
    [
        ("euler-maruyama", "euler_maruyama", None),
        ("pc", "reverse_diffusion", "langevin"),
    ],
)
def test_the_yardsticks_are_score_sdes(benchmark, gaussian, name, predictor, corrector):
    """Their configurations for VP and for VE, from the same x_T and the same noise."""
    sde = common.VP()
    noise = torch.randn(50, 2, generator=common.rng(0))
    args = argparse.Namespace(budgets=(), pc_steps=20)
    sampler = benchmark.samplers(args)[name]
    ours = sampler.run(gaussian, noise, common.rng(1))
    x_T = noise * sde.std(torch.ones(1))
    expected = common.pc_sample(
        gaussian, sde, x_T, 20, predictor, corrector, generator=common.rng(1)
    )
    torch.testing.assert_close(ours, expected)


def test_edms_own_steps_are_never_chosen(benchmark):
    """They stand beside ours to be compared."""
    rows = {
        **YARDSTICKS,
        "edm-9": {"nfe": 9, "fd": (0.1, 0.1)},
        "good": {"nfe": 15, "fd": (0.62, 0.64)},
    }
    assert benchmark.choose(rows) == ("good", True)


@pytest.mark.parametrize("num_nodes", [2, 5])
def test_edms_steps_and_ours_end_at_the_same_image(benchmark, gaussian, num_nodes):
    """The same method, written down twice."""
    noise = torch.randn(50, 2, generator=common.rng(0), dtype=torch.float64)
    ours = benchmark.heun_sampler(num_nodes).run(gaussian, noise, None)
    edm = benchmark.edm_sampler(num_nodes).run(gaussian, noise, None)
    # The noise levels are float32, and so are the angles that the network gets.
    torch.testing.assert_close(ours, edm, rtol=1e-4, atol=1e-4)


# ---- both commands -------------------------------------------------------------------------------


def run(benchmark, *argv):
    """The exit status of benchmark.main(argv)."""
    try:
        benchmark.main([str(value) for value in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def test_both_commands(benchmark, tmp_path, monkeypatch):
    """--samplers keeps what it has drawn, --json reads its table and writes every key.

    One test, because a fixture of this length would run once in each process of pytest -n.
    """
    table = tmp_path / "samplers.json"
    report = tmp_path / "speed.json"
    argv = ("--quick", "--samplers-file", table, "--out", tmp_path / "out")
    assert run(benchmark, *argv, "--samplers", "--json", report) == 0
    content = read_json(table)
    check_samplers_file(content)
    check_report(read_json(report), content)

    for name in ("dpmpp_sample", "pc_sample", "ode_sample"):
        monkeypatch.setattr(common, name, None)  # what is there is not drawn again
    assert run(benchmark, *argv, "--samplers") == 0
    check_same_samplers(read_json(table), content)


def check_samplers_file(content):
    assert content["n"] == 20
    assert content["chosen"] in content["samplers"]
    for name, row in content["samplers"].items():
        assert len(row["fd"]) == 2, f"{name} needs one FD a seed"


def check_report(result, content):
    """The report of --json; `content` is the table of samplers that it has read."""
    for key in KEYS:
        assert result[key] > 0, key
    assert result["sampler_n"] == 20
    assert result["sampler"]["chosen"] == content["chosen"]
    for name, key in (("pc", "sampler_fd_pc"), ("euler-maruyama", "sampler_fd_euler_maruyama")):
        fd = content["samplers"][name]["fd"]
        assert result[key] == pytest.approx(sum(fd) / 2)
    assert result["likelihood_abs_diff"] < 0.05, "the two likelihoods do not agree"
    # 1 at most on a quiet machine; here another test may run while the matrix product is timed.
    assert result["gemm_share"] < 4


def check_same_samplers(again, content):
    """A second run has to give the same table."""
    for name, row in content["samplers"].items():
        # Not ==: the covariance of 20 images is singular, and a rounding error of 1e-15 in its zero
        # eigenvalues enters FD by its root.
        assert again["samplers"][name]["fd"] == pytest.approx(row["fd"], rel=1e-6), name
        assert again["samplers"][name]["nfe"] == row["nfe"], name
    assert again["real"] == pytest.approx(content["real"], rel=1e-6)
    for key in ("n", "pc_steps", "chosen", "reaches_bar"):
        assert again[key] == content[key], key


@pytest.mark.parametrize(
    "argv, word",
    [
        ((), "--samplers"),
        (
            ("--json", "x.json", "--samplers-file", "nowhere.json"),
            "python tests/benchmark.py --samplers",
        ),
    ],
)
def test_bad_input_is_one_line(benchmark, tmp_path, capsys, monkeypatch, argv, word):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert run(benchmark, *argv, "--quick", "--out", out) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert word in err
    if argv:  # the line makes the file that is missing
        assert err.endswith(f"--samplers-file nowhere.json --out {out} --quick\n")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("flag", ["--samplers-file", "--json"])
def test_a_file_that_is_no_such_table_is_not_replaced(benchmark, tmp_path, capsys, flag):
    path = tmp_path / "LICENSE"
    path.write_text("mine")
    argv = ("--quick", "--samplers", "--out", tmp_path / "out", flag, path)
    assert run(benchmark, *argv) == 2
    assert flag in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_a_trial_of_the_samplers_leaves_the_shipped_table_alone(benchmark, tmp_path):
    args = benchmark.arguments(["--quick", "--samplers", "--out", str(tmp_path)])
    assert args.samplers_file == tmp_path / "quick/samplers.json"


def test_a_table_without_a_yardstick_is_one_line(benchmark, tmp_path, capsys):
    table = tmp_path / "samplers.json"
    row = {"nfe": 4, "fd": [1, 2]}
    rows = {"dpm++2m-4": row, "pc": row}
    common.write_json(table, {"chosen": "dpm++2m-4", "pc_steps": 3, "samplers": rows})
    argv = ("--quick", "--out", tmp_path / "out", "--samplers-file", table)
    assert run(benchmark, *argv, "--json", tmp_path / "speed.json") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "older version" in err


# ---- shapes.py -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    return argparse.Namespace(**runpy.run_path(str(ROOT / "tests/shapes.py")))


def test_shapes_writes_a_folder_for_each_kind(shapes, tmp_path):
    shapes.main([str(tmp_path / "set"), "--n", "2"])
    files = sorted((tmp_path / "set").glob("*/*.png"))
    num_files = Counter(path.parent.name for path in files)
    assert len(num_files) == 9
    assert set(num_files.values()) == {2}
    assert Image.open(files[0]).size == (32, 32)


def test_shapes_replaces_no_picture(shapes, tmp_path, capsys):
    mine = tmp_path / "red_circle/0000.png"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        shapes.main([str(tmp_path), "--n", "1"])
    assert stop.value.code == 2
    assert "not empty" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_shapes_differ_by_seed_alone(shapes, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        shapes.main([str(tmp_path / name), "--n", "1", "--seed", seed])
    first, again, other = (tmp_path / name / "red_circle" / "0000.png" for name in "abc")
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_help_of_shapes_makes_no_folder(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        shapes.main(["--help"])
    assert stop.value.code == 0
    assert "--seed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
