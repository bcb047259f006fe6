"""The ODE likelihood against exact densities."""
import math

import pytest
import torch

import common as c

# What the ODE measures is the data noised to its starting level, so that is what it is compared with.
START = 0.001


def start(x):
    return torch.full((len(x),), START, dtype=x.dtype)


@pytest.mark.parametrize("sde", [c.WIDE, c.VP(), c.SubVP()], ids=["ve", "vp", "subvp"])
def test_exact_trace_gives_the_exact_density(sde, gaussian):
    x = gaussian.sample(500, c.rng(0))
    got = c.ode_log_likelihood(gaussian, sde, x, c.basis_probes(x))
    # Calling x_T pure noise drops x_T . mean/sigma_max^2: up to 4 sd * 0.8/sigma_max for a single point, nothing on average.
    torch.testing.assert_close(got, gaussian.log_prob(x, start(x)), rtol=0, atol=4 * 0.8 / sde.sigma_max())
    assert abs((got - gaussian.log_prob(x, start(x))).mean()) < 1e-3


def test_mixture_within_two_millinats(toy):
    mix = toy["Toy"]([[-2, -2], [0, 0], [2, 2]], [0.8, 0.4, 0.8], [1]).all
    x = mix.sample(2000, c.rng(0))
    got = c.ode_log_likelihood(mix, c.VP(), x, c.basis_probes(x))
    assert (got - mix.log_prob(x)).abs().max() < 2e-3


def test_likelihood_works_on_images():
    """16 correlated numbers arranged as (B, 1, 4, 4)."""
    torch.manual_seed(0)
    a = torch.randn(16, 16, dtype=torch.float64) / 4
    net = c.GaussianMixture(torch.zeros(1, 16).double(), (a @ a.T + 0.1 * torch.eye(16))[None], torch.ones(1).double(), sd=0.5)
    x = net.sample(20, c.rng(0))
    got = c.ode_log_likelihood(net, c.VP(), x.reshape(20, 1, 4, 4), c.basis_probes(x.reshape(20, 1, 4, 4)), steps=40)
    torch.testing.assert_close(got, net.log_prob(x, start(x)), rtol=0, atol=5e-3)


@pytest.mark.parametrize("k", [1, 4])
def test_hutchinson_is_unbiased(k, gaussian):
    """The mean over 256 draws of k probes lies within 4 standard errors; summed instead of averaged probes would not."""
    x = gaussian.sample(1, c.rng(0)).expand(256, 2)
    got = c.ode_log_likelihood(gaussian, c.VP(), x, c.rademacher_probes(x, k, c.rng(1)))
    want = gaussian.log_prob(x[:1], start(x[:1]))
    assert got.std() > 1e-3  # a diagonal covariance would make this test blind
    assert abs(got.mean() - want) < 4 * got.std() / 16 + 1e-3


@pytest.mark.parametrize("focus", [-1.5, -3.0])
def test_rk4_converges_with_order_four(gaussian, focus):
    x = gaussian.sample(100, c.rng(0))
    ll = lambda steps: c.ode_log_likelihood(gaussian, c.VP(), x, c.basis_probes(x), steps, focus=focus)
    want = ll(200)  # not the exact density: the prior's own error does not depend on the steps
    errors = [(ll(n) - want).abs().mean() for n in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.6)


def test_uniform_bytes_have_eight_bits():
    """p = 1/2 per dimension on [-1, 1] is a uniform byte: 8 bits/dim.  dequantize fills that interval and to_bytes inverts it."""
    assert c.bits_per_dim(torch.tensor(-10 * math.log(2.0)), 10).item() == pytest.approx(8)
    k = torch.arange(256, dtype=torch.uint8)
    for _ in range(20):
        x = c.dequantize(k)
        assert x.min() >= -1 and x.max() < 1 and torch.equal(c.to_bytes(x), k)
