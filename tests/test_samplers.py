"""Samplers with an exact score: the right distribution, the right order, no leak between images."""

import math

import pytest
import torch

import common


def w2_squared(x, mean, cov):
    """Squared 2-Wasserstein distance of N(mean of x, covariance of x) and N(mean, cov)."""
    sample_cov = torch.cov(x.T)
    eigenvalues, eigenvectors = torch.linalg.eigh(sample_cov)
    lengths = eigenvalues.clamp(min=0).sqrt()
    root = (eigenvectors * lengths) @ eigenvectors.T
    squares = torch.linalg.eigvalsh(root @ cov @ root)
    cross = squares.clamp(min=0).sqrt().sum()
    between_means = (x.mean(0) - mean).square().sum()
    traces = sample_cov.trace() + cov.trace()
    return (between_means + traces - 2 * cross).item()


def distance_to_endpoint(x, gaussian, sigma=0.01):
    """Squared distance of samples x to what an exact sampler returns, x0_hat at the last level.

    x0_hat has the mean of the data and the covariance S (S + sigma^2)^-1 S.
    """
    cov = gaussian.covs[0]
    noised_cov = cov + sigma**2 * torch.eye(2, dtype=cov.dtype)
    endpoint_cov = cov @ torch.linalg.solve(noised_cov, cov)
    return w2_squared(x, gaussian.means[0], endpoint_cov)


def order_of_convergence(error, error_of_half_the_step):
    """The p for which the error falls as step^p."""
    return math.log2(error / error_of_half_the_step)


# ---- predictor and corrector ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "sde", [common.VE(), common.VP(), common.SubVP()], ids=["ve", "vp", "subvp"]
)
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("corrector", [False, True], ids=["p", "pc"])
def test_pc_sampler(sde, predictor, corrector, gaussian):
    """Every predictor with every SDE, also sub-VP with the corrector, where score_sde crashes."""
    x = sde.prior((20000, 2), common.rng(0)).double()
    x = common.pc_sample(
        gaussian,
        sde,
        x,
        steps=300,
        predictor=predictor,
        corrector=corrector,
        generator=common.rng(1),
    )
    assert distance_to_endpoint(x, gaussian) < 0.004


@pytest.mark.parametrize("steps", [999, 199], ids=["all levels", "respaced"])
def test_ddpm_ancestral_sampling(steps, gaussian):
    sde = common.DDPM()
    x = sde.prior((20000, 2), common.rng(0)).double()
    x = common.pc_sample(
        gaussian, sde, x, steps, "ancestral", corrector=False, generator=common.rng(1)
    )
    assert distance_to_endpoint(x, gaussian) < 0.01


def test_ddpm_ancestral_step_is_algorithm_2(gaussian):
    """Ho et al. 2020, Algorithm 2, with the posterior variance, written out by its own symbols."""
    sde = common.DDPM()
    start = torch.randn(100, 2, generator=common.rng(0), dtype=torch.float64)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    got = common.pc_sample(
        gaussian, sde, start, 999, "ancestral", corrector=False, generator=common.rng(1)
    )

    def score(x, level):
        t = torch.full((100,), level / 1000, dtype=torch.float64)
        return common.score_fn(gaussian, sde, x, t)

    x = start
    noise = common.rng(1)
    for k in range(999, 0, -1):  # from index k, which is level k + 1, to index k - 1
        std = torch.sqrt(1 - alpha_bar[k])
        eps = -score(x, k + 1) * std
        mean = (x - beta[k] / std * eps) / torch.sqrt(1 - beta[k])
        variance = beta[k] * (1 - alpha_bar[k - 1]) / (1 - alpha_bar[k])
        x = mean + torch.sqrt(variance) * torch.randn(x.shape, generator=noise)
    want = (x + (1 - alpha_bar[0]) * score(x, 1)) / torch.sqrt(alpha_bar[0])

    # The tolerance is wide because pc_sample keeps its times in float32.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_pc_sampler_improves_with_steps(gaussian):
    sde = common.VP()
    errors = []
    for steps in (20, 60, 180):
        x = sde.prior((20000, 2), common.rng(0)).double()
        x = common.pc_sample(gaussian, sde, x, steps, corrector=False, generator=common.rng(1))
        errors.append(distance_to_endpoint(x, gaussian))
    assert errors[0] > 2 * errors[1]
    assert errors[1] > 2 * errors[2]


def test_pc_rejects_an_unknown_predictor(gaussian):
    with pytest.raises(ValueError, match="magic"):
        common.pc_sample(gaussian, common.VP(), torch.zeros(2, 2), 2, predictor="magic")


# ---- the probability-flow ODE --------------------------------------------------------------------


def exact_flow(gaussian, y, phi_start, phi_end):
    """The probability-flow ODE of a Gaussian in closed form, from y at phi_start to phi_end.

    On the axes of the covariance, x_hat - mean scales as sqrt(eigenvalue + sigma^2).
    """
    sd = gaussian.sd
    sigma_start = sd * math.tan(phi_start)
    sigma_end = sd * math.tan(phi_end)
    mean = gaussian.means[0]
    eigenvalues = gaussian.eigenvalues[0]
    eigenvectors = gaussian.eigenvectors[0]
    local = (y * math.hypot(sigma_start, sd) - mean) @ eigenvectors
    scale = ((eigenvalues + sigma_end**2) / (eigenvalues + sigma_start**2)).sqrt()
    x_hat = mean + (local * scale) @ eigenvectors.T
    return x_hat / math.hypot(sigma_end, sd)


def test_heun_converges_with_order_two(gaussian):
    y = torch.randn(50, 2, generator=common.rng(0), dtype=torch.float64)
    want = exact_flow(gaussian, y, 1.5, 0.1)

    def error(steps):
        phis = torch.linspace(1.5, 0.1, steps + 1, dtype=torch.float64)
        return (common.heun_solve(gaussian, y, phis) - want).abs().max()

    assert order_of_convergence(error(40), error(80)) == pytest.approx(2, abs=0.3)


def test_encode_decode_round_trip(gaussian):
    y = torch.randn(50, 2, generator=common.rng(0), dtype=torch.float64)
    sigmas = common.karras_sigmas(200, 152.0, 0.001).double()
    phis = torch.atan(sigmas / gaussian.sd)
    latent = common.heun_solve(gaussian, y, phis.flip(0))
    assert (common.heun_solve(gaussian, latent, phis) - y).abs().max() < 1e-3


def test_ode_sample_has_the_right_distribution(gaussian):
    noise = torch.randn(20000, 2, generator=common.rng(0), dtype=torch.float64)
    x = common.ode_sample(gaussian, noise, common.karras_sigmas(30, 80.0).double())
    assert distance_to_endpoint(x, gaussian) < 0.002


# ---- DPM-Solver++ --------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_has_the_right_distribution_and_improves(eta, gaussian):
    noise = torch.randn(20000, 2, generator=common.rng(0), dtype=torch.float64)
    errors = []
    for n in (16, 32, 64):
        sigmas = common.karras_sigmas(n, 80.0).double()
        x = common.dpmpp_sample(gaussian, noise, sigmas, eta, common.rng(1))
        errors.append(distance_to_endpoint(x, gaussian))
    assert errors[0] > errors[1]
    assert errors[2] < 0.002


def test_deterministic_dpmpp_converges_with_order_two(gaussian):
    noise = torch.randn(50, 2, generator=common.rng(0), dtype=torch.float64)

    def draw(steps):
        sigmas = torch.logspace(math.log10(80), -2, steps + 1, dtype=torch.float64)
        return common.dpmpp_sample(gaussian, noise, sigmas)

    want = draw(4000)
    error_100 = (draw(100) - want).abs().max()
    error_200 = (draw(200) - want).abs().max()
    assert order_of_convergence(error_100, error_200) == pytest.approx(2, abs=0.4)


# ---- images of a batch ---------------------------------------------------------------------------


@pytest.fixture
def small_unet():
    """A small U-Net with random weights."""
    torch.manual_seed(0)
    net = common.UNet(width=32, sd=0.6)
    for w in net.parameters():
        # The zero-initialised layers too, so that the output depends on everything.
        torch.nn.init.normal_(w, std=0.05)
    return net.eval()


def draw_by_ode(net, noise):
    return common.ode_sample(net, noise, common.karras_sigmas(5, 80.0))


def draw_by_dpmpp(net, noise):
    return common.dpmpp_sample(net, noise, common.karras_sigmas(5, 80.0), 1.0)


def draw_by_pc(net, noise):
    return common.pc_sample(net, common.VP(), noise, steps=5)


@pytest.mark.parametrize("draw", [draw_by_ode, draw_by_dpmpp, draw_by_pc])
def test_an_image_does_not_depend_on_its_batch(draw, small_unet, monkeypatch):
    def constant_noise(shape, generator, device="cpu"):
        """The same noise for any batch."""
        return torch.full(shape, 0.3)

    monkeypatch.setattr(common, "randn", constant_noise)
    noise = torch.randn(6, 1, 28, 28, generator=common.rng(0))
    together = draw(small_unet, noise)
    alone = draw(small_unet, noise[2:3])
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)


def test_sample_images_gives_image_i_whatever_n_is(small_unet):
    def draw(n):
        shape = (1, 28, 28)
        sde = common.VP()
        return common.sample_images(small_unet, n, shape, sde, seed=3, nfe=3, batch=8)

    assert torch.equal(draw(11)[:5], draw(5))
