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


def normal(*shape, seed=0):
    """Gaussian noise of this shape in float64, the same for the same seed."""
    return torch.randn(shape, generator=common.rng(seed), dtype=torch.float64)


def order_of_convergence(error, error_of_half_the_step):
    """The p for which the error falls as step^p."""
    return math.log2(error / error_of_half_the_step)


# ---- predictor and corrector ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "sde", [common.VE(), common.VP(), common.SubVP()], ids=["ve", "vp", "subvp"]
)
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("corrector", [None, "langevin", "ald"])
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
        gaussian, sde, x, steps, "ancestral", corrector=None, generator=common.rng(1)
    )
    assert distance_to_endpoint(x, gaussian) < 0.01


def test_ddpm_ancestral_step_is_algorithm_2(gaussian):
    """Ho et al. 2020, Algorithm 2, with the posterior variance, written out by its own symbols."""
    sde = common.DDPM()
    start = normal(100, 2)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    got = common.pc_sample(
        gaussian, sde, start, 999, "ancestral", corrector=None, generator=common.rng(1)
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
        x = common.pc_sample(gaussian, sde, x, steps, corrector=None, generator=common.rng(1))
        errors.append(distance_to_endpoint(x, gaussian))
    assert errors[0] > 2 * errors[1]
    assert errors[1] > 2 * errors[2]


def test_pc_rejects_an_unknown_predictor(gaussian):
    with pytest.raises(ValueError, match="magic"):
        common.pc_sample(gaussian, common.VP(), torch.zeros(2, 2), 2, predictor="magic")


@pytest.mark.parametrize("corrector", [True, "magic"])
def test_pc_rejects_an_unknown_corrector(gaussian, corrector):
    with pytest.raises(ValueError, match=str(corrector)):
        common.pc_sample(gaussian, common.VP(), torch.zeros(2, 2), 2, corrector=corrector)


def langevin_inputs(shape):
    """Point, score and noise of this shape; the scores of two images differ in length by 10."""
    generator = common.rng(0)
    x = torch.randn(shape, generator=generator)
    score = torch.randn(shape, generator=generator)
    score[0] *= 10
    noise = torch.randn(shape, generator=generator)
    return x, score, noise


def score_sde_step(x, score, noise, alpha, snr, ratio):
    """Song et al. 2021, Algorithm 5, in its own symbols, for a given |noise|/|score|."""
    step_size = 2 * alpha * (snr * ratio) ** 2
    return x + step_size * score + math.sqrt(2 * step_size) * noise


def test_langevin_step_measures_each_image_by_itself():
    x, score, noise = langevin_inputs((2, 1, 8, 8))
    std = torch.full((2,), 99.0)  # has no part in it
    decay = torch.full((2, 1, 1, 1), 0.9)
    got = common.langevin_step(x, score, noise, std, decay, snr=0.2)
    for i in range(2):
        noise_length = noise[i].norm().item()
        ratio = noise_length / score[i].norm().item()
        want = score_sde_step(x[i], score[i], noise[i], 0.9**2, 0.2, ratio)
        torch.testing.assert_close(got[i], want)


def test_langevin_step_of_points_averages_over_the_batch():
    """What score_sde does for images too: mean length of the noise over mean length of scores."""
    x, score, noise = langevin_inputs((5, 2))
    std = torch.ones(5)
    decay = torch.ones(5, 1)
    got = common.langevin_step(x, score, noise, std, decay, snr=0.2)
    noise_length = noise.norm(dim=1).mean().item()
    score_length = score.norm(dim=1).mean().item()
    want = score_sde_step(x, score, noise, 1.0, 0.2, noise_length / score_length)
    torch.testing.assert_close(got, want)


def test_ald_step_takes_the_lengths_at_their_expectation():
    """|score| = |noise|/std, whatever the lengths are."""
    x, score, noise = langevin_inputs((2, 1, 8, 8))
    std = torch.tensor([0.5, 3.0])
    decay = torch.ones(2, 1, 1, 1)
    got = common.langevin_step(x, score, noise, std, decay, 0.2, norms="ald")
    for i, ratio in enumerate((0.5, 3.0)):
        want = score_sde_step(x[i], score[i], noise[i], 1.0, 0.2, ratio)
        torch.testing.assert_close(got[i], want)


# ---- the probability-flow ODE --------------------------------------------------------------------


def exact_flow(gaussian, x_hat, sigma_start, sigma_end):
    """The probability-flow ODE of a Gaussian in closed form, from x_hat at one sigma to another.

    On the axes of the covariance, x_hat - mean scales as sqrt(eigenvalue + sigma^2).
    """
    mean = gaussian.means[0]
    eigenvalues = gaussian.eigenvalues[0]
    eigenvectors = gaussian.eigenvectors[0]
    scale = ((eigenvalues + sigma_end**2) / (eigenvalues + sigma_start**2)).sqrt()
    return mean + ((x_hat - mean) @ eigenvectors * scale) @ eigenvectors.T


@pytest.mark.parametrize("ends", [(10.0, 0.1), (0.1, 10.0)], ids=["decode", "encode"])
def test_heun_converges_with_order_two(gaussian, ends):
    x_hat = normal(50, 2)
    want = exact_flow(gaussian, x_hat, *ends)

    def error(steps):
        logs = [math.log10(end) for end in ends]
        sigmas = torch.logspace(*logs, steps + 1, dtype=torch.float64)
        return (common.heun_solve(gaussian, x_hat, sigmas) - want).abs().max()

    assert order_of_convergence(error(40), error(80)) == pytest.approx(2, abs=0.3)


def test_heun_is_exact_where_data_and_noise_are_constant():
    """With one image as data z_hat never changes on the way: one step, however long, is enough."""
    image = normal(1, 1, 4, 4)
    noise = normal(3, 1, 4, 4, seed=1)

    def z_hat(x_hat, sigma):
        return (x_hat - image) / common.expand_like(sigma, x_hat)

    net = common.ExactNet(z_hat, sd=0.5)
    sigmas = torch.tensor([80.0, 0.01]).double()
    x_hat = common.heun_solve(net, image + 80 * noise, sigmas)
    torch.testing.assert_close(x_hat, image + 0.01 * noise)


def edm_heun(net, noise, sigmas):
    """Karras et al. 2022, Algorithm 1, in its own symbols (D the denoiser), without churn."""
    t = [*sigmas.tolist(), 0.0]

    def slope(x, sigma):
        sigmas = torch.full((len(x),), sigma, dtype=x.dtype)
        denoised, _ = common.predict(net, x, sigmas)
        return (x - denoised) / sigma

    x = noise * t[0]
    for now, after in zip(t[:-1], t[1:]):
        d = slope(x, now)
        x_next = x + (after - now) * d
        if after != 0:
            x_next = x + (after - now) * (0.5 * d + 0.5 * slope(x_next, after))
        x = x_next
    return x


@pytest.mark.parametrize("num_evaluations", [9, 19, 29])
def test_ode_sample_is_as_near_to_the_gaussian_as_edms_own_step(gaussian, num_evaluations):
    """Wasserstein distance at few evaluations; a step in phi is many times further away at 9."""
    noise = normal(20000, 2)
    sigmas = common.karras_sigmas((num_evaluations + 1) // 2, 80.0).double()
    ours = distance_to_endpoint(common.ode_sample(gaussian, noise, sigmas), gaussian)
    edm = distance_to_endpoint(edm_heun(gaussian, noise, sigmas), gaussian)
    assert ours < 1.001 * edm + 1e-9


def test_heun_there_and_back_is_a_round_trip(gaussian):
    x_hat = normal(50, 2)
    sigmas = common.karras_sigmas(200, 152.0, 0.001).double()
    latent = common.heun_solve(gaussian, x_hat, sigmas.flip(0))
    back = common.heun_solve(gaussian, latent, sigmas)
    assert (back - x_hat).abs().max() < 1e-3


def test_ode_sample_has_the_right_distribution(gaussian):
    noise = normal(20000, 2)
    x = common.ode_sample(gaussian, noise, common.karras_sigmas(30, 80.0).double())
    assert distance_to_endpoint(x, gaussian) < 0.002


# ---- DPM-Solver++ --------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_has_the_right_distribution_and_improves(eta, gaussian):
    noise = normal(20000, 2)
    errors = []
    for n in (16, 32, 64):
        sigmas = common.karras_sigmas(n, 80.0).double()
        x = common.dpmpp_sample(gaussian, noise, sigmas, eta, common.rng(1))
        errors.append(distance_to_endpoint(x, gaussian))
    assert errors[0] > errors[1]
    assert errors[2] < 0.002


def test_deterministic_dpmpp_converges_with_order_two(gaussian):
    noise = normal(50, 2)

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


@pytest.mark.parametrize("draw", [draw_by_ode, draw_by_dpmpp, draw_by_pc])
def test_samples_carry_no_gradient(draw, small_unet):
    """With a graph of all steps behind them a few samples would fill the memory."""
    assert not draw(small_unet, torch.randn(2, 1, 28, 28)).requires_grad


class FirstLook:
    """A network that answers 0 and keeps the first noisy images of each batch that it sees."""

    sd = 0.5

    def __init__(self):
        self.batches = []
        self.phi = 0.0

    def __call__(self, y, phi):
        if phi[0] >= self.phi:  # the noise falls within a batch, so here a new one begins
            self.batches.append(y)
        self.phi = phi[0]
        return torch.zeros_like(y)


@pytest.mark.parametrize("sde", [common.VP(), common.DDPM()], ids=["vp", "ddpm"])
def test_each_batch_starts_from_its_own_noise_of_the_seed(sde):
    net = FirstLook()
    common.sample_images(net, 5, (1, 4, 4), sde, seed=7, nfe=4, batch=2)
    assert len(net.batches) == 3
    for k, y in enumerate(net.batches):
        want = common.randn((2, 1, 4, 4), common.rng(7, k))
        torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-3)  # y is nearly the noise itself


# ---- from real numbers to bytes ------------------------------------------------------------------


def test_to_bytes_keeps_what_is_out_of_range_at_the_ends():
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0])
    assert common.to_bytes(x).tolist() == [0, 0, 128, 255, 255]


# ---- the way of the samples ----------------------------------------------------------------------


def draw_by_ancestral(net, noise):
    """Samples of DDPM by 6 evaluations; its noise levels fall from about 160 to 0.01."""
    generator = common.rng(1)
    return common.pc_sample(
        net, common.DDPM(), noise, 5, "ancestral", corrector=None, generator=generator
    )


def draw_by_dpmpp(net, noise):
    """Samples by 6 evaluations from sigma = 80 on."""
    return common.dpmpp_sample(net, noise, common.karras_sigmas(6, 80.0), 1.0, common.rng(1))


@pytest.mark.parametrize("draw", [draw_by_ancestral, draw_by_dpmpp])
def test_a_recorder_sees_the_way_from_noise_to_the_sample(draw, gaussian):
    """The sample is the same as without it. The way starts with the noise and ends near the sample.

    Near: what is left is noise of sigma = 0.01.
    """
    noise = torch.randn(50, 2, generator=common.rng(0), dtype=torch.float64)
    recorder = common.Recorder(gaussian)
    x = draw(recorder, noise)
    assert torch.equal(x, draw(gaussian, noise))
    sigmas = [sigma for sigma, _ in recorder.seen]
    assert len(sigmas) == 6
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] > 50
    assert sigmas[-1] == pytest.approx(0.01, rel=1e-3)
    first = recorder.seen[0][1]
    last = recorder.seen[-1][1]
    assert torch.allclose(first, gaussian.sd * noise, rtol=1e-2, atol=1e-2)
    assert (last - x).abs().max() < 0.1


def test_a_recorder_keeps_no_more_than_it_is_told(gaussian):
    recorder = common.Recorder(gaussian, limit=4)
    draw_by_dpmpp(recorder, torch.zeros(3, 2, dtype=torch.float64))
    assert len(recorder.seen) == 4
    assert recorder.seen[0][0] == pytest.approx(80, rel=1e-3)
