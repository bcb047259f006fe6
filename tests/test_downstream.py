"""05: inpainting, reconstruction and their measures against closed forms; the command line."""

import functools
import math
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    Run,
    arguments,
    check_refusal,
    check_success,
    load_script,
    quick,
    read_json,
    run_function,
    run_process,
    run_script,
)

import common

SDES = pytest.mark.parametrize(
    "sde", [common.VE(), common.VP(), common.SubVP()], ids=["ve", "vp", "subvp"]
)


@pytest.fixture(scope="module")
def downstream():
    """The names of 05_downstream.py."""
    return types.SimpleNamespace(**load_script("05"))


# ---- inpainting: a Gaussian whose conditional is known -------------------------------------------
# x1 is known and x2 is hidden. Given x1, x2 is Gaussian with mean rho x1 and variance 1 - rho^2.

RHO = 0.95
X1 = 1.5
HIDDEN = torch.tensor([False, True])


@pytest.fixture(scope="module")
def correlated():
    """Two coordinates of unit variance with correlation RHO, as an exact network."""
    cov = torch.tensor([[[1, RHO], [RHO, 1]]], dtype=torch.float64)
    return common.GaussianMixture(torch.zeros(1, 2).double(), cov, torch.ones(1).double(), sd=1.0)


def known(n, x2=0.0):
    """n points with the known x1; what stands in the place of x2 must not matter."""
    return torch.tensor([[X1, x2]], dtype=torch.float64).repeat(n, 1)


def errors(x):
    """How far mean and standard deviation of the drawn x2 are from those of the conditional."""
    x2 = x[:, 1]
    error_of_mean = abs(x2.mean().item() - RHO * X1)
    error_of_std = abs(x2.std().item() - math.sqrt(1 - RHO**2))
    return error_of_mean, error_of_std


def repaint_errors(downstream, net, levels, resample):
    sigmas = common.karras_sigmas(levels, 80.0)
    x = downstream.repaint(net, known(10000), HIDDEN, sigmas, resample, common.rng(0))
    return errors(x)


@pytest.mark.parametrize("levels", [25, 121, 500])
def test_replacement_is_biased_however_many_steps(downstream, correlated, levels):
    """Its mean is 1.1 instead of 1.425: a fifth of the way back to the mean of all data."""
    error_of_mean, _ = repaint_errors(downstream, correlated, levels, resample=1)
    assert error_of_mean > 0.3


def test_repaint_is_biased_much_less(downstream, correlated):
    """The script's default, with as many evaluations as 121 levels of replacement."""
    error_of_mean, error_of_std = repaint_errors(downstream, correlated, 25, resample=5)
    assert error_of_mean < 0.09
    assert error_of_std < 0.05


def test_the_bias_of_repaint_goes_on_falling(downstream, correlated):
    error_of_mean, _ = repaint_errors(downstream, correlated, 60, resample=20)
    assert error_of_mean < 0.04


@SDES
def test_paper_inpainting_trades_its_bias_for_many_langevin_steps(downstream, correlated, sde):
    """More levels help, unlike in plain replacement.

    A Langevin step at each level pulls the known and the hidden part together.
    """

    def errors_of(steps):
        x0 = known(2000)
        generator = common.rng(1)
        return errors(
            downstream.pc_inpaint(correlated, sde, x0, HIDDEN, steps, generator=generator)
        )

    few_error_of_mean, _ = errors_of(50)
    error_of_mean, error_of_std = errors_of(600)
    assert error_of_mean < 0.2
    assert error_of_std < 0.08
    assert few_error_of_mean > error_of_mean + 0.08


@pytest.fixture(params=["repaint", "pc_inpaint"])
def inpaint(request, downstream, correlated):
    """Both ways to fill in a hole, as a function of (x0, hidden)."""
    if request.param == "repaint":
        sigmas = common.karras_sigmas(5, 80.0)

        def fill(x0, hidden):
            return downstream.repaint(correlated, x0, hidden, sigmas, 2, common.rng(0))

    else:

        def fill(x0, hidden):
            sde = common.VP()
            generator = common.rng(0)
            return downstream.pc_inpaint(correlated, sde, x0, hidden, 5, generator=generator)

    return fill


def test_inpainting_never_reads_the_hidden_part(inpaint):
    assert torch.equal(inpaint(known(6), HIDDEN), inpaint(known(6, x2=99.0), HIDDEN))


def test_inpainting_takes_images(inpaint):
    images = inpaint(known(6).reshape(6, 1, 1, 2), HIDDEN.reshape(1, 1, 2))
    assert torch.equal(images.reshape(6, 2), inpaint(known(6), HIDDEN))


# ---- the noise of the known pixels ---------------------------------------------------------------


class LevelSpy:
    """A network that notes the noise level that it is told, and the noise of the known pixels."""

    def __init__(self, net):
        self.net = net
        self.sd = net.sd
        self.told = []  # sigma by phi
        self.seen = []  # standard deviation of the known x_hat
        self.means = []  # their mean

    def __call__(self, y, phi):
        sigma = self.sd * math.tan(phi[0])
        known_x_hat = y[:, 0] * math.hypot(sigma, self.sd)
        self.told.append(sigma)
        self.seen.append(known_x_hat.std().item())
        self.means.append(known_x_hat.mean().item())
        return self.net(y, phi)


def check_levels(spy):
    """Whatever the network sees of the known pixels has the noise level that it is told."""
    assert len(spy.told) > 3
    for told, seen, mean in zip(spy.told, spy.seen, spy.means):
        assert seen == pytest.approx(told, rel=0.05)
        assert mean == pytest.approx(X1, abs=5 * told / 4000**0.5)


@pytest.mark.parametrize("resample", [1, 3])
def test_repaint_shows_known_pixels_at_the_level_of_the_step(downstream, correlated, resample):
    spy = LevelSpy(correlated)
    sigmas = common.karras_sigmas(6, 80.0)
    downstream.repaint(spy, known(4000), HIDDEN, sigmas, resample, common.rng(0))
    check_levels(spy)


@SDES
def test_the_papers_inpainting_shows_known_pixels_at_the_level_of_the_step(
    downstream, correlated, sde
):
    spy = LevelSpy(correlated)
    downstream.pc_inpaint(spy, sde, known(4000), HIDDEN, 6, generator=common.rng(0))
    check_levels(spy)


# ---- how many evaluations it takes ---------------------------------------------------------------


class CountingNet:
    """A network that counts how often it is evaluated."""

    def __init__(self, net):
        self.net = net
        self.sd = net.sd
        self.num_evaluations = 0

    def __call__(self, y, phi):
        self.num_evaluations += 1
        return self.net(y, phi)


@pytest.fixture
def counting(correlated):
    """The correlated Gaussian, with a counter."""
    return CountingNet(correlated)


def test_evaluations_of_repaint_with_the_scripts_defaults(downstream, counting, tmp_path):
    args = downstream.arguments(["--forget", "3", "--out", str(tmp_path)])
    sigmas = common.karras_sigmas(args.steps, 80.0)
    downstream.repaint(counting, known(2), HIDDEN, sigmas, args.resample)
    assert counting.num_evaluations == 24 * 5 + 1
    assert counting.num_evaluations <= 125


def test_evaluations_of_the_papers_inpainting(downstream, counting):
    downstream.pc_inpaint(counting, common.VP(), known(2), HIDDEN, 7)
    assert counting.num_evaluations == 15


def test_evaluations_of_encode_decode(downstream, counting):
    downstream.encode_decode(counting, common.VP(), known(2), 7)
    assert counting.num_evaluations == 28


def test_evaluations_of_noise_and_denoise(downstream, counting):
    downstream.noise_and_denoise(counting, known(2), 1.0, 7)
    assert counting.num_evaluations == 7


# ---- reconstruction ------------------------------------------------------------------------------


@SDES
def test_encode_decode_is_the_identity_for_an_exact_score(downstream, gaussian, sde):
    x0 = gaussian.sample(100, common.rng(0))

    def error(steps):
        # Not quite without noise for VE: std(0) = .01, not 0, beside an x_T of size 50.
        generator = common.rng(1)
        x = downstream.encode_decode(gaussian, sde, x0, steps, t=0.0, generator=generator)
        return (x - x0).abs().max().item()

    assert error(200) < 1e-3
    assert error(8) > 4 * error(200)


def test_the_error_of_the_latent_falls_to_a_quarter(gaussian):
    """The way that encode_decode takes to the latent, against the flow of a Gaussian."""
    x0 = gaussian.sample(100, common.rng(0))
    mean = gaussian.means[0]
    axes = gaussian.eigenvectors[0]
    variances = gaussian.eigenvalues[0]
    growth = ((variances + 152.0**2) / (variances + 0.001**2)).sqrt()
    want = mean + ((x0 - mean) @ axes * growth) @ axes.T

    def error(steps):
        sigmas = common.karras_sigmas(steps + 1, 152.0, 0.001).double()
        return (common.heun_solve(gaussian, x0, sigmas.flip(0)) - want).abs().max().item()

    assert error(80) / error(160) == pytest.approx(4, rel=0.25)


def test_the_error_of_encode_decode_falls_to_a_quarter_or_less(downstream, gaussian):
    """Less, because what the way there does wrong is undone on the way back, but for a rest."""
    x0 = gaussian.sample(100, common.rng(0))

    def error(steps):
        generator = common.rng(1)
        x = downstream.encode_decode(gaussian, common.VP(), x0, steps, t=0.0, generator=generator)
        return (x - x0).abs().max().item()

    assert error(80) > 3.6 * error(160)


@SDES
def test_the_papers_latent_noise_against_its_closed_form(downstream, gaussian, sde):
    """For a Gaussian the ODE scales x_hat - m by sqrt(eigenvalue + sigma^2) along each axis."""
    x0 = gaussian.sample(100, common.rng(0))
    mean = gaussian.means[0]
    axes = gaussian.eigenvectors[0]
    variances = gaussian.eigenvalues[0]
    growth = ((variances + sde.sigma_max() ** 2) / (variances + 0.001**2)).sqrt()

    s_T = sde.s(torch.ones(1).double())
    latent = (mean + (x0 - mean) @ axes * growth @ axes.T) * s_T
    t = torch.tensor([0.02], dtype=torch.float64)
    noise = common.randn(x0.shape, common.rng(1)).double()
    latent = sde.s(t) * latent + sde.std(t) * noise
    want = mean + (latent / s_T - mean) @ axes / growth @ axes.T

    got = downstream.encode_decode(gaussian, sde, x0, 300, generator=common.rng(1))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_noise_and_denoise_draws_from_the_posterior(downstream, gaussian, sigma):
    """x0 -> x0 + sigma z -> a draw given that.

    It has mean m + K (x0 - m) with K = S (S + sigma^2)^-1, and covariance
    sigma^2 K K' + (I - K) S.
    """
    x0 = torch.tensor([[1.2, 0.5]], dtype=torch.float64)
    cov = gaussian.covs[0]
    mean = gaussian.means[0]
    identity = torch.eye(2)
    gain = torch.linalg.solve(cov + sigma**2 * identity, cov).T  # K
    want_cov = sigma**2 * gain @ gain.T + (identity - gain) @ cov

    x = downstream.noise_and_denoise(gaussian, x0.repeat(20000, 1), sigma, 80, common.rng(0))
    few = [downstream.noise_and_denoise(gaussian, x0, sigma, 8, common.rng(1)) for _ in range(2)]
    assert torch.equal(*few), "all noise comes from `generator`"
    torch.testing.assert_close(x.mean(0), mean + gain @ (x0[0] - mean), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(x.T), want_cov, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["repaint", "pc_inpaint", "encode_decode", "noise_and_denoise"])
def test_what_is_restored_carries_no_gradient(downstream, name):
    net = common.UNet(width=8)
    x0 = torch.zeros(2, 1, 8, 8)
    hidden = torch.ones(1, 8, 8, dtype=torch.bool)
    sde = common.VP()
    sigmas = common.karras_sigmas(3, 80.0)
    inputs = {
        "repaint": (net, x0, hidden, sigmas),
        "pc_inpaint": (net, sde, x0, hidden, 2),
        "encode_decode": (net, sde, x0, 2),
        "noise_and_denoise": (net, x0, 1.0, 2),
    }
    assert not getattr(downstream, name)(*inputs[name]).requires_grad


# ---- which images are restored -------------------------------------------------------------------


def choose(downstream, n, num_f=10, num_g=30, seed=0):
    """choose_images for a test set whose first images are of D_f."""
    is_forgotten = torch.arange(num_f + num_g) < num_f
    return downstream.choose_images(is_forgotten, types.SimpleNamespace(n=n, seed=seed))


def test_chosen_are_n_images_of_d_f_and_then_n_of_d_g(downstream):
    chosen = choose(downstream, 8).tolist()
    assert len(set(chosen)) == 16
    assert max(chosen[:8]) < 10 <= min(chosen[8:])


def test_chosen_images_follow_the_seed(downstream):
    assert torch.equal(choose(downstream, 8), choose(downstream, 8))
    assert not torch.equal(choose(downstream, 8), choose(downstream, 8, seed=1))


def test_chosen_images_are_those_of_the_figures_in_the_readme(downstream):
    """D_f and D_g have the random streams 0 and 1 of the seed: others would change the figures."""
    chosen = choose(downstream, 8, seed=5)
    assert torch.equal(chosen[:8], common.random_subset(torch.arange(10), 8, 5, 0))
    assert torch.equal(chosen[8:], common.random_subset(torch.arange(10, 40), 8, 5, 1))


@pytest.mark.parametrize("num_f, num_g", [(10, 3), (3, 10)])
def test_too_few_images_to_choose_from_are_refused(downstream, num_f, num_g):
    run = run_function(choose, downstream, 4, num_f, num_g)
    check_refusal(run, "--n 4", "3 images of D_f" if num_f == 3 else "3 of D_g")


# ---- PSNR and SSIM -------------------------------------------------------------------------------


def random_images(seed, channels=1):
    shape = (4, channels, 28, 28)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=common.rng(seed))


GREY = torch.full((3, 1, 28, 28), 100, dtype=torch.uint8)
IMAGES = random_images(0)
NOISE = random_images(1)


@pytest.mark.parametrize("offset", [1, 20, 100, -100])
def test_psnr_of_a_constant_offset(downstream, offset):
    """In float: on bytes, 100 - 200 would be 156."""
    shifted = (GREY.int() + offset).byte()
    want = torch.full((3,), 20 * math.log10(255 / abs(offset))).double()
    torch.testing.assert_close(downstream.psnr(GREY, shifted), want)


def test_psnr_of_equal_images(downstream):
    assert (downstream.psnr(GREY, GREY) == 100).all()


@pytest.fixture(scope="module")
def right_half(downstream):
    """The mask that hides the right half of a 28x28 image."""
    return downstream.load_mask("half", 28, 28)


def test_psnr_of_the_hole_does_not_see_the_known_part(downstream, right_half):
    wrong_outside = torch.where(right_half, IMAGES, NOISE)
    assert (downstream.psnr(IMAGES, wrong_outside, right_half) == 100).all()
    assert (downstream.psnr(IMAGES, wrong_outside) < 20).all()


def test_psnr_of_the_hole_is_the_psnr_of_its_pixels(downstream, right_half):
    wrong_inside = torch.where(right_half, NOISE, IMAGES)
    squared_error = (IMAGES.double() - wrong_inside.double()) ** 2
    mean_error = squared_error[..., 14:].mean((1, 2, 3)) / 255**2
    got = downstream.psnr(IMAGES, wrong_inside, right_half)
    torch.testing.assert_close(got, -10 * mean_error.log10())


def test_ssim_of_a_hole_sees_that_hole_alone(downstream, right_half):
    wrong_on_the_right = torch.where(right_half, NOISE, IMAGES)
    far_left = torch.zeros(1, 28, 28, dtype=torch.bool)
    far_left[:, :, :9] = True  # windows centred on columns 5 to 8 end at column 13
    got = downstream.ssim(IMAGES, wrong_on_the_right, far_left)
    torch.testing.assert_close(got, torch.ones(4).double())


CHANNELS = pytest.mark.parametrize("channels", [1, 3])


@CHANNELS
def test_ssim_equals_scipys_gaussian_filter(downstream, channels):
    """Wang's index with moments from scipy, 11 taps, of the windows that lie inside the image."""
    ndimage = pytest.importorskip("scipy.ndimage")
    images = random_images(0, channels)
    others = images // 2 + random_images(1, channels) // 3

    def blur(values):
        blurred = ndimage.gaussian_filter(values, (0, 0, 1.5, 1.5), radius=(0, 0, 5, 5))
        return blurred[..., 5:-5, 5:-5]

    x = images.numpy() / 255
    y = others.numpy() / 255
    mean_x = blur(x)
    mean_y = blur(y)
    variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    index = likeness / ((mean_x**2 + mean_y**2 + 1e-4) * (variances + 9e-4))
    got = downstream.ssim(images, others).numpy()
    np.testing.assert_allclose(got, index.mean((1, 2, 3)), rtol=1e-9)


@CHANNELS
def test_ssim_of_equal_images(downstream, channels):
    images = random_images(0, channels)
    torch.testing.assert_close(downstream.ssim(images, images), torch.ones(4).double())


# ---- masks ---------------------------------------------------------------------------------------


def test_mask_rows_hides_the_band_of_celeba(downstream):
    hidden = downstream.load_mask("rows", 64, 64)[0]
    assert hidden[32:48].all()
    assert hidden.sum() == 16 * 64


def test_mask_half_hides_the_right_half(right_half):
    assert right_half[0, :, 14:].all()
    assert right_half.sum() == 14 * 28


@pytest.mark.parametrize("name", ["half", "rows", "center"])
def test_a_mask_of_a_wide_image_has_its_shape(downstream, name):
    hidden = downstream.load_mask(name, 24, 48)
    assert hidden.shape == (1, 24, 48)
    sizes = {"half": 24 * 24, "rows": 6 * 48, "center": 12 * 24}
    assert hidden.sum() == sizes[name]


def test_mask_center_hides_a_square_in_the_middle(downstream):
    hidden = downstream.load_mask("center", 28, 28)[0]
    assert hidden[7:21, 7:21].all()
    assert hidden.sum() == 14 * 14


@pytest.mark.parametrize("shape", [(56, 56), (56, 56, 3), (56, 56, 4)], ids=["grey", "rgb", "rgba"])
def test_a_png_is_scaled_to_the_image(downstream, tmp_path, shape):
    pixels = np.zeros(shape)
    pixels[10:30, 20:40] = 1
    if shape[2:] == (4,):
        pixels[..., 3] = 1  # opaque
    path = tmp_path / "hole.png"
    common.pyplot().imsave(path, pixels, cmap="gray")
    hidden = downstream.load_mask(str(path), 28, 28)[0]
    assert hidden[5:15, 10:20].all()
    assert hidden.sum() == 100


@pytest.mark.parametrize("name", ["repaint", "pc_inpaint"])
def test_known_pixels_are_the_inputs_to_the_bit(downstream, tmp_path, name):
    images = common.load_dataset("mnist", train=False).images[:7]
    argv = ["--forget", "3", "--quick", "--batch-size", "3", "--out", str(tmp_path)]
    args = downstream.arguments(argv)
    hidden = downstream.load_mask("center", 28, 28)
    net = common.load_net(ROOT / "data/mnist_base.pt", "")
    if name == "repaint":
        sigmas = common.karras_sigmas(3, 80.0)
        method = functools.partial(downstream.repaint, net, hidden=hidden, sigmas=sigmas)
    else:
        sde = common.VP()
        method = functools.partial(downstream.pc_inpaint, net, sde, hidden=hidden, steps=3)

    restored = downstream.restore(images, method, hidden, args, name)
    assert torch.equal(restored[:, ~hidden], images[:, ~hidden])
    assert not torch.equal(restored, images)


# ---- what a run writes ---------------------------------------------------------------------------

TINY = "--forget 3 --quick --n 3 --steps 3".split()


def forget_folder(out):
    return quick(out) / "mnist/forget-3"


def task_folder(out, task="inpaint-half"):
    return forget_folder(out) / "downstream" / task


def read_table(out, task="inpaint-half"):
    """The content of table.json of a task."""
    return read_json(task_folder(out, task) / "table.json")


def read_files(folder):
    """{path: content} of all files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_run(out, name="obt-rel-vp", method="obt-rel", noise=0.02):
    """A run of 03 as 05 finds it: the base with noise on its weights."""
    base = torch.load(ROOT / "data/mnist_base.pt", weights_only=True)
    ema = {}
    for key, weight in base["ema"].items():
        z = torch.randn(weight.shape, generator=common.rng(0))
        ema[key] = weight + noise * weight.abs().mean() * z
    path = forget_folder(out) / name / "model.pt"
    path.parent.mkdir(parents=True)
    args = {"method": method, "sde": "vp", "seed": 0}
    common.save_checkpoint(path, arch=base["arch"], ema=ema, args=args)


class Finished(NamedTuple):
    """A run of the script, with the folder that it was given as --out."""

    out: Path
    run: Run


@pytest.fixture(scope="module")
def inpainted(tmp_path_factory):
    """Inpainting with four runs of 03 and with one that is still in progress."""
    out = tmp_path_factory.mktemp("out")
    add_run(out, "obt-rel-vp", "obt-rel", noise=0.3)
    add_run(out, "siss-vp", "siss", noise=0.1)
    add_run(out, "unseen-vp", "unseen", noise=0.0)  # a copy of Standard
    add_run(out, "ort-ve-s1", "ort", noise=0.1)
    add_run(out, ".obt-vp.tmp1", "obt", noise=0.1)
    run = run_script("05", "--forget", 3, "--quick", "--task", "inpaint", "--out", out)
    check_success(run)
    return Finished(out, run)


@pytest.fixture(scope="module")
def rows(inpainted):
    """{model: {"D_f": measures, "D_g": measures}} of that run."""
    return read_table(inpainted.out)["results"]["repaint"]


PARTS = pytest.mark.parametrize("part", ["D_f", "D_g"])


def test_inpainting_writes_a_table_and_pictures(inpainted):
    names = {path.name for path in task_folder(inpainted.out).iterdir()}
    assert names == {"table.json", "pictures.png"}


def test_a_method_without_a_run_is_named_with_its_command(inpainted):
    """A run in progress is none."""
    (line,) = [line for line in inpainted.run.out.splitlines() if "no run of" in line]
    _, command = line.split("no run of obt: ")
    assert command.startswith("python 03_unlearn.py --dataset mnist --forget 3 ")
    assert command.endswith(" --method obt")


def test_the_next_step_is_named(inpainted):
    assert "next: " in inpainted.run.out


def test_rows_stand_in_the_papers_order(rows):
    assert list(rows) == ["clean", "Standard", "Unseen", "Ort-ve-s1", "Obt-rel", "Siss"]


def test_a_copy_of_standard_gets_standards_numbers(rows):
    """For the noise is the same; another model gets others."""
    assert rows["Unseen"] == rows["Standard"]
    assert rows["Obt-rel"] != rows["Standard"]


@PARTS
def test_the_originals_are_like_themselves(rows, part):
    assert rows["clean"][part]["psnr"] == 100
    assert rows["clean"][part]["psnr_hole"] == 100
    assert rows["clean"][part]["ssim"] == pytest.approx(1)


@PARTS
def test_the_hole_is_worse_than_the_whole(rows, part):
    measures = rows["Standard"][part]
    assert measures["psnr_hole"] < measures["psnr"] < 100
    assert measures["ssim_hole"] < 1


@PARTS
def test_accuracy_lies_in_its_interval(rows, part):
    low, high = rows["Standard"][part]["interval"]
    assert low <= rows["Standard"][part]["accuracy"] <= high


@PARTS
def test_accuracy_and_its_interval_are_printed(inpainted, rows, part):
    measures = rows["Standard"][part]
    low, high = measures["interval"]
    line = f"Standard{measures['accuracy']:13.1f} [{low:5.1f}, {high:5.1f}]"
    assert line in inpainted.run.out


def test_fd_is_measured_on_d_g_alone(rows):
    assert "fd" in rows["Standard"]["D_g"]
    assert "fd" not in rows["Standard"]["D_f"]


def test_fd_compares_test_images_with_training_images_of_d_g(downstream, inpainted, rows):
    """Of the originals, so that no model has a part in it; under --quick 1000 training images."""
    args = types.SimpleNamespace(**read_table(inpainted.out)["args"])
    train, test = common.load_train_and_test("mnist")
    judge = common.load_judge(arguments(inpainted.out, quick=True), train)
    chosen = downstream.choose_images(test.labels == 3, args)[args.n :]
    real = common.judge_images(judge, train.images[train.labels != 3][:1000])
    clean = common.judge_images(judge, test.images[chosen])
    want = common.frechet_distance(clean.features, real.features)
    assert rows["clean"]["D_g"]["fd"] == pytest.approx(want, rel=1e-6)
    is_right = clean.labels == test.labels[chosen]
    share = 100 * is_right.float().mean().item()
    assert rows["clean"]["D_g"]["accuracy"] == pytest.approx(share)


class Reconstructed(NamedTuple):
    """A run of the second task in a folder where the first had been done."""

    out: Path
    picture_before: bytes  # the first task's, before the second


@pytest.fixture(scope="module")
def reconstructed(tmp_path_factory):
    """Inpainting, then reconstruction from three levels of noise, out of order."""
    out = tmp_path_factory.mktemp("out")
    add_run(out)
    check_success(run_script("05", *TINY, "--out", out))
    picture = (task_folder(out) / "pictures.png").read_bytes()
    flags = ["--task", "reconstruct", "--sigmas", 1.5, 0.1, 45]
    check_success(run_script("05", *TINY, *flags, "--out", out))
    return Reconstructed(out, picture)


@pytest.fixture(scope="module")
def reconstruct_results(reconstructed):
    """{how it is restored: {model: measures}}."""
    return read_table(reconstructed.out, "reconstruct")["results"]


def test_reconstruction_writes_a_curve_too(reconstructed):
    names = {path.name for path in task_folder(reconstructed.out, "reconstruct").iterdir()}
    assert names == {"table.json", "pictures.png", "curve.png"}


def test_reconstruction_goes_through_the_noise_in_order(reconstruct_results):
    assert list(reconstruct_results) == ["sigma 0.1", "sigma 1.5", "sigma 45", "latent"]


def test_reconstruction_has_no_hole_to_measure(reconstruct_results):
    assert "psnr_hole" not in reconstruct_results["latent"]["Standard"]["D_f"]


def test_more_noise_leaves_less_of_the_image(reconstruct_results):
    psnr = []
    for name in ("sigma 0.1", "sigma 1.5", "sigma 45"):
        psnr.append(reconstruct_results[name]["Standard"]["D_g"]["psnr"])
    assert psnr[0] > 25
    assert 25 > psnr[1]
    assert psnr[1] > psnr[2]


def test_models_are_not_judged_where_nothing_of_the_image_is_left(reconstructed):
    assert read_table(reconstructed.out, "reconstruct")["judged_by"] != "sigma 45"


def test_reconstruction_leaves_the_other_task_alone(reconstructed):
    picture = (task_folder(reconstructed.out) / "pictures.png").read_bytes()
    assert picture == reconstructed.picture_before


# ---- what the flags do ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measures_of_standard(tmp_path_factory):
    """measures_of_standard(flags) -> Standard's measures for each way of restoring, a list.

    The same flags run the script only once.
    """

    @functools.cache
    def run(flags):
        out = tmp_path_factory.mktemp("out")
        add_run(out)
        check_success(run_script("05", *TINY, *flags.split(), "--out", out))
        (path,) = quick(out).glob("mnist/forget-3/downstream/*/table.json")
        results = read_json(path)["results"]
        return [rows["Standard"] for rows in results.values()]

    return run


INPAINT = [
    "",
    "--seed 1",
    "--n 4",
    "--steps 4",
    "--resample 1",
    "--mask rows",
    "--sde ve",
    "--batch-size 2",
    "--paper",
]
RECONSTRUCT = [
    "--task reconstruct --sigmas 0.7",
    "--task reconstruct --sigmas 0.7 --sde subvp",
    "--task reconstruct --sigmas 0.7 --steps 4",
    "--task reconstruct --sigmas 0.7 --seed 1",
]


@pytest.mark.parametrize("flags", INPAINT, ids=lambda flags: flags or "defaults")
def test_no_flag_of_inpainting_is_ignored(measures_of_standard, flags):
    """Each changes Standard's measures, and no two alike."""
    for others in INPAINT:
        if others != flags:
            assert measures_of_standard(flags) != measures_of_standard(others), others


@pytest.mark.parametrize("flags", RECONSTRUCT)
def test_no_flag_of_reconstruction_is_ignored(measures_of_standard, flags):
    """Each changes Standard's measures, and no two alike."""
    for others in RECONSTRUCT:
        if others != flags:
            assert measures_of_standard(flags) != measures_of_standard(others), others


def test_runs_chooses_rows(script, tmp_path):
    add_run(tmp_path, "obt-rel-vp", "obt-rel")
    add_run(tmp_path, "ort-vp", "ort")
    check_success(script("05", *TINY, "--runs", "ort-vp", "--out", tmp_path))
    assert list(read_table(tmp_path)["results"]["repaint"]) == ["clean", "Standard", "Ort"]


class WithClip(NamedTuple):
    """A run with --clip-weights."""

    rows: dict  # of its table
    printed: str


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory):
    """A run with a stand-in for open_clip, whose features are the image's mean and 1."""
    out = tmp_path_factory.mktemp("out")
    add_run(out)
    weights = out / "weights.pt"
    weights.write_bytes(b"x")

    class Model(torch.nn.Module):
        def encode_image(self, x):
            return torch.stack([x.mean((1, 2, 3)), torch.ones(len(x))], 1)

    def prepare(image):
        return torch.tensor(np.array(image)).float()[None] / 255

    def create_model_and_transforms(name, pretrained):
        return Model(), None, prepare

    package = types.SimpleNamespace(create_model_and_transforms=create_model_and_transforms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "open_clip", package)
        run = run_script("05", *TINY, "--clip-weights", weights, "--out", out)
    check_success(run)
    return WithClip(read_table(out)["results"]["repaint"], run.out)


def test_clip_distance_is_printed(with_clip):
    assert "clip_distance" in with_clip.printed


def test_clip_distance_is_measured_on_d_g_alone(with_clip):
    assert "clip_distance" not in with_clip.rows["Standard"]["D_f"]


def test_clip_distance_of_the_originals_is_zero(with_clip):
    assert with_clip.rows["clean"]["D_g"]["clip_distance"] == pytest.approx(0, abs=1e-6)


def test_clip_distance_of_restored_images_is_small_and_not_zero(with_clip):
    assert 0 < with_clip.rows["Standard"]["D_g"]["clip_distance"] < 0.1


# ---- bad input and failures ----------------------------------------------------------------------

MAKE_7 = "python 03_unlearn.py --dataset mnist --forget 7"


@pytest.mark.parametrize(
    "flags, word",
    [
        pytest.param("--quick", "--forget 3", id="no forget"),
        pytest.param("--forget eleven", "0, 1, 2", id="unknown class"),
        pytest.param("--forget 7", MAKE_7, id="no runs"),
        pytest.param("--forget 3 --task colour", "reconstruct", id="task"),
        pytest.param("--forget 3 --mask hat", "half, rows, center", id="mask"),
        pytest.param(
            "--forget 3 --task reconstruct --mask rows", "--mask", id="mask of another task"
        ),
        pytest.param("--forget 3 --sigmas 1", "--sigmas", id="sigmas of another task"),
        pytest.param("--forget 3 --paper --resample 2", "--resample", id="resample and paper"),
        pytest.param("--forget 3 --task reconstruct --sigmas 0", "--sigmas", id="sigma"),
        pytest.param("--forget 3 --n 5000", "1,010 images", id="n"),
        pytest.param("--forget 3 --steps 0", "--steps", id="steps"),
        pytest.param("--forget 3 --runs obt-vp", "obt-rel-vp", id="runs"),
        pytest.param("--forget 3 --dataset imagenet", "mnist", id="data set"),
        pytest.param(
            "--forget 3 --clip-weights nowhere.pt", "pip install open_clip_torch", id="clip"
        ),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(script, tmp_path, flags, word):
    add_run(tmp_path)
    before = read_files(tmp_path)
    check_refusal(script("05", "--quick", *flags.split(), "--out", tmp_path), word)
    assert read_files(tmp_path) == before


@pytest.mark.parametrize("value, word", [(0.0, "nothing"), (1.0, "everything")])
def test_a_mask_that_hides_nothing_or_everything(script, tmp_path, value, word):
    add_run(tmp_path)
    path = tmp_path / "m.png"
    common.pyplot().imsave(path, np.full((28, 28), value), cmap="gray", vmin=0, vmax=1)
    check_refusal(script("05", *TINY, "--mask", path, "--out", tmp_path), word)


def test_a_damaged_run_names_the_command(script, tmp_path):
    add_run(tmp_path)
    (forget_folder(tmp_path) / "obt-rel-vp/model.pt").write_bytes(b"not a checkpoint")
    run = script("05", *TINY, "--out", tmp_path)
    check_refusal(run, "python 03_unlearn.py --dataset mnist --forget 3")


def test_a_failed_run_leaves_the_finished_one(script, tmp_path, monkeypatch):
    add_run(tmp_path)
    check_success(script("05", *TINY, "--out", tmp_path))
    before = read_files(tmp_path)

    def refuse(*args):
        common.exit_with_error("no measure")

    monkeypatch.setattr(common, "frechet_distance", refuse)
    other = ("--seed", 1, "--overwrite")
    check_refusal(script("05", *TINY, *other, "--out", tmp_path), "no measure")
    assert read_files(tmp_path) == before


def test_a_diverged_model_ends_with_advice(script, tmp_path):
    add_run(tmp_path, noise=math.nan)
    check_refusal(script("05", *TINY, "--out", tmp_path), "diverged")
    assert not task_folder(tmp_path).exists()


def test_after_a_real_run_of_03_as_a_process(script, tmp_path):
    unlearn_flags = "--forget 3 --quick --steps 1 --n 10 --nfe 2".split()
    check_success(script("03", *unlearn_flags, "--out", tmp_path))
    run = run_process(SCRIPTS["05"], *TINY, "--out", tmp_path, cwd=tmp_path)
    check_success(run)
    assert run.err == ""
    names = list(read_table(tmp_path)["results"]["repaint"])
    assert names == ["clean", "Standard", "Obt-rel-vp-steps1"]
