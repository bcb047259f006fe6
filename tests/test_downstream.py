"""05: inpainting, reconstruction and their measures against closed forms; the script through its command line."""
import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, load_script

import common as c

SDES = pytest.mark.parametrize("sde", [c.VE(), c.VP(), c.SubVP()], ids=["ve", "vp", "subvp"])


@pytest.fixture(scope="session")
def s5():
    """The names of 05_downstream.py."""
    return load_script("05")


# ---- inpainting: a Gaussian whose conditional is known ----------------------------------------------------------
RHO, KNOWN = 0.95, 1.5
TARGET = (RHO * KNOWN, math.sqrt(1 - RHO**2))  # mean and standard deviation of x2 given x1 = 1.5
HIDDEN = torch.tensor([False, True])


@pytest.fixture(scope="session")
def correlated():
    cov = torch.tensor([[[1, RHO], [RHO, 1]]], dtype=torch.float64)
    return c.GaussianMixture(torch.zeros(1, 2).double(), cov, torch.ones(1).double(), sd=1.0)


def known(n, hidden=0.0):
    return torch.tensor([[KNOWN, hidden]], dtype=torch.float64).repeat(n, 1)


def errors(x):
    """How far mean and standard deviation of the drawn coordinate are from the conditional's."""
    return abs(x[:, 1].mean().item() - TARGET[0]), abs(x[:, 1].std().item() - TARGET[1])


def test_replacement_is_biased_however_many_steps_and_repaint_much_less(s5, correlated):
    draw = lambda levels, resample: errors(s5["repaint"](correlated, known(10000), HIDDEN, c.karras_sigmas(levels, 80.0), resample, c.rng(0)))
    plain = [draw(levels, 1) for levels in (25, 121, 500)]
    assert all(mean > 0.3 for mean, _ in plain)  # 1.1 instead of 1.425: a fifth of the way back to the mean of all data
    mean, std = draw(25, 5)  # the script's default, as many evaluations as the second of those
    assert mean < 0.09 and std < 0.05
    assert draw(60, 20)[0] < 0.04  # and it goes on falling


@SDES
def test_paper_inpainting_trades_its_bias_for_many_langevin_steps(s5, correlated, sde):
    """A Langevin step a level pulls the two parts together, so here, unlike in plain replacement, more levels do help."""
    few, many = (errors(s5["pc_inpaint"](correlated, sde, known(2000), HIDDEN, steps, generator=c.rng(1))) for steps in (50, 600))
    assert many[0] < 0.2 and many[1] < 0.08 and few[0] > many[0] + 0.08


def test_inpainting_never_reads_the_hidden_part_and_takes_images(s5, correlated):
    sigmas = c.karras_sigmas(5, 80.0)
    for run in (
        lambda x0, h: s5["repaint"](correlated, x0, h, sigmas, 2, c.rng(0)),
        lambda x0, h: s5["pc_inpaint"](correlated, c.VP(), x0, h, 5, generator=c.rng(0)),
    ):
        flat = run(known(6), HIDDEN)
        assert torch.equal(flat, run(known(6, hidden=99.0), HIDDEN))
        assert torch.equal(flat, run(known(6).reshape(6, 1, 1, 2), HIDDEN.reshape(1, 1, 2)).reshape(6, 2))


def test_evaluations_are_as_documented(s5, correlated):
    calls = []
    net = lambda y, phi: calls.append(1) or correlated(y, phi)
    net.sd = correlated.sd
    args, x0, count = s5["arguments"](["--forget", "3", "--out", "/tmp"]), known(2), lambda run: (calls.clear(), run(), len(calls))[2]
    sigmas = c.karras_sigmas(args.steps, 80.0)
    assert count(lambda: s5["repaint"](net, x0, HIDDEN, sigmas, args.resample)) == 24 * 5 + 1 <= 125
    assert count(lambda: s5["pc_inpaint"](net, c.VP(), x0, HIDDEN, 7)) == 15
    assert count(lambda: s5["encode_decode"](net, c.VP(), x0, 7)) == 28
    assert count(lambda: s5["noise_and_denoise"](net, x0, 1.0, 7)) == 7


# ---- reconstruction -----------------------------------------------------------------------------------
@SDES
def test_encode_decode_is_the_identity_for_an_exact_score(s5, gaussian, sde):
    x = gaussian.sample(100, c.rng(0))
    error = lambda steps: (s5["encode_decode"](gaussian, sde, x, steps, t=0.0, generator=c.rng(1)) - x).abs().max().item()
    assert error(200) < 1e-3 and error(8) > 4 * error(200)  # VE: std(0) = .01, not 0, beside an x_T of size 50


@SDES
def test_the_papers_latent_noise_against_its_closed_form(s5, gaussian, sde):
    """For a Gaussian the ODE scales x_hat - m by sqrt(val + sigma^2) along each axis, so the recipe is a formula."""
    x, t = gaussian.sample(100, c.rng(0)), torch.tensor([0.02], dtype=torch.float64)
    val, vec, m, low, high = gaussian.val[0], gaussian.vec[0], gaussian.means[0], 0.001, sde.sigma_max()
    scale = ((val + high**2) / (val + low**2)).sqrt()
    x_T = (m + (x - m) @ vec * scale @ vec.T) * sde.s(torch.ones(1).double())
    x_T = sde.s(t) * x_T + sde.std(t) * c.randn(x.shape, c.rng(1)).double()
    want = m + (x_T / sde.s(torch.ones(1).double()) - m) @ vec / scale @ vec.T
    torch.testing.assert_close(s5["encode_decode"](gaussian, sde, x, 300, generator=c.rng(1)), want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_noise_and_denoise_draws_from_the_posterior(s5, gaussian, sigma):
    """x0 -> x0 + sigma z -> posterior: mean m + K (x0 - m) with K = S (S + sigma^2)^-1, covariance sigma^2 K K' + (I - K) S."""
    x0, S, m = torch.tensor([[1.2, 0.5]], dtype=torch.float64), gaussian.covs[0], gaussian.means[0]
    x = s5["noise_and_denoise"](gaussian, x0.repeat(20000, 1), sigma, 80, c.rng(0))
    K = torch.linalg.solve(S + sigma**2 * torch.eye(2), S).T
    torch.testing.assert_close(x.mean(0), m + K @ (x0[0] - m), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(x.T), sigma**2 * K @ K.T + (torch.eye(2) - K) @ S, rtol=0, atol=0.03)


# ---- measures -----------------------------------------------------------------------------------------
def bytes_like(seed, channels=1):
    return torch.randint(0, 256, (4, channels, 28, 28), dtype=torch.uint8, generator=c.rng(seed))


def test_psnr_of_a_constant_offset(s5):
    a = torch.full((3, 1, 28, 28), 100, dtype=torch.uint8)
    for k in (1, 20, 100, -100):  # on bytes, 100 - 200 would be 156
        torch.testing.assert_close(s5["psnr"](a, (a.int() + k).byte()), torch.full((3,), 20 * math.log10(255 / abs(k))).double())
    assert (s5["psnr"](a, a) == 100).all()


def test_psnr_and_ssim_of_the_hole_see_the_hole_alone(s5):
    hidden = s5["load_mask"]("half", 28, 28)
    a, noise = bytes_like(0), bytes_like(1)
    b = torch.where(hidden, a, noise)  # wrong outside the hole only
    assert (s5["psnr"](a, b, hidden) == 100).all() and (s5["psnr"](a, b) < 20).all()
    b = torch.where(hidden, noise, a)
    mse = ((a.double() - b.double()) ** 2)[..., 14:].mean((1, 2, 3)) / 255**2
    torch.testing.assert_close(s5["psnr"](a, b, hidden), -10 * mse.log10())
    far = torch.zeros(1, 28, 28, dtype=torch.bool)
    far[:, :, :9] = True  # windows centred on columns 5 to 8 end at column 13
    torch.testing.assert_close(s5["ssim"](a, b, far), torch.ones(4).double())


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_scipys_gaussian_filter(s5, channels):
    """Wang's index with moments from scipy.ndimage, 11 taps, cut to the windows that lie inside the image."""
    ndimage = pytest.importorskip("scipy.ndimage")
    a, b = bytes_like(0, channels), (bytes_like(0, channels) // 2 + bytes_like(1, channels) // 3)
    blur = lambda v: ndimage.gaussian_filter(v, (0, 0, 1.5, 1.5), radius=(0, 0, 5, 5))[..., 5:-5, 5:-5]
    x, y = a.numpy() / 255, b.numpy() / 255
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    want = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    np.testing.assert_allclose(s5["ssim"](a, b).numpy(), want.mean((1, 2, 3)), rtol=1e-9)
    torch.testing.assert_close(s5["ssim"](a, a), torch.ones(4).double())


# ---- masks --------------------------------------------------------------------------------------------
def test_masks(s5):
    rows = s5["load_mask"]("rows", 64, 64)[0]
    assert rows[32:48].all() and rows.sum() == 16 * 64  # CelebA's band
    half, center = (s5["load_mask"](name, 28, 28)[0] for name in ("half", "center"))
    assert half[:, 14:].all() and half.sum() == 14 * 28 and center[7:21, 7:21].all() and center.sum() == 14 * 14


@pytest.mark.parametrize("shape", [(56, 56), (56, 56, 3), (56, 56, 4)])
def test_a_png_is_scaled_to_the_image(s5, tmp_path, shape):
    pixels = np.zeros(shape)
    pixels[10:30, 20:40] = 1
    if len(shape) == 3 and shape[2] == 4:
        pixels[..., 3] = 1  # opaque
    c.pyplot().imsave(tmp_path / "hole.png", pixels, cmap="gray")
    hidden = s5["load_mask"](str(tmp_path / "hole.png"), 28, 28)[0]
    assert hidden[5:15, 10:20].all() and hidden.sum() == 100


# ---- the command line ---------------------------------------------------------------------------------
def add_run(out, name, method, noise=0.02, seed=0):
    """A run of 03 as 05 finds it: the base with noise on its weights."""
    base = torch.load(ROOT / "data/mnist_base.pt", weights_only=True)
    ema = {k: v + noise * v.abs().mean() * torch.randn(v.shape, generator=c.rng(seed)) for k, v in base["ema"].items()}
    (out / "mnist/forget-3" / name).mkdir(parents=True)
    c.save_checkpoint(out / "mnist/forget-3" / name / "model.pt", arch=base["arch"], ema=ema, args=dict(method=method, sde="vp", seed=0))


TINY = ("--forget", 3, "--quick", "--n", 3, "--steps", 3)


def table(out, task="inpaint-half"):
    return json.loads((out / "mnist/forget-3/downstream" / task / "table.json").read_text())


def test_inpaint_quick(script, tmp_path):
    """Rows in the paper's order; a run in progress is none; a copy of Standard gets Standard's numbers, for the noise is the same."""
    for name, noise in {"obt-rel-vp": 0.3, "siss-vp": 0.1, "unseen-vp": 0.0, "ort-ve-s1": 0.1, ".obt-vp.tmp1": 0.1}.items():
        add_run(tmp_path, name, name.strip(".").rsplit("-", 1 + name.endswith("s1"))[0], noise)
    status, out, _ = script("05", "--forget", 3, "--quick", "--task", "inpaint", "--out", tmp_path)
    folder = tmp_path / "mnist/forget-3/downstream/inpaint-half"
    assert status == 0 and "no run of obt: python 03_unlearn.py --dataset mnist --forget 3 --method obt" in out and "next: " in out
    assert {p.name for p in folder.iterdir()} == {"table.json", "pictures.png"}
    rows = table(tmp_path)["results"]["repaint"]
    assert list(rows) == ["clean", "Standard", "Unseen", "Ort-ve-s1", "Obt-rel", "Siss"]
    assert rows["Unseen"] == rows["Standard"] != rows["Obt-rel"]
    for part in ("D_f", "D_g"):
        clean, m = rows["clean"][part], rows["Standard"][part]
        assert clean["psnr"] == clean["psnr_hole"] == 100 and clean["ssim"] == pytest.approx(1)
        assert m["psnr_hole"] < m["psnr"] < 100 and m["ssim_hole"] < 1
        assert m["interval"][0] <= m["accuracy"] <= m["interval"][1]
        assert f"Standard{m['accuracy']:13.1f} [{m['interval'][0]:5.1f}, {m['interval'][1]:5.1f}]" in out
    assert "fd" in rows["Standard"]["D_g"] and "fd" not in rows["Standard"]["D_f"]


def test_reconstruct_quick_leaves_the_other_task_alone(script, tmp_path):
    add_run(tmp_path, "obt-rel-vp", "obt-rel")
    assert script("05", *TINY, "--out", tmp_path)[0] == 0
    before = (tmp_path / "mnist/forget-3/downstream/inpaint-half/pictures.png").read_bytes()
    status, out, _ = script("05", *TINY, "--task", "reconstruct", "--sigmas", 1.5, 0.1, 45, "--out", tmp_path)
    folder = tmp_path / "mnist/forget-3/downstream/reconstruct"
    assert status == 0 and {p.name for p in folder.iterdir()} == {"table.json", "pictures.png", "curve.png"}
    results = table(tmp_path, "reconstruct")["results"]
    assert list(results) == ["sigma 0.1", "sigma 1.5", "sigma 45", "latent"] and "psnr_hole" not in results["latent"]["Standard"]["D_f"]
    # More noise, less of the image; at sigma 45 nothing is left of it, so the settings are not judged there.
    psnr = [results[name]["Standard"]["D_g"]["psnr"] for name in list(results)[:3]]
    assert psnr[0] > 25 > psnr[1] > psnr[2] and table(tmp_path, "reconstruct")["judged_by"] != "sigma 45"
    assert (tmp_path / "mnist/forget-3/downstream/inpaint-half/pictures.png").read_bytes() == before


def test_known_pixels_are_the_inputs_to_the_bit(s5, tmp_path):
    images = c.load_dataset("mnist", train=False).images[:7]
    args = s5["arguments"](["--forget", "3", "--quick", "--batch-size", "3", "--out", str(tmp_path)])
    hidden = s5["load_mask"]("center", 28, 28)
    net = c.load_net(ROOT / "data/mnist_base.pt", "")
    for name, extra in (("repaint", dict(sigmas=c.karras_sigmas(3, 80.0))), ("pc_inpaint", dict(sde=c.VP(), steps=3))):
        out = s5["restore"](images, lambda x0, generator: s5[name](net, x0=x0, hidden=hidden, generator=generator, **extra), hidden, args, name)
        assert torch.equal(out[:, ~hidden], images[:, ~hidden]) and not torch.equal(out, images)


INPAINT = [(), ("--seed", 1), ("--n", 4), ("--steps", 4), ("--resample", 1), ("--mask", "rows"), ("--sde", "ve"), ("--batch-size", 2), ("--paper",)]
RECONSTRUCT = [("--task", "reconstruct", "--sigmas", 0.7, *more) for more in ((), ("--sde", "subvp"), ("--steps", 4), ("--seed", 1))]


@pytest.mark.parametrize("settings", [INPAINT, RECONSTRUCT], ids=["inpaint", "reconstruct"])
def test_no_flag_is_ignored(script, tmp_path, settings):
    """Each changes Standard's measures, and no two alike."""
    add_run(tmp_path, "obt-rel-vp", "obt-rel")
    results = []
    for flags in settings:
        assert script("05", *TINY, *flags, "--out", tmp_path)[0] == 0
        newest = max((tmp_path / "mnist/forget-3/downstream").glob("*/table.json"), key=lambda p: p.stat().st_mtime_ns)
        results.append([rows["Standard"] for rows in json.loads(newest.read_text())["results"].values()])
    assert all(a != b for i, a in enumerate(results) for b in results[:i])


def test_runs_chooses_rows(script, tmp_path):
    add_run(tmp_path, "obt-rel-vp", "obt-rel"), add_run(tmp_path, "ort-vp", "ort")
    assert script("05", *TINY, "--runs", "ort-vp", "--out", tmp_path)[0] == 0
    assert list(table(tmp_path)["results"]["repaint"]) == ["clean", "Standard", "Ort"]


def tree(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


BAD = {
    "no forget": (("--quick",), "--forget 3"),
    "unknown class": (("--forget", "eleven"), "0, 1, 2"),
    "no runs": (("--forget", 7), "python 03_unlearn.py --dataset mnist --forget 7"),
    "task": (("--forget", 3, "--task", "colour"), "reconstruct"),
    "mask": (("--forget", 3, "--mask", "hat"), "half, rows, center"),
    "mask of another task": (("--forget", 3, "--task", "reconstruct", "--mask", "rows"), "--mask"),
    "sigmas of another task": (("--forget", 3, "--sigmas", 1), "--sigmas"),
    "resample and paper": (("--forget", 3, "--paper", "--resample", 2), "--resample"),
    "lr": (("--forget", 3, "--lr", 0.1), "--lr"),
    "sigma": (("--forget", 3, "--task", "reconstruct", "--sigmas", 0), "--sigmas"),
    "n": (("--forget", 3, "--n", 5000), "1,010 images"),
    "steps": (("--forget", 3, "--steps", 0), "--steps"),
    "runs": (("--forget", 3, "--runs", "obt-vp"), "obt-rel-vp"),
    "data set": (("--forget", 3, "--dataset", "imagenet"), "mnist"),
    "clip": (("--forget", 3, "--clip-weights", "nowhere.pt"), "pip install open_clip_torch"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line_and_touches_nothing(script, tmp_path, name):
    argv, word = BAD[name]
    add_run(tmp_path, "obt-rel-vp", "obt-rel")
    before = tree(tmp_path)
    status, _, err = script("05", "--quick", *argv, "--out", tmp_path)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value, word", [(0.0, "nothing"), (1.0, "everything")])
def test_a_mask_that_hides_nothing_or_everything(script, tmp_path, value, word):
    add_run(tmp_path, "obt-rel-vp", "obt-rel")
    c.pyplot().imsave(tmp_path / "m.png", np.full((28, 28), value), cmap="gray", vmin=0, vmax=1)
    status, _, err = script("05", *TINY, "--mask", tmp_path / "m.png", "--out", tmp_path)
    assert status == 2 and err.count("\n") == 1 and word in err


def test_a_damaged_run_names_the_command(script, tmp_path):
    add_run(tmp_path, "obt-rel-vp", "obt-rel")
    (tmp_path / "mnist/forget-3/obt-rel-vp/model.pt").write_bytes(b"not a checkpoint")
    status, _, err = script("05", *TINY, "--out", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "python 03_unlearn.py --dataset mnist --forget 3" in err


def test_a_failed_run_leaves_the_finished_one(script, tmp_path, monkeypatch):
    add_run(tmp_path, "obt-rel-vp", "obt-rel")
    assert script("05", *TINY, "--out", tmp_path)[0] == 0
    before = tree(tmp_path)
    monkeypatch.setattr(c, "tile", lambda *a: c.die("no picture"))
    assert script("05", *TINY, "--seed", 1, "--out", tmp_path)[0] == 2
    assert tree(tmp_path) == before


def test_a_diverged_model_ends_with_advice(script, tmp_path):
    add_run(tmp_path, "obt-rel-vp", "obt-rel", noise=math.nan)
    status, _, err = script("05", *TINY, "--out", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "diverged" in err and not (tmp_path / "mnist/forget-3/downstream/inpaint-half").exists()


def test_clip_distance_through_open_clip(script, tmp_path, monkeypatch):
    """A stand-in for open_clip, whose features are the image's mean and 1."""
    add_run(tmp_path, "obt-rel-vp", "obt-rel")
    (tmp_path / "weights.pt").write_bytes(b"x")

    class Model(torch.nn.Module):
        def encode_image(self, x):
            return torch.stack([x.mean((1, 2, 3)), torch.ones(len(x))], 1)

    prepare = lambda image: torch.tensor(np.array(image)).float()[None] / 255
    fake = types.SimpleNamespace(create_model_and_transforms=lambda name, pretrained: (Model(), None, prepare))
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    status, out, _ = script("05", *TINY, "--clip-weights", tmp_path / "weights.pt", "--out", tmp_path)
    rows = table(tmp_path)["results"]["repaint"]
    assert status == 0 and "clip_distance" in out and "clip_distance" not in rows["Standard"]["D_f"]
    assert rows["clean"]["D_g"]["clip_distance"] == pytest.approx(0, abs=1e-6) and 0 < rows["Standard"]["D_g"]["clip_distance"] < 0.1


def test_after_a_real_run_of_03_as_a_process(script, tmp_path):
    assert script("03", "--forget", 3, "--quick", "--steps", 1, "--n", 10, "--nfe", 2, "--out", tmp_path)[0] == 0
    run = subprocess.run([sys.executable, SCRIPTS["05"], *map(str, TINY), "--out", tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert list(table(tmp_path)["results"]["repaint"]) == ["clean", "Standard", "Obt-rel"]
