"""04: its measures against closed forms, and what it does with models, interruptions and bad input."""
import argparse
import json
import math
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import SCRIPTS, load_script

import common as c

FORGET = ("--dataset", "mnist", "--quick", "--forget", 3, "--n", 20, "--nfe", 2, "--n-nll", 3)
FILES = {"table.md", "table.json", "samples.png", "classes.png"}


@pytest.fixture(scope="module")
def evaluate():
    return argparse.Namespace(**load_script("04"))


# ---- measures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, m", [(400, 400), (300, 150)])
def test_density_and_coverage_of_one_distribution(evaluate, n, m):
    """Density 1, and coverage by exchangeability: a ball stays empty when the k nearest of the other n - 1 + m points are all real."""
    got = torch.tensor([evaluate.density_coverage(*torch.randn(n + m, 8, generator=c.rng(seed)).split([n, m]), k=5) for seed in range(8)])
    density, coverage = got.mean(0).tolist()
    want = 1 - math.prod((n - i) / (n + m - i) for i in range(1, 6))
    assert density == pytest.approx(1, abs=0.08) and coverage == pytest.approx(want, abs=0.012)


def test_coverage_sees_a_lost_mode_and_density_sees_rubbish(evaluate):
    a, b, far = (torch.randn(300, 4, generator=c.rng(seed)) + shift for seed, shift in ((0, 0), (1, 50), (2, 500)))
    real, whole, half = torch.cat([a, b]), *(torch.cat(x) + 0.1 for x in ((a, b), (a, a)))
    assert evaluate.density_coverage(real, whole)[1] > 0.95
    assert evaluate.density_coverage(real, half)[1] == pytest.approx(0.5, abs=0.03)
    assert evaluate.density_coverage(real, far) == (0, 0)
    assert evaluate.density_coverage(real, torch.cat([a, far]))[0] < 0.6 * evaluate.density_coverage(real, whole)[0]


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)])
def test_nll_bound_is_exact_for_an_exact_score(evaluate, gaussian, shape):
    """E_z[-ln p(x + sigma z)] of a Gaussian is -ln N(x; m, C) + sigma^2 tr(C^-1)/2, C = S + sigma^2 I; at typical points and far out."""
    sigma, n = 0.05, 5000
    cov = gaussian.covs[0] + sigma**2 * torch.eye(2, dtype=torch.float64)
    for point in ([0.4, -0.7], [1.0, 1.0], [-2.0, 0.5]):
        x = torch.tensor(point, dtype=torch.float64).reshape(1, *shape)
        got = evaluate.nll_bound(gaussian, x.expand(n, *shape), sigma, levels=32, generator=c.rng(0))
        want = -gaussian.log_prob(x, torch.tensor([sigma], dtype=torch.float64)) + sigma**2 / 2 * torch.linalg.inv(cov).trace()
        assert got.shape == (n,) and abs(got.mean() - want) < 4 * got.std() / n**0.5 and got.std() / n**0.5 < 0.06


def test_a_wrong_score_raises_the_bound(evaluate, gaussian):
    x, wrong = gaussian.sample(4000, c.rng(0)), c.ExactNet(lambda x_hat, sigma: 0.8 * gaussian.z_hat(x_hat, sigma), gaussian.sd)
    right, high = (evaluate.nll_bound(net, x, 0.01, generator=c.rng(1)).mean() for net in (gaussian, wrong))
    assert high > right + 0.05


def test_likelihoods_of_two_sets(evaluate, tmp_path):
    """Images of D_g and, farther out, of D_f from a correlated Gaussian: means, errors and order of all columns against exact numbers."""
    a, n = torch.randn(16, 16, generator=c.rng(0), dtype=torch.float64) / 4, 48
    net = c.GaussianMixture(torch.zeros(1, 16).double(), (a @ a.T + 0.1 * torch.eye(16))[None], torch.ones(1).double(), sd=0.5)
    x = torch.cat([net.sample(n, c.rng(1)), 1.5 * net.sample(n, c.rng(2))])
    exact = -net.log_prob(x, torch.full((2 * n,), 0.001).double())
    args = argparse.Namespace(sde="vp", nll="ode", rk4=30, levels=64, seed=0, data_dir=None)
    (tmp_path / "kept").mkdir()
    desk = evaluate.Desk(args, tmp_path, c.VP(), None, [], [], None, None, dict(total=1, done=0, start=0))
    got = evaluate.likelihoods(desk, evaluate.Model("gauss", net, {}, "x"), x.reshape(2 * n, 1, 4, 4), 1)
    kept = torch.load(tmp_path / "kept/gauss.nll.pt", weights_only=True)
    for kind, noise in (("ode", 0.4), ("bound", 1.3)):  # standard errors: of one probe an image, of 64 draws of z an image
        for part, want, values in zip("gf", exact.split(n), kept[kind].split(n)):
            nats, bits = got[f"{kind}_nats_{part}"], got[f"{kind}_bits_{part}"]
            assert nats["mean"] == pytest.approx(want.mean().item(), abs=4 * noise)
            assert nats["se"] == pytest.approx(values.std().item() / n**0.5) and nats["mean"] == pytest.approx(values.mean().item())
            assert bits["mean"] == pytest.approx(nats["mean"] / (16 * math.log(2)) + 7)
            assert bits["se"] == pytest.approx(nats["se"] / (16 * math.log(2)))
    assert got["ode_nats_f"]["mean"] > got["ode_nats_g"]["mean"] + 3 and 0 < got["ode_error_bits"] < 0.01


def test_relearn_learns_and_leaves_the_model_alone(evaluate):
    torch.manual_seed(0)
    net = c.UNet(width=16, sd=0.6).eval().requires_grad_(False)
    before = [w.clone() for w in net.parameters()]
    image = c.load_dataset("mnist", train=False).images[:1]
    tuned = evaluate.relearn(net, image, steps=30, batch=16, lr=2e-3, seed=0)
    loss = lambda net: sum(v for _, _, v in load_script("02")["loss_by_noise"](net, c.dequantize(image.expand(64, -1, -1, -1))))
    assert loss(tuned) < 0.9 * loss(net) and not tuned.training
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    again = evaluate.relearn(net, image, steps=30, batch=16, lr=2e-3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters()))


def test_table(evaluate):
    text = evaluate.table({"model": 0, "ur": 2, "nll": 1, "none": 0}, [dict(model="a", ur=[1.0, 2.5], nll=dict(mean=3.14, se=0.25)), dict(model="bbb")])
    assert text == "| model | ur           | nll       |\n| ----- | ------------ | --------- |\n| a     | 1.00 to 2.50 | 3.1 ± 0.2 |\n| bbb   |              |           |\n"


# ---- models, kept results, interruptions -------------------------------------------------------------


def save_model(path, scale=1.0, **args):
    """The shipped base with its first layer scaled, as a run would have left it."""
    content = torch.load(c.HERE / "data/mnist_base.pt", weights_only=True)
    content["ema"]["stem.weight"] *= scale
    path.parent.mkdir(parents=True, exist_ok=True)
    c.save_checkpoint(path, arch=content["arch"], ema=content["ema"], args=args)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, evaluate):
    """An evaluation of four models, with runs around that it must not take."""
    out = tmp_path_factory.mktemp("out")
    root, folder = out / "mnist", out / "mnist/forget-3"
    save_model(folder / "obt-rel-vp/model.pt", 1.0, method="obt-rel", sde="vp", seed=0)  # equal to Standard on purpose
    save_model(folder / "ort-ve/model.pt", 1.3, method="ort", sde="ve", seed=0)
    save_model(folder / ".obt-vp.tmp123/model.pt", method="obt")  # a run in progress
    save_model(folder / "unseen-any-scratch/model.pt", 0.9, method="unseen", sde="any", seed=0)  # as 02 --without 3 leaves it
    save_model(root / "forget-3-7/unseen-any-scratch/model.pt", 0.9, method="unseen")
    save_model(root / "forget-7/obt-vp/model.pt", method="obt")
    evaluate.main([str(a) for a in (*FORGET, "--relearn", 2, "--out", out)])
    return out


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def test_what_is_written(finished):
    folder = finished / "mnist/forget-3"
    assert FILES | {"relearn.json", "relearn.png"} == {p.name for p in folder.iterdir() if p.is_file()}
    result = json.loads((folder / "table.json").read_text())
    rows = {row["model"]: row for row in result["models"]}
    assert list(rows) == ["standard", "unseen-any-scratch", "obt-rel-vp", "ort-ve"] and rows["ort-ve"]["method"] == "ort" and rows["ort-ve"]["sde"] == "ve"
    for row in rows.values():
        assert sum(row["class_counts"]) == result["n"] == 20 and result["n_nll"] == 3 and row["ur"] == pytest.approx(100 * row["class_counts"][3] / 20)
        assert row["ur_interval"][0] <= row["ur"] <= row["ur_interval"][1] and 0 <= row["coverage"] <= 1 and row["ode_bits_g"]["se"] > 0
    # The same noise, images and probes for all: a copy of Standard has Standard's numbers.
    standard, same, other = rows["standard"], rows["obt-rel-vp"], rows["ort-ve"]
    for key in ("ur", "class_counts", "low_confidence", *(f"{kind}_bits_{part}" for kind in ("ode", "bound") for part in "gf")):
        assert standard[key] == same[key]
    assert standard["ode_bits_g"] != other["ode_bits_g"] and same["class_min_ratio"] == 1
    assert 80 < result["judge_recall"] <= 100 and result["real"]["ur"] < 10
    assert all(name in (folder / "table.md").read_text() for name in (*rows, "real D_g", "± "))


def test_the_attack(finished):
    folder = finished / "mnist/forget-3"
    rows, table = json.loads((folder / "relearn.json").read_text())["rows"], json.loads((folder / "table.json").read_text())["models"]
    assert [(r["model"], r["k"]) for r in rows] == [(m, k) for m in ("unseen-any-scratch", "obt-rel-vp", "ort-ve") for k in (0, 2)]
    assert [r["ur"] for r in rows if r["k"] == 0] == [r["ur"] for r in table[1:]]
    images = lambda name: torch.load(folder / f"kept/obt-rel-vp.{name}.pt", weights_only=True)["images"]
    assert not torch.equal(images("samples"), images("relearn-2"))


def test_only_what_changed_is_measured_again(script, copy, monkeypatch):
    """Nothing at all on a rerun; with new weights in one folder, that model alone."""
    folder = copy / "mnist/forget-3"
    before = (folder / "table.json").read_text()
    calls, real = [], c.sample_images
    monkeypatch.setattr(c, "sample_images", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert script("04", *FORGET, "--out", copy)[0] == 0 and not calls and (folder / "table.json").read_text() == before
    save_model(folder / "ort-ve/model.pt", 1.2, method="ort", sde="ve", seed=0)
    (folder / "kept/unseen-any-scratch.nll.pt").write_bytes(b"damaged")
    status, out, _ = script("04", *FORGET, "--out", copy)
    assert status == 0 and len(calls) == 1 and "unseen-any-scratch.nll" in out and "standard.nll" not in out
    old, new = (json.loads(text)["models"] for text in (before, (folder / "table.json").read_text()))
    assert old[:3] == new[:3] and old[3] != new[3]


@pytest.mark.parametrize("flag, moved", [(("--sde", "ve"), "both"), (("--seed", 1), "both"), (("--nfe", 3, "--n", 24), "fd")])
def test_no_flag_is_ignored(script, copy, flag, moved):
    """Each changes what it should: the samples, the likelihood or both; and only that."""
    shutil.rmtree(copy / "mnist/forget-3/ort-ve"), shutil.rmtree(copy / "mnist/forget-3/unseen-any-scratch")
    read = lambda: json.loads((copy / "mnist/forget-3/table.json").read_text())["models"][0]
    before = read()
    assert script("04", *FORGET, *flag, "--out", copy)[0] == 0
    assert before["fd"] != read()["fd"] and (before["ode_nats_g"] != read()["ode_nats_g"]) == (moved == "both")


def test_an_interrupted_run_keeps_what_is_finished_and_the_old_table(script, copy, monkeypatch):
    folder = copy / "mnist/forget-3"
    shutil.rmtree(copy / "mnist/forget-3/unseen-any-scratch")
    before = {name: (folder / name).read_bytes() for name in FILES}
    real, calls = c.ode_log_likelihood, []

    def stop(*args, **more):
        calls.append(1)
        return real(*args, **more) if len(calls) < 3 else c.die("interrupted")

    monkeypatch.setattr(c, "ode_log_likelihood", stop)
    assert script("04", *FORGET, "--seed", 5, "--out", copy)[0] == 2
    assert before == {name: (folder / name).read_bytes() for name in FILES}
    monkeypatch.setattr(c, "ode_log_likelihood", real), monkeypatch.setattr(c, "sample_images", lambda *a, **k: c.die("sampled again"))
    status, out, _ = script("04", *FORGET, "--seed", 5, "--out", copy)
    assert status == 0 and "standard.nll" not in out and "ort-ve.nll" in out


def test_fid_asks_torch_fidelity_for_the_right_thing(script, copy, monkeypatch, tmp_path):
    """Three channels, bytes, the weights given, D_g without a single 3; its own column beside FD."""
    asked = []
    fake = types.SimpleNamespace(__spec__=object(), calculate_metrics=lambda **k: asked.append(k) or {"frechet_inception_distance": 12.5})
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    (tmp_path / "weights.pth").write_bytes(b"")  # never read: the package is a stand-in
    weights = tmp_path / "weights.pth"
    status, out, _ = script("04", *FORGET, "--nll", "none", "--fid", "--inception-weights", weights, "--out", copy)
    assert status == 0 and len(asked) == 5 and all(a["fid"] and a["feature_extractor_weights_path"] == str(weights) for a in asked)
    assert all(x.shape == (3, 28, 28) and x.dtype == torch.uint8 for a in asked for x in (a["input1"][0], a["input2"][0]))
    rows = json.loads((copy / "mnist/forget-3/table.json").read_text())["models"]
    kept = 20 - rows[0]["class_counts"][3]
    assert all(len(a["input1"]) == kept for a in asked) and all(row["fid"] == 12.5 != row["fd"] for row in rows) and "fid" in out


# ---- the command line --------------------------------------------------------------------------------
BAD = {
    "no forget": ((), "--forget"),
    "unknown class": (("--forget", "eleven"), "0, 1, 2"),
    "no model": (("--forget", 8), "python 03_unlearn.py --dataset mnist --forget 8"),
    "damaged model": (("--forget", 5), "python 03_unlearn.py --dataset mnist --forget 5"),
    "sde": (("--forget", 5, "--sde", "xp"), "subvp"),
    "nll": (("--forget", 5, "--nll", "guess"), "bound"),
    "n": (("--forget", 5, "--n", 3), "--n"),
    "relearn": (("--forget", 5, "--relearn", 0), "--relearn"),
    "weights": (("--forget", 5, "--inception-weights", "nowhere.pth"), "nowhere.pth"),
    "data set": (("--forget", 5, "--dataset", "imagenet"), "mnist"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line_and_touches_nothing(script, tmp_path, name):
    argv, word = BAD[name]
    path = tmp_path / "mnist/forget-5/obt-vp/model.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a checkpoint")
    status, _, err = script("04", "--quick", *argv, "--out", tmp_path)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path] and not (path.parent.parent / "kept").exists()


def test_fid_without_the_package(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    status, _, err = script("04", *FORGET, "--fid", "--out", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "pip install torch-fidelity" in err


def test_03_and_04_as_processes(tmp_path):
    """What 03 writes is what 04 finds."""
    for number, more in (("03", ("--method", "obt", "--steps", "2", "--n", "10", "--nfe", "2")), ("04", ("--n", "20", "--nfe", "2", "--nll", "bound"))):
        command = [sys.executable, SCRIPTS[number], "--quick", "--forget", "3", "--out", tmp_path, *more]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0 and not run.stderr, run.stderr
    assert "next: " in run.stdout and FILES <= {p.name for p in (tmp_path / "mnist/forget-3").iterdir()}
    assert [row["model"] for row in json.loads((tmp_path / "mnist/forget-3/table.json").read_text())["models"]] == ["standard", "obt-vp"]
