"""The forward processes against simulation, calculus and float64."""
import math

import pytest
import torch

import common as c

ALL = {"ve": c.VE(), "vp": c.VP(), "subvp": c.SubVP(), "wide": c.WIDE}


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_marginals_match_a_simulation_of_the_sde(name, gaussian):
    """Euler paths of dx = f dt + g dw end with mean s m and covariance s^2 S + std^2 I."""
    sde, n, steps, T = ALL[name], 20000, 1000, 0.7
    torch.manual_seed(0)
    x = gaussian.sample(n)
    for i in range(steps):
        t = torch.full((n,), (i + 0.5) * T / steps, dtype=torch.float64)  # midpoint rates: second order in g
        x = x + sde.drift(x, t) * T / steps + sde.diffusion(t)[:, None] * math.sqrt(T / steps) * torch.randn_like(x)
    t = torch.tensor([T], dtype=torch.float64)
    # Started at t = 0 exactly, so VE's own starting variance sigma_min^2 is not in the paths.
    std2 = sde.std(t) ** 2 - sde.std(torch.zeros_like(t)) ** 2
    cov = sde.s(t) ** 2 * gaussian.covs[0] + std2 * torch.eye(2)
    spread = cov.diagonal().max().sqrt()
    assert (x.mean(0) - sde.s(t) * gaussian.means[0]).abs().max() < 4.5 * spread / math.sqrt(n)
    assert (torch.cov(x.T) - cov).abs().max() < 0.05 * cov.diagonal().max()


@pytest.mark.parametrize("name", list(ALL))
def test_drift_and_diffusion_follow_from_s_and_std(name):
    """f = (s'/s) x and g^2 = s^2 d(sigma^2)/dt, by autograd in float64."""
    sde = ALL[name]
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    (dlog_s,) = torch.autograd.grad((torch.log(sde.s(t)) + 0 * t).sum(), t)  # + 0 t: VE's s = 1 has no graph
    (dsigma2,) = torch.autograd.grad((sde.sigma(t) ** 2).sum(), t)
    x = torch.ones(50, 1, dtype=torch.float64)
    torch.testing.assert_close(sde.drift(x, t)[:, 0], dlog_s, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sde.diffusion(t) ** 2, sde.s(t) ** 2 * dsigma2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_float32_std_is_exact_where_the_likelihood_starts(name):
    t = torch.logspace(-5, 0, 200, dtype=torch.float64)
    torch.testing.assert_close(ALL[name].std(t.float()).double(), ALL[name].std(t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list(ALL))
def test_time_of_inverts_sigma(name):
    t = torch.linspace(0.001, 1, 100, dtype=torch.float64)
    torch.testing.assert_close(ALL[name].time_of(ALL[name].sigma(t)), t, rtol=1e-9, atol=1e-12)


def test_floors_and_ends_are_the_ones_of_the_literature():
    """VP: sigma(1) = 152.2; sigma 0.001 and 0.01 at t = 1e-5 and about 1e-3.  Sub-VP: 0.0062 and 0.0271."""
    assert ALL["vp"].sigma_max() == pytest.approx(152.2, abs=0.1) and ALL["ve"].sigma_max() == pytest.approx(50)
    assert [ALL["vp"].t_min(s) for s in (0.001, 0.01)] == pytest.approx([1e-5, 1e-3], rel=0.1)
    assert [ALL["subvp"].t_min(s) for s in (0.001, 0.01)] == pytest.approx([0.0062, 0.0271], rel=0.02)
    assert ALL["ve"].t_min(0.001) == 0  # VE starts at 0.01 and goes no lower


@pytest.mark.parametrize("name", list(ALL))
def test_noise_level_draws(name):
    """uniform_t fills its range evenly; lognormal_t has the asked mean and spread of ln sigma, whatever the SDE."""
    torch.manual_seed(0)
    t = c.uniform_t(4000, ALL[name])
    assert t.min() >= ALL[name].t_min(0.001) and t.max() <= 1 and t.mean() == pytest.approx(0.5, abs=0.01)
    log_sigma = ALL[name].sigma(c.lognormal_t(4000, ALL[name], 0.0, 0.7).double()).log()
    assert log_sigma.mean() == pytest.approx(0.0, abs=0.01) and log_sigma.std() == pytest.approx(0.7, abs=0.02)


def test_circle_is_its_own_inverse():
    """(x0, z) -> (y, F) -> (x0, z) through predict, on points and on images, for a network that returns the true F."""
    torch.manual_seed(0)
    for shape in ((64, 2), (64, 3, 4, 4)):
        x0, z, sigma = torch.randn(shape), torch.randn(shape), torch.logspace(-2, 1.5, 64)
        net = c.ExactNet(lambda x_hat, sigma: z, sd=0.7)
        got_x0, got_z = c.predict(net, x0 + c.bcast(sigma, x0) * z, sigma)
        torch.testing.assert_close(got_z, z, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(got_x0, x0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_score_fn_is_the_gradient_of_the_log_density(name, gaussian):
    sde = ALL[name]
    t = torch.full((20,), 0.4, dtype=torch.float64)
    x = (torch.randn(20, 2, generator=c.rng(0), dtype=torch.float64) * 2).requires_grad_()
    s, std = sde.s(t)[0], sde.std(t)[0]
    cov = s**2 * gaussian.covs[0] + std**2 * torch.eye(2)
    log_p = torch.distributions.MultivariateNormal(s * gaussian.means[0], cov).log_prob(x)
    (want,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(c.score_fn(gaussian, sde, x.detach(), t), want, rtol=1e-6, atol=1e-6)


def test_ddpm_is_the_chain_of_its_definition():
    """Multiply the 1000 steps out by hand; every level is drawn alike; time_of finds the level again."""
    sde, signal, var = c.DDPM(), 1.0, 0.0
    for k in range(1, 1001):
        beta = 1e-4 + (0.02 - 1e-4) * (k - 1) / 999
        signal, var = signal * math.sqrt(1 - beta), (1 - beta) * var + beta
        t = torch.tensor([k / 1000], dtype=torch.float64)
        assert sde.s(t).item() == pytest.approx(signal, rel=1e-9) and sde.std(t).item() == pytest.approx(math.sqrt(var), rel=1e-9)
    levels = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(sde.time_of(sde.sigma(levels.double())), levels.double())
    torch.testing.assert_close(sde.draw((torch.arange(1000) + 0.5) / 1000), levels)


def test_vp_is_the_limit_of_ddpm():
    """beta(t)/1000 is beta_k: both have the same signal and noise to 1 % from t = 0.1 on, and end near sigma = 152 and 157."""
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    torch.testing.assert_close(ALL["vp"].sigma(t), c.DDPM().sigma(t), rtol=0.04, atol=0)
    assert c.DDPM().sigma_max() == pytest.approx(157.4, abs=0.1)
