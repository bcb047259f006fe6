"""Losses against the fields that minimise them exactly."""
import math

import pytest
import torch
import torch.nn as nn
from conftest import load_script

import common as c


class Linear(nn.Module):
    """F = W y + b: for Gaussian data at one noise level the optimum is in this family."""

    def __init__(self, sd):
        super().__init__()
        self.sd, self.layer = sd, nn.Linear(2, 2).double()

    def forward(self, y, phi):
        return self.layer(y)


@pytest.mark.parametrize("sde", [c.VE(), c.VP(), c.SubVP(), c.DDPM()], ids=["ve", "vp", "subvp", "ddpm"])
@pytest.mark.parametrize("weight", ["v", "std2"])
def test_score_matching_recovers_the_gaussian_score(sde, weight, gaussian):
    """Least squares on dsm_loss with fixed noise ends at the exact score, up to Monte Carlo error."""
    torch.manual_seed(0)
    n, net = 100000, Linear(gaussian.sd)
    x0, t = gaussian.sample(n), torch.full((n,), sde.time_of(torch.tensor(0.8)).item(), dtype=torch.float64)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=60, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = c.dsm_loss(net, sde, x0, t, weight).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    x_t = c.bcast(sde.s(t[:200]), x0) * gaussian.sample(200) + sde.std(t[:200])[:, None] * torch.randn(200, 2, dtype=torch.float64)
    got, want = (c.score_fn(m, sde, x_t, t[:200]).detach() * sde.std(t[0]) for m in (net, gaussian))
    assert (got - want).abs().max() < 0.03 and want.abs().max() > 1


def test_weight_v_is_the_error_of_F(gaussian):
    """|F - F*|^2 written out by hand."""
    torch.manual_seed(0)
    x0, t, sde, sd = gaussian.sample(50), torch.rand(50, dtype=torch.float64), c.VP(), gaussian.sd
    net = c.ExactNet(lambda x, sigma: 0.3 * x / (1 + sigma[:, None]), sd)
    torch.manual_seed(1)
    got = c.dsm_loss(net, sde, x0, t, "v")
    torch.manual_seed(1)
    z, phi = torch.randn_like(x0), torch.atan(sde.sigma(t) / sd)
    cos, sin = phi.cos()[:, None], phi.sin()[:, None]
    want = (net(cos * x0 / sd + sin * z, phi) - (sin * x0 / sd - cos * z)).square().mean(1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def slope(losses, field, toy, sigma, alpha, push, n=200000):
    """d/d delta of alpha L_g + (1-alpha) L_f at z_hat = field + delta push, and its standard error.  Exact: L is quadratic in delta."""
    sde, slopes = c.VE(), []
    t = torch.full((n,), sde.time_of(torch.tensor(sigma)).item(), dtype=torch.float64)
    for loss, source, share in zip(losses, (toy.g, toy.f), (alpha, 1 - alpha)):
        x0, values = source.sample(n, c.rng(0)), []
        for delta in (0.5, -0.5):
            net = c.ExactNet(lambda x, s, d=delta: field.z_hat(x, s) + d * push(x), toy.sd)
            torch.manual_seed(1)
            values.append(loss(net, sde, x0, t))
        slopes.append(share * (values[0] - values[1]))
    return sum(s.mean() for s in slopes).item(), math.sqrt(sum(s.var() / n for s in slopes))


@pytest.mark.parametrize("sigma", [0.8, 2.0])
@pytest.mark.parametrize("method, alpha", [("obt", 0.9), ("obt-rel", 0.7), ("ort", 0.9), ("ort-inner", 0.9)])
def test_exact_optima_are_stationary_points_of_the_losses(method, alpha, sigma, toy):
    """Whichever way the optimum is pushed, the slope is zero; from Unseen's field the same push has a slope."""
    world = toy["Toy"]([[-2, -2], [0, 0], [2, 2]], [0.8, 0.4, 0.8], [1])
    loss_f = {
        "obt": lambda *a: c.obt_loss(*a, floor=None),
        "obt-rel": lambda net, *a: c.obt_rel_loss(net, world.all, *a),
        "ort": c.ort_loss,
        "ort-inner": lambda *a: c.ort_loss(*a, inner=True),
    }[method]
    centre = lambda x: torch.exp(-0.125 * x.square().sum(1, keepdim=True))
    field, away = toy["optimum"](world, method, alpha), []
    for push in (lambda x: centre(x) * torch.tensor([1.0, 0.3]), lambda x: centre(x) * x, lambda x: centre(x) * x.flip(1) * x.sum(1, keepdim=True)):
        value, error = slope((c.dsm_loss, loss_f), field, world, sigma, alpha, push)
        assert abs(value) < 4.5 * error
        value, error = slope((c.dsm_loss, loss_f), world.g, world, sigma, alpha, push)
        away.append(abs(value) / error)
    assert max(away) > 10


@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_distilling_shifts_the_optimum_of_obt_rel_by_one_kappa(sigma, toy):
    """Kept near the Standard model instead of D_g: z_g + (kappa - 1) p(D_f|x_t) (z_g - z_f)."""
    world, alpha = toy["Toy"]([[-2, -2], [0, 0], [2, 2]], [0.8, 0.4, 0.8], [1]), 0.6
    kappa = (1 - alpha) * (1 - world.pi_f) / (2 * alpha * world.pi_f)

    def z_hat(x, s):
        z_g, z_f = world.g.z_hat(x, s), world.f.z_hat(x, s)
        p_f = torch.sigmoid(world.f.log_prob(x, s) - world.g.log_prob(x, s) + math.log(world.pi_f / (1 - world.pi_f)))
        return z_g + (kappa - 1) * p_f[:, None] * (z_g - z_f)

    losses = (lambda net, *a: c.distill_loss(net, world.all, *a), lambda net, *a: c.obt_rel_loss(net, world.all, *a))
    push = lambda x: torch.exp(-0.125 * x.square().sum(1, keepdim=True)) * x
    value, error = slope(losses, c.ExactNet(z_hat, world.sd), world, sigma, alpha, push)
    assert abs(value) < 4.5 * error
    value, error = slope(losses, world.all, world, sigma, alpha, push)
    assert abs(value) > 10 * error


@pytest.mark.parametrize("method, sigma", [("ascent", 0.8), ("erasediff", 0.8), ("erasediff", 2.0)])
def test_rivals_have_the_optimum_their_papers_state(method, sigma, toy):
    """Ascent: the score of (p_g - w p_f)/(1 - w).  EraseDiff with a fixed weight: z_g pulled to E[u] = 1/2 where D_f is likely."""
    world = toy["Toy"]([[-2, -2], [0, 0], [2, 2]], [0.8, 0.4, 0.8], [1])
    w = 0.018 if method == "ascent" else 0.2

    def erased(x, sigma):
        r = w * (world.f.log_prob(x, sigma) - world.g.log_prob(x, sigma)).exp()[:, None]
        return (world.g.z_hat(x, sigma) + 0.5 * r) / (1 + r)

    field = toy["optimum"](world, "ascent", w) if method == "ascent" else c.ExactNet(erased, world.sd)
    loss_f = (lambda *a: c.ascent_loss(*a, cap=math.inf)) if method == "ascent" else c.erasediff_loss
    # A push along x, where ascent's small weight still shows: it moves z_hat away from D_f's mean.
    push = lambda x: x * torch.exp(-0.5 * x.square().sum(1, keepdim=True))
    value, error = slope((c.dsm_loss, loss_f), field, world, sigma, 1 / (1 + w), push)
    assert abs(value) < 4.5 * error
    push = (lambda x: torch.ones_like(x)) if method == "erasediff" else push
    value, error = slope((c.dsm_loss, loss_f), world.g, world, sigma, 1 / (1 + w), push)
    assert abs(value) > 4.5 * error


def test_ascent_stops_at_its_cap():
    """An image whose score matching loss is above 2 pushes no more."""
    torch.manual_seed(0)
    k = torch.tensor(5.0, requires_grad=True)
    net = c.ExactNet(lambda x, sigma: k * x / sigma[:, None])
    loss = c.ascent_loss(net, c.VE(), torch.zeros(8, 50), torch.full((8,), 0.9))
    assert torch.equal(loss, torch.full((8,), -2.0)) and torch.autograd.grad(loss.sum(), k)[0] == 0


@pytest.mark.parametrize("g, f, eta, want", [
    ((1.0, 0.0), (0.0, 2.0), 0.1, 0.1),  # orthogonal: only eta
    ((1.0, 0.0), (-2.0, 0.0), 0.1, 0.6),  # opposed: -<g,f>/|f|^2 = 2/4 more
    ((1.0, 1.0), (3.0, 0.0), 0.1, 0.0),  # keeping already forgets: 0.1 - 3/9 < 0
])
def test_erasediff_weight(g, f, eta, want):
    g, f = torch.tensor(g), torch.tensor(f)
    weight = c.erasediff_weight(g, f, eta)
    assert weight == pytest.approx(want, abs=1e-6)
    # What lambda is for: the step g + lambda f has at least eta |f|^2 of f in it.
    assert (g + weight * f) @ f >= eta * f @ f - 1e-6


@pytest.mark.parametrize("sde", [c.VE(), c.DDPM()], ids=["ve", "ddpm"])
@pytest.mark.parametrize("sigma", [0.5, 1.5, 10.0])
def test_siss_is_an_unbiased_estimate_of_both_losses(sigma, sde, toy):
    """One evaluation at importance-weighted x_t against the two losses, each from its own x_t."""
    world, n = toy["Toy"]([[-1, -1], [0, 0], [2, 2]], [0.8, 0.4, 0.8], [1]), 200000
    net = c.ExactNet(lambda x, s: 0.7 * x / (1 + s[:, None]) + 0.2, world.sd)
    t = sde.time_of(torch.full((n,), sigma, dtype=torch.float64))
    x_g, x_f = world.g.sample(n, c.rng(0)), world.f.sample(n, c.rng(1))
    torch.manual_seed(2)
    for got, x0 in zip(c.siss_losses(net, sde, x_g, x_f, t), (x_g, x_f)):
        want = c.dsm_loss(net, sde, x0, t)
        assert (got.mean() - want.mean()).abs() < 4.5 * math.sqrt((got.var() + want.var()) / n)


def test_gradients_made_by_hand_arrive():
    net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    x = torch.randn(5, 3)
    unlearn = load_script("03")
    g = unlearn["flat_grad"](net(x).square().mean(), net)
    unlearn["linear_loss"](net, 3 * g).backward()
    got = torch.cat([w.grad.flatten() for w in net.parameters()])
    net.zero_grad()
    (3 * net(x).square().mean()).backward()
    torch.testing.assert_close(got, torch.cat([w.grad.flatten() for w in net.parameters()]))


def test_erasediff_with_alpha_has_a_constant_weight():
    """--alpha in place of --eta: L_g + lambda L_f with lambda = (1 - alpha)/alpha, to scale; with --eta lambda follows the gradients."""
    unlearn, (x_g, x_f) = load_script("03"), torch.randn(2, 16, 1, 8, 8)
    net = c.UNet(width=16)
    net.load_state_dict({k: v + 0.01 * torch.randn_like(v) for k, v in net.state_dict().items()})  # a fresh network answers 0, without gradients

    def step(*flags):
        args = unlearn["arguments"]([str(a) for a in ("--forget", 3, "--method", "erasediff", *flags)])
        torch.manual_seed(0)
        loss, g, f = unlearn["objective"](args, net, None, c.VP(), x_g, x_f)
        return unlearn["flat_grad"](loss, net), unlearn["flat_grad"](g, net), unlearn["flat_grad"](f, net)

    got, g, f = step("--alpha", 0.8)
    torch.testing.assert_close(got / 0.8, g + 0.25 * f)
    for eta in (0.1, 0.5):
        got, g, f = step("--eta", eta)
        torch.testing.assert_close(got, g + (eta - g @ f / (f @ f)).clamp(min=0) * f)


def test_obt_floor_stops_the_push():
    """z_hat = -5 z has z_hat . z near -5: clipped to -2, with no gradient left; without a floor it is not."""
    torch.manual_seed(0)
    k = torch.tensor(-5.0, requires_grad=True)
    net = c.ExactNet(lambda x, sigma: k * x / sigma[:, None])
    x0, t = torch.zeros(8, 50), torch.full((8,), 0.9)
    loss = c.obt_loss(net, c.VE(), x0, t)
    assert torch.equal(loss, torch.full((8,), -2.0))
    (slope_k,) = torch.autograd.grad(loss.sum(), k)
    assert slope_k == 0
    assert c.obt_loss(net, c.VE(), x0, t, floor=None).mean() < -4


def test_losses_are_per_image_and_of_any_rank():
    torch.manual_seed(0)
    net = c.ExactNet(lambda x, sigma: 0.5 * x / (1 + c.bcast(sigma, x)), 0.5)
    for shape in ((5, 2), (5, 3, 8, 8)):
        x0, t = torch.randn(shape), torch.rand(5)
        for loss in (c.dsm_loss, c.ort_loss, c.obt_loss, lambda *a: c.ort_loss(*a, inner=True), lambda n, *a: c.obt_rel_loss(n, n, *a), c.ascent_loss, c.erasediff_loss):
            assert loss(net, c.VP(), x0, t).shape == (5,)
        assert [v.shape for v in c.siss_losses(net, c.VP(), x0, torch.randn(shape), t)] == [(5,), (5,)]
