"""Samplers with an exact score: the right distribution, the right order, no leak between the images of a batch."""
import math

import pytest
import torch

import common as c


def w2_squared(x, mean, cov):
    """Squared 2-Wasserstein distance between N(sample mean, sample cov) and N(mean, cov)."""
    a = torch.cov(x.T)
    val, vec = torch.linalg.eigh(a)
    root = (vec * val.clamp(min=0).sqrt()) @ vec.T
    cross = torch.linalg.eigvalsh(root @ cov @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - mean).square().sum() + a.trace() + cov.trace() - 2 * cross).item()


def endpoint_cov(gaussian, sigma=0.01):
    """Covariance of x0_hat at the last noise level: S (S + sigma^2)^-1 S."""
    S = gaussian.covs[0]
    return S @ torch.linalg.solve(S + sigma**2 * torch.eye(2, dtype=S.dtype), S)


@pytest.mark.parametrize("sde", [c.VE(), c.VP(), c.SubVP()], ids=["ve", "vp", "subvp"])
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("corrector", [False, True], ids=["p", "pc"])
def test_pc_sampler(sde, predictor, corrector, gaussian):
    """Every predictor with every SDE, sub-VP with the corrector included: score_sde crashes there."""
    n = 20000
    x = sde.prior((n, 2), c.rng(0)).double()
    x = c.pc_sample(gaussian, sde, x, steps=300, predictor=predictor, corrector=corrector, generator=c.rng(1))
    assert w2_squared(x, gaussian.means[0], endpoint_cov(gaussian)) < 0.004


@pytest.mark.parametrize("steps", [999, 199])
def test_ddpm_ancestral_sampling(steps, gaussian):
    """All 1000 levels, and respaced."""
    sde = c.DDPM()
    x = c.pc_sample(gaussian, sde, sde.prior((20000, 2), c.rng(0)).double(), steps, "ancestral", corrector=False, generator=c.rng(1))
    assert w2_squared(x, gaussian.means[0], endpoint_cov(gaussian)) < 0.01


def test_ddpm_ancestral_step_is_algorithm_2(gaussian):
    """Ho et al. 2020, Algorithm 2, with the posterior variance, written out by its own symbols."""
    sde, x = c.DDPM(), torch.randn(100, 2, generator=c.rng(0), dtype=torch.float64)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    got = c.pc_sample(gaussian, sde, x, 999, "ancestral", corrector=False, generator=c.rng(1))
    noise = c.rng(1)
    for k in range(999, 0, -1):  # from index k (level k + 1) to index k - 1
        t = torch.full((100,), (k + 1) / 1000, dtype=torch.float64)
        eps = -c.score_fn(gaussian, sde, x, t) * torch.sqrt(1 - alpha_bar[k])
        x = (x - beta[k] / torch.sqrt(1 - alpha_bar[k]) * eps) / torch.sqrt(1 - beta[k])
        x = x + torch.sqrt(beta[k] * (1 - alpha_bar[k - 1]) / (1 - alpha_bar[k])) * torch.randn(x.shape, generator=noise)
    t = torch.full((100,), 1 / 1000, dtype=torch.float64)
    want = (x + (1 - alpha_bar[0]) * c.score_fn(gaussian, sde, x, t)) / torch.sqrt(alpha_bar[0])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)  # pc_sample keeps its times in float32


def test_pc_sampler_improves_with_steps(gaussian):
    sde, errors = c.VP(), []
    for steps in (20, 60, 180):
        x = c.pc_sample(gaussian, sde, sde.prior((20000, 2), c.rng(0)).double(), steps, corrector=False, generator=c.rng(1))
        errors.append(w2_squared(x, gaussian.means[0], endpoint_cov(gaussian)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_pc_rejects_an_unknown_predictor(gaussian):
    with pytest.raises(ValueError, match="magic"):
        c.pc_sample(gaussian, c.VP(), torch.zeros(2, 2), 2, predictor="magic")


def exact_flow(gaussian, y, phi0, phi1):
    """The probability-flow ODE of a Gaussian in closed form: in the eigenbasis of S, (x_hat - m) scales as sqrt(val + sigma^2)."""
    sd = gaussian.sd
    s0, s1 = sd * math.tan(phi0), sd * math.tan(phi1)
    val, vec = gaussian.val[0], gaussian.vec[0]
    local = (y * math.hypot(s0, sd) - gaussian.means[0]) @ vec
    return (gaussian.means[0] + (local * ((val + s1**2) / (val + s0**2)).sqrt()) @ vec.T) / math.hypot(s1, sd)


def test_heun_converges_with_order_two(gaussian):
    y = torch.randn(50, 2, generator=c.rng(0), dtype=torch.float64)
    want = exact_flow(gaussian, y, 1.5, 0.1)
    errors = [(c.heun_solve(gaussian, y, torch.linspace(1.5, 0.1, n + 1, dtype=torch.float64)) - want).abs().max() for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.3)


def test_encode_decode_round_trip(gaussian):
    y = torch.randn(50, 2, generator=c.rng(0), dtype=torch.float64)
    phis = torch.atan(c.karras_sigmas(200, 152.0, 0.001).double() / gaussian.sd)
    assert (c.heun_solve(gaussian, c.heun_solve(gaussian, y, phis.flip(0)), phis) - y).abs().max() < 1e-3


def test_ode_sample_has_the_right_distribution(gaussian):
    x = c.ode_sample(gaussian, torch.randn(20000, 2, generator=c.rng(0), dtype=torch.float64), c.karras_sigmas(30, 80.0).double())
    assert w2_squared(x, gaussian.means[0], endpoint_cov(gaussian)) < 0.002


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_has_the_right_distribution_and_improves(eta, gaussian):
    noise, errors = torch.randn(20000, 2, generator=c.rng(0), dtype=torch.float64), []
    for n in (16, 32, 64):
        x = c.dpmpp_sample(gaussian, noise, c.karras_sigmas(n, 80.0).double(), eta, c.rng(1))
        errors.append(w2_squared(x, gaussian.means[0], endpoint_cov(gaussian)))
    assert errors[0] > errors[1] and errors[2] < 0.002


def test_deterministic_dpmpp_converges_with_order_two(gaussian):
    noise = torch.randn(50, 2, generator=c.rng(0), dtype=torch.float64)
    grid = lambda n: torch.logspace(math.log10(80), -2, n + 1, dtype=torch.float64)
    run = lambda n: c.dpmpp_sample(gaussian, noise, grid(n))
    want = run(4000)
    errors = [(run(n) - want).abs().max() for n in (100, 200)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.4)


@pytest.fixture
def small_unet():
    torch.manual_seed(0)
    net = c.UNet(width=32, sd=0.6)
    for w in net.parameters():  # the zero-initialised layers too, so that the output depends on everything
        torch.nn.init.normal_(w, std=0.05)
    return net.eval()


def test_an_image_does_not_depend_on_its_batch(small_unet, monkeypatch):
    noise = torch.randn(6, 1, 28, 28, generator=c.rng(0))
    monkeypatch.setattr(c, "randn", lambda shape, generator, device="cpu": torch.full(shape, 0.3))  # same noise for any batch
    sde = c.VP()
    for run in (
        lambda x: c.ode_sample(small_unet, x, c.karras_sigmas(5, 80.0)),
        lambda x: c.dpmpp_sample(small_unet, x, c.karras_sigmas(5, 80.0), 1.0),
        lambda x: c.pc_sample(small_unet, sde, x, steps=5),
    ):
        torch.testing.assert_close(run(noise)[2:3], run(noise[2:3]), rtol=1e-4, atol=1e-5)


def test_sample_images_gives_image_i_whatever_n_is(small_unet):
    draw = lambda n: c.sample_images(small_unet, n, (1, 28, 28), c.VP(), seed=3, nfe=3, batch=8)
    assert torch.equal(draw(11)[:5], draw(5))
