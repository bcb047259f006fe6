"""The likelihood of the probability-flow ODE against exact densities."""

import math

import pytest
import torch

import common

# What the ODE measures is the data noised to its starting level: that is what it is compared with.
START = 0.001

PAPER = ([[-2, -2], [0, 0], [2, 2]], [0.8, 0.4, 0.8], [1])  # means, weights, which to forget


def exact_log_prob(mixture, x):
    """The exact ln p of the data noised to START, at x (B, D) -> (B,)."""
    return mixture.log_prob(x, torch.full((len(x),), START, dtype=x.dtype))


@pytest.mark.parametrize(
    "sde",
    [common.TRAINING_SDE, common.VP(), common.SubVP()],
    ids=["ve", "vp", "subvp"],
)
def test_exact_trace_gives_the_exact_density(sde, gaussian):
    x = gaussian.sample(500, common.rng(0))
    got = common.ode_log_likelihood(gaussian, sde, x, common.basis_probes(x))
    want = exact_log_prob(gaussian, x)
    # To call x_T pure noise drops x_T . mean/sigma_max^2. For a single point that is up to
    # 4 sd * 0.8/sigma_max, on average it is nothing.
    torch.testing.assert_close(got, want, rtol=0, atol=4 * 0.8 / sde.sigma_max())
    assert abs((got - want).mean()) < 1e-3


def test_mixture_within_two_millinats(toy):
    mixture = toy["Toy"](*PAPER).all
    x = mixture.sample(2000, common.rng(0))
    got = common.ode_log_likelihood(mixture, common.VP(), x, common.basis_probes(x))
    assert (got - mixture.log_prob(x)).abs().max() < 2e-3


def test_likelihood_works_on_images():
    """16 correlated numbers arranged as (B, 1, 4, 4)."""
    torch.manual_seed(0)
    root = torch.randn(16, 16, dtype=torch.float64) / 4
    cov = root @ root.T + 0.1 * torch.eye(16)
    net = common.GaussianMixture(
        torch.zeros(1, 16).double(), cov[None], torch.ones(1).double(), sd=0.5
    )
    x = net.sample(20, common.rng(0))
    images = x.reshape(20, 1, 4, 4)
    probes = common.basis_probes(images)
    got = common.ode_log_likelihood(net, common.VP(), images, probes, steps=40)
    torch.testing.assert_close(got, exact_log_prob(net, x), rtol=0, atol=5e-3)


@pytest.mark.parametrize("num_probes", [1, 4])
def test_hutchinson_is_unbiased(num_probes, gaussian):
    """The mean over 256 draws lies within 4 standard errors; probes summed, not averaged, fail."""
    x = gaussian.sample(1, common.rng(0)).expand(256, 2)
    probes = common.rademacher_probes(x, num_probes, common.rng(1))
    got = common.ode_log_likelihood(gaussian, common.VP(), x, probes)
    want = exact_log_prob(gaussian, x[:1])
    assert got.std() > 1e-3, "a diagonal covariance would make this test blind"
    assert abs(got.mean() - want) < 4 * got.std() / 16 + 1e-3


@pytest.mark.parametrize("focus", [-1.5, -3.0])
def test_rk4_converges_with_order_four(gaussian, focus):
    x = gaussian.sample(100, common.rng(0))
    probes = common.basis_probes(x)

    def log_p(steps):
        return common.ode_log_likelihood(gaussian, common.VP(), x, probes, steps, focus=focus)

    # Not the exact density: the prior's own error does not depend on the number of steps.
    want = log_p(200)
    error_16 = (log_p(16) - want).abs().mean()
    error_32 = (log_p(32) - want).abs().mean()
    assert math.log2(error_16 / error_32) == pytest.approx(4, abs=0.6)


def test_uniform_bytes_have_eight_bits():
    """p = 1/2 per dimension on [-1, 1] is a uniform byte: 8 bits/dim."""
    log_p = torch.tensor(-10 * math.log(2.0))
    assert common.bits_per_dim(log_p, 10).item() == pytest.approx(8)


def test_dequantize_fills_the_interval_and_to_bytes_inverts_it():
    levels = torch.arange(256, dtype=torch.uint8)
    for _ in range(20):
        x = common.dequantize(levels)
        assert x.min() >= -1
        assert x.max() < 1
        assert torch.equal(common.to_bytes(x), levels)
