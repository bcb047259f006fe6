"""The forward processes against simulation, calculus and float64."""

import math

import pytest
import torch

import common

SDES = {
    "ve": common.VE(),
    "vp": common.VP(),
    "subvp": common.SubVP(),
    "wide": common.TRAINING_SDE,
}


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_marginals_match_a_simulation_of_the_sde(name, gaussian):
    """Euler paths of dx = f dt + g dw end with mean s m and covariance s^2 S + std^2 I."""
    sde = SDES[name]
    num_paths = 20000
    steps = 1000
    t_end = 0.7
    dt = t_end / steps

    torch.manual_seed(0)
    x = gaussian.sample(num_paths)
    for i in range(steps):
        # The rates of the middle of the step: second order in g.
        t = torch.full((num_paths,), (i + 0.5) * dt, dtype=torch.float64)
        noise = math.sqrt(dt) * torch.randn_like(x)
        x = x + sde.drift(x, t) * dt + sde.diffusion(t)[:, None] * noise

    t = torch.tensor([t_end], dtype=torch.float64)
    # The paths start at t = 0 exactly, so VE's own variance sigma_min^2 at t = 0 is not in them.
    variance = sde.std(t) ** 2 - sde.std(torch.zeros_like(t)) ** 2
    mean = sde.s(t) * gaussian.means[0]
    cov = sde.s(t) ** 2 * gaussian.covs[0] + variance * torch.eye(2)
    largest = cov.diagonal().max()
    error_of_mean = (x.mean(0) - mean).abs().max()
    error_of_cov = (torch.cov(x.T) - cov).abs().max()
    assert error_of_mean < 4.5 * largest.sqrt() / math.sqrt(num_paths)
    assert error_of_cov < 0.05 * largest


@pytest.mark.parametrize("name", list(SDES))
def test_drift_follows_from_s(name):
    """f = (s'/s) x, by autograd in float64."""
    sde = SDES[name]
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    log_s = torch.log(sde.s(t)) + 0 * t  # + 0 t: VE's s = 1 has no graph
    (want,) = torch.autograd.grad(log_s.sum(), t)
    drift = sde.drift(torch.ones(50, 1, dtype=torch.float64), t)
    torch.testing.assert_close(drift[:, 0], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", list(SDES))
def test_diffusion_follows_from_s_and_std(name):
    """g^2 = s^2 d(sigma^2)/dt, by autograd in float64."""
    sde = SDES[name]
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((sde.sigma(t) ** 2).sum(), t)
    torch.testing.assert_close(sde.diffusion(t) ** 2, sde.s(t) ** 2 * slope, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_float32_std_is_exact_where_the_likelihood_starts(name):
    sde = SDES[name]
    t = torch.logspace(-5, 0, 200, dtype=torch.float64)
    torch.testing.assert_close(sde.std(t.float()).double(), sde.std(t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list(SDES))
def test_time_of_inverts_sigma(name):
    sde = SDES[name]
    t = torch.linspace(0.001, 1, 100, dtype=torch.float64)
    torch.testing.assert_close(sde.time_of(sde.sigma(t)), t, rtol=1e-9, atol=1e-12)


def test_vp_ends_at_the_sigma_of_the_literature():
    assert SDES["vp"].sigma_max() == pytest.approx(152.2, abs=0.1)


def test_ve_ends_at_the_sigma_of_the_literature():
    assert SDES["ve"].sigma_max() == pytest.approx(50)


@pytest.mark.parametrize(
    ("name", "sigma", "t_min", "tolerance"),
    [
        ("vp", 0.001, 1e-5, 0.1),
        ("vp", 0.01, 1e-3, 0.1),
        ("subvp", 0.001, 0.0062, 0.02),
        ("subvp", 0.01, 0.0271, 0.02),
    ],
)
def test_floors_are_the_ones_of_the_literature(name, sigma, t_min, tolerance):
    assert SDES[name].t_min(sigma) == pytest.approx(t_min, rel=tolerance)


def test_floor_of_ve_is_its_start():
    """VE starts at 0.01 and goes no lower."""
    assert SDES["ve"].t_min(0.001) == 0


@pytest.mark.parametrize("name", list(SDES))
def test_uniform_t_fills_its_range_evenly(name):
    torch.manual_seed(0)
    t = common.uniform_t(4000, SDES[name])
    assert t.min() >= SDES[name].t_min(0.001)
    assert t.max() <= 1
    assert t.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", list(SDES))
def test_lognormal_t_has_the_asked_mean_and_spread_whatever_the_sde(name):
    torch.manual_seed(0)
    t = common.lognormal_t(4000, SDES[name], 0.0, 0.7)
    log_sigma = SDES[name].sigma(t.double()).log()
    assert log_sigma.mean() == pytest.approx(0.0, abs=0.01)
    assert log_sigma.std() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_lognormal_t_is_finite_and_near_its_mean_at_both_ends(end, monkeypatch):
    """erfinv is infinite there: no level is farther than 5 standard deviations from the mean."""
    monkeypatch.setattr(common, "_stratified", lambda n, device: torch.full((n,), end))
    sde = common.TRAINING_SDE
    t = common.lognormal_t(4, sde, mean=-1.0, std=0.5)
    log_sigma = sde.sigma(t).log()
    distance = (log_sigma + 1).abs()
    assert distance.max() < 5 * 0.5
    assert distance.min() > 4 * 0.5


@pytest.mark.parametrize("shape", [(64, 2), (64, 3, 4, 4)], ids=["points", "images"])
def test_circle_is_its_own_inverse(shape):
    """(x0, z) -> (y, F) -> (x0, z) through predict, for a network that returns the true F."""
    torch.manual_seed(0)
    x0 = torch.randn(shape)
    z = torch.randn(shape)
    sigma = torch.logspace(-2, 1.5, 64)
    net = common.ExactNet(lambda x_hat, sigma: z, sd=0.7)
    x_hat = x0 + common.expand_like(sigma, x0) * z
    got_x0, got_z = common.predict(net, x_hat, sigma)
    torch.testing.assert_close(got_z, z, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got_x0, x0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_score_fn_is_the_gradient_of_the_log_density(name, gaussian):
    sde = SDES[name]
    t = torch.full((20,), 0.4, dtype=torch.float64)
    noise = torch.randn(20, 2, generator=common.rng(0), dtype=torch.float64)
    x = (2 * noise).requires_grad_()
    s = sde.s(t)[0]
    std = sde.std(t)[0]
    cov = s**2 * gaussian.covs[0] + std**2 * torch.eye(2)
    density = torch.distributions.MultivariateNormal(s * gaussian.means[0], cov)
    (want,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    score = common.score_fn(gaussian, sde, x.detach(), t)
    torch.testing.assert_close(score, want, rtol=1e-6, atol=1e-6)


def test_ddpm_is_the_chain_of_its_definition():
    """The 1000 steps multiplied out by hand."""
    sde = common.DDPM()
    signal = 1.0
    variance = 0.0
    for k in range(1, 1001):
        beta = 1e-4 + (0.02 - 1e-4) * (k - 1) / 999
        signal = signal * math.sqrt(1 - beta)
        variance = (1 - beta) * variance + beta
        t = torch.tensor([k / 1000], dtype=torch.float64)
        assert sde.s(t).item() == pytest.approx(signal, rel=1e-9), f"signal after {k} steps"
        noise = math.sqrt(variance)
        assert sde.std(t).item() == pytest.approx(noise, rel=1e-9), f"noise after {k} steps"


def test_time_of_finds_every_level_of_ddpm():
    sde = common.DDPM()
    levels = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(sde.time_of(sde.sigma(levels.double())), levels.double())


def test_ddpm_draws_every_level_alike():
    middles = (torch.arange(1000) + 0.5) / 1000
    levels = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(common.DDPM().draw(middles), levels)


def test_vp_is_the_limit_of_ddpm():
    """beta(t)/1000 is beta_k: both have the same signal and noise from t = 0.1 on."""
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    torch.testing.assert_close(SDES["vp"].sigma(t), common.DDPM().sigma(t), rtol=0.04, atol=0)


def test_ddpm_ends_a_little_above_vp():
    """DDPM ends near sigma = 157, VP near 152."""
    assert common.DDPM().sigma_max() == pytest.approx(157.4, abs=0.1)
