"""Losses against the fields that minimise them exactly."""

import math
from functools import partial

import pytest
import torch
import torch.nn as nn
from conftest import load_script

import common

PAPER = ([[-2, -2], [0, 0], [2, 2]], [0.8, 0.4, 0.8], [1])  # means, weights, which to forget


@pytest.fixture(scope="module")
def unlearn():
    """The names of 03_unlearn.py: the baselines' losses, and how it puts a step together."""
    return load_script("03")


@pytest.fixture(scope="module")
def world(toy):
    """The paper's mixture of three Gaussians, with exact scores of D_g, D_f and everything."""
    return toy["Toy"](*PAPER)


# ---- score matching ------------------------------------------------------------------------------


class Linear(nn.Module):
    """F = W y + b: for Gaussian data at one noise level the optimum is in this family."""

    def __init__(self, sd):
        super().__init__()
        self.sd = sd
        self.layer = nn.Linear(2, 2).double()

    def forward(self, y, phi):
        return self.layer(y)


@pytest.mark.parametrize(
    "sde",
    [common.VE(), common.VP(), common.SubVP(), common.DDPM()],
    ids=["ve", "vp", "subvp", "ddpm"],
)
@pytest.mark.parametrize("weight", ["v", "std2"])
def test_score_matching_recovers_the_gaussian_score(sde, weight, gaussian):
    """Least squares on dsm_loss with fixed noise ends at the exact score, up to sampling error."""
    torch.manual_seed(0)
    n = 100000
    net = Linear(gaussian.sd)
    x0 = gaussian.sample(n)
    t = torch.full((n,), sde.time_of(torch.tensor(0.8)).item(), dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=60, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = common.dsm_loss(net, sde, x0, t, weight).mean()
        loss.backward()
        return loss

    optimizer.step(closure)

    t = t[:200]
    x0 = gaussian.sample(200)
    z = torch.randn(200, 2, dtype=torch.float64)
    x_t = common.expand_like(sde.s(t), x0) * x0 + sde.std(t)[:, None] * z
    got = common.score_fn(net, sde, x_t, t).detach() * sde.std(t[0])
    want = common.score_fn(gaussian, sde, x_t, t) * sde.std(t[0])
    assert (got - want).abs().max() < 0.03
    assert want.abs().max() > 1, "a score near 0 would make this test blind"


def test_weight_v_is_the_error_of_F(gaussian):
    """|F - F*|^2 written out by hand."""
    torch.manual_seed(0)
    x0 = gaussian.sample(50)
    t = torch.rand(50, dtype=torch.float64)
    sde = common.VP()
    sd = gaussian.sd
    net = common.ExactNet(lambda x, sigma: 0.3 * x / (1 + sigma[:, None]), sd)

    torch.manual_seed(1)
    got = common.dsm_loss(net, sde, x0, t, "v")

    torch.manual_seed(1)
    z = torch.randn_like(x0)
    phi = torch.atan(sde.sigma(t) / sd)
    cos = phi.cos()[:, None]
    sin = phi.sin()[:, None]
    y = cos * x0 / sd + sin * z
    target = sin * x0 / sd - cos * z
    want = (net(y, phi) - target).square().mean(1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


# ---- optima on the mixture -----------------------------------------------------------------------


def slope(losses, field, world, sigma, alpha, push, n=200000):
    """How fast alpha L_g + (1 - alpha) L_f grows when a field is pushed -> (slope, standard error).

    losses  L_g and L_f, each called with (net, sde, x0, t)
    field   the exact network that is pushed: its z_hat becomes z_hat + delta push(x_hat)

    This is the derivative by delta at 0. It is exact, because the losses are quadratic in delta.
    """
    sde = common.VE()
    t = torch.full((n,), sde.time_of(torch.tensor(sigma)).item(), dtype=torch.float64)

    def pushed(delta):
        return common.ExactNet(lambda x, s: field.z_hat(x, s) + delta * push(x), world.sd)

    slopes = []
    for loss, source, share in zip(losses, (world.g, world.f), (alpha, 1 - alpha)):
        x0 = source.sample(n, common.rng(0))
        torch.manual_seed(1)
        above = loss(pushed(0.5), sde, x0, t)
        assert above.shape == (n,), "a loss is one number for each image"
        torch.manual_seed(1)  # the same noise for both
        below = loss(pushed(-0.5), sde, x0, t)
        slopes.append(share * (above - below))

    value = sum(values.mean() for values in slopes).item()
    error = math.sqrt(sum(values.var() / n for values in slopes))
    return value, error


def near_centre(x):
    """A weight (B, 1) that is 1 at the origin and falls off with the distance from it."""
    return torch.exp(-0.125 * x.square().sum(1, keepdim=True))


def to_one_side(x):
    return near_centre(x) * torch.tensor([1.0, 0.3])


def outward(x):
    return near_centre(x) * x


def across(x):
    return near_centre(x) * x.flip(1) * x.sum(1, keepdim=True)


PUSHES = [to_one_side, outward, across]
METHODS = [("obt", 0.9), ("obt-rel", 0.7), ("ort", 0.9), ("ort-inner", 0.9)]


def relative_to(base, loss):
    """A loss that compares with the Standard model `base`, as `slope` calls it."""

    def call(net, sde, x0, t):
        return loss(net, base, sde, x0, t)

    return call


def losses_of(method, world):
    """L_g and the L_f of one of the paper's methods, as `slope` calls them."""
    losses_f = {
        "obt": partial(common.obt_loss, floor=None),
        "obt-rel": relative_to(world.all, common.obt_rel_loss),
        "ort": common.ort_loss,
        "ort-inner": partial(common.ort_loss, inner=True),
    }
    return common.dsm_loss, losses_f[method]


@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("sigma", [0.8, 2.0])
@pytest.mark.parametrize("method, alpha", METHODS)
def test_exact_optima_are_stationary_points_of_the_losses(method, alpha, sigma, push, toy, world):
    """Whichever way the optimum is pushed, the slope is zero."""
    field = toy["optimum"](world, method, alpha)
    value, error = slope(losses_of(method, world), field, world, sigma, alpha, push)
    hint = "pushed from the optimum the loss changes: mean or sum? one noise for both networks?"
    assert abs(value) < 4.5 * error, hint


@pytest.mark.parametrize("sigma", [0.8, 2.0])
@pytest.mark.parametrize("method, alpha", METHODS)
def test_the_losses_push_unseens_field_away(method, alpha, sigma, world):
    """The test above is not blind: from Unseen's field one of the same pushes has a slope."""
    in_errors = []
    for push in PUSHES:
        value, error = slope(losses_of(method, world), world.g, world, sigma, alpha, push)
        in_errors.append(abs(value) / error)
    assert max(in_errors) > 10


@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_distilling_shifts_the_optimum_of_obt_rel_by_one_kappa(sigma, world):
    """Kept near the Standard model instead of D_g: z_g + (kappa - 1) p(D_f|x_t) (z_g - z_f)."""
    alpha = 0.6
    odds_f = world.pi_f / (1 - world.pi_f)
    kappa = (1 - alpha) / (2 * alpha * odds_f)

    def z_hat(x, sigma):
        z_g = world.g.z_hat(x, sigma)
        z_f = world.f.z_hat(x, sigma)
        log_ratio = world.f.log_prob(x, sigma) - world.g.log_prob(x, sigma)
        p_f = torch.sigmoid(log_ratio + math.log(odds_f))  # p(D_f | x_t)
        return z_g + (kappa - 1) * p_f[:, None] * (z_g - z_f)

    losses = (
        relative_to(world.all, common.distill_loss),
        relative_to(world.all, common.obt_rel_loss),
    )
    field = common.ExactNet(z_hat, world.sd)
    value, error = slope(losses, field, world, sigma, alpha, outward)
    assert abs(value) < 4.5 * error, "the stated optimum is none"
    value, error = slope(losses, world.all, world, sigma, alpha, outward)
    assert abs(value) > 10 * error, "from the Standard model there must be a slope"


# ---- the baselines -------------------------------------------------------------------------------


def steeply_outward(x):
    """Away from D_f's mean, and only where ascent's small weight still shows."""
    return x * torch.exp(-0.5 * x.square().sum(1, keepdim=True))


def test_ascent_has_the_optimum_of_its_density(unlearn, toy, world):
    """The score of (p_g - w p_f)/(1 - w)."""
    w = 0.018
    losses = (common.dsm_loss, partial(unlearn["ascent_loss"], cap=math.inf))
    field = toy["optimum"](world, "ascent", w)
    value, error = slope(losses, field, world, 0.8, 1 / (1 + w), steeply_outward)
    assert abs(value) < 4.5 * error, "the stated optimum is none"
    value, error = slope(losses, world.g, world, 0.8, 1 / (1 + w), steeply_outward)
    assert abs(value) > 4.5 * error, "from Unseen's field there must be a slope"


@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_erasediff_has_the_optimum_its_paper_states(sigma, unlearn, world):
    """With a fixed weight, z_g pulled to E[u] = 1/2 where D_f is likely."""
    w = 0.2

    def z_hat(x, sigma):
        log_ratio = world.f.log_prob(x, sigma) - world.g.log_prob(x, sigma)
        r = w * log_ratio.exp()[:, None]
        return (world.g.z_hat(x, sigma) + 0.5 * r) / (1 + r)

    losses = (common.dsm_loss, unlearn["erasediff_loss"])
    field = common.ExactNet(z_hat, world.sd)
    value, error = slope(losses, field, world, sigma, 1 / (1 + w), steeply_outward)
    assert abs(value) < 4.5 * error, "the stated optimum is none"
    value, error = slope(losses, world.g, world, sigma, 1 / (1 + w), torch.ones_like)
    assert abs(value) > 4.5 * error, "from Unseen's field there must be a slope"


@pytest.mark.parametrize(
    "grad_g, grad_f, want",
    [
        ((1.0, 0.0), (0.0, 2.0), 0.1),  # orthogonal: only eta
        ((1.0, 0.0), (-2.0, 0.0), 0.6),  # opposed: -<g,f>/|f|^2 = 2/4 more
        ((1.0, 1.0), (3.0, 0.0), 0.0),  # keeping already forgets: 0.1 - 3/9 < 0
    ],
    ids=["orthogonal", "opposed", "keeping forgets"],
)
def test_erasediff_weight(grad_g, grad_f, want, unlearn):
    eta = 0.1
    g = torch.tensor(grad_g)
    f = torch.tensor(grad_f)
    weight = unlearn["erasediff_weight"](g, f, eta)
    assert weight == pytest.approx(want, abs=1e-6)
    # What lambda is for: the step g + lambda f has at least eta |f|^2 of f in it.
    assert (g + weight * f) @ f >= eta * f @ f - 1e-6


@pytest.mark.parametrize("sde", [common.VE(), common.DDPM()], ids=["ve", "ddpm"])
@pytest.mark.parametrize("sigma", [0.5, 1.5, 10.0])
def test_siss_is_an_unbiased_estimate_of_both_losses(sigma, sde, unlearn, toy):
    """One evaluation at importance-weighted x_t against the two losses, each from its own x_t."""
    world = toy["Toy"]([[-1, -1], [0, 0], [2, 2]], [0.8, 0.4, 0.8], [1])
    n = 200000
    net = common.ExactNet(lambda x, sigma: 0.7 * x / (1 + sigma[:, None]) + 0.2, world.sd)
    t = sde.time_of(torch.full((n,), sigma, dtype=torch.float64))
    x_g = world.g.sample(n, common.rng(0))
    x_f = world.f.sample(n, common.rng(1))

    torch.manual_seed(2)
    losses = unlearn["siss_losses"](net, sde, x_g, x_f, t)
    for part, got, x0 in zip(("D_g", "D_f"), losses, (x_g, x_f)):
        want = common.dsm_loss(net, sde, x0, t)
        difference = (got.mean() - want.mean()).abs()
        assert difference < 4.5 * math.sqrt((got.var() + want.var()) / n), f"loss of {part}"


# ---- gradients that 03 weighs by hand ------------------------------------------------------------


def gradient_of(net):
    """What backward has left in the weights of a network, as one vector."""
    return torch.cat([w.grad.flatten() for w in net.parameters()])


def test_gradients_made_by_hand_arrive(unlearn):
    net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    x = torch.randn(5, 3)

    grad = unlearn["flat_grad"](net(x).square().mean(), net)
    unlearn["linear_loss"](net, 3 * grad).backward()
    by_hand = gradient_of(net)

    net.zero_grad()
    (3 * net(x).square().mean()).backward()
    torch.testing.assert_close(by_hand, gradient_of(net))


@pytest.fixture
def erasediff_step(unlearn, tmp_path):
    """erasediff_step("--eta", 0.1) -> gradients of the loss that 03 steps on, of L_g and of L_f."""
    x_g, x_f = torch.randn(2, 16, 1, 8, 8)
    net = common.UNet(width=16)
    with torch.no_grad():
        # A fresh network answers 0, and its inner layers have no gradient.
        for w in net.parameters():
            w.add_(0.01 * torch.randn_like(w))

    def step(*flags):
        argv = ["--forget", "3", "--method", "erasediff", "--out", tmp_path, *flags]
        args = unlearn["arguments"]([str(a) for a in argv])
        torch.manual_seed(0)
        losses = unlearn["objective"](args, net, None, common.VP(), x_g, x_f)
        return [unlearn["flat_grad"](loss, net) for loss in losses]

    return step


def test_erasediff_with_alpha_has_a_constant_weight(erasediff_step):
    """--alpha in place of --eta: L_g + lambda L_f with lambda = (1 - alpha)/alpha, to scale."""
    total, g, f = erasediff_step("--alpha", 0.8)
    torch.testing.assert_close(total / 0.8, g + 0.25 * f)


@pytest.mark.parametrize("eta", [0.1, 0.5])
def test_erasediff_with_eta_follows_the_gradients(eta, erasediff_step):
    total, g, f = erasediff_step("--eta", eta)
    weight = (eta - g @ f / (f @ f)).clamp(min=0)
    torch.testing.assert_close(total, g + weight * f)


@pytest.mark.parametrize("loss", [common.distill_loss, common.obt_rel_loss])
def test_the_standard_model_gets_no_gradient(loss):
    net = common.UNet(width=8)
    base = common.UNet(width=8)
    x0 = torch.randn(4, 1, 8, 8)
    loss(net, base, common.VP(), x0, torch.full((4,), 0.5)).sum().backward()
    assert all(weight.grad is None for weight in base.parameters())
    assert net.head[-1].weight.grad is not None


# ---- floors, caps and shapes ---------------------------------------------------------------------


def loss_and_slope(loss, factor):
    """A loss of 8 images for z_hat = factor z, and the derivative of their sum by the factor."""
    torch.manual_seed(0)
    factor = torch.tensor(factor, requires_grad=True)
    # x0 = 0, so x_hat / sigma is z itself.
    net = common.ExactNet(lambda x, sigma: factor * x / sigma[:, None])
    values = loss(net, common.VE(), torch.zeros(8, 50), torch.full((8,), 0.9))
    (derivative,) = torch.autograd.grad(values.sum(), factor)
    return values, derivative


def test_ascent_stops_at_its_cap(unlearn):
    """An image whose score matching loss is above 2 pushes no more."""
    values, derivative = loss_and_slope(unlearn["ascent_loss"], 5.0)
    assert torch.equal(values, torch.full((8,), -2.0))
    assert derivative == 0


def test_obt_floor_stops_the_push():
    """z_hat = -5 z has z_hat . z near -5: clipped to -2, with no gradient left."""
    values, derivative = loss_and_slope(common.obt_loss, -5.0)
    assert torch.equal(values, torch.full((8,), -2.0))
    assert derivative == 0


def test_obt_without_floor_is_not_clipped():
    values, _ = loss_and_slope(partial(common.obt_loss, floor=None), -5.0)
    assert values.mean() < -4


def shrinking_net():
    """A network that needs no training, for points and images alike."""
    return common.ExactNet(lambda x, sigma: 0.5 * x / (1 + common.expand_like(sigma, x)), 0.5)


SHAPES = pytest.mark.parametrize("shape", [(5, 2), (5, 3, 8, 8)], ids=["points", "images"])


@SHAPES
@pytest.mark.parametrize(
    "name", ["dsm", "ort", "ort-inner", "obt", "obt-rel", "ascent", "erasediff"]
)
def test_losses_are_per_image_and_of_any_rank(name, shape, unlearn):
    net = shrinking_net()
    losses = {
        "dsm": common.dsm_loss,
        "ort": common.ort_loss,
        "ort-inner": partial(common.ort_loss, inner=True),
        "obt": common.obt_loss,
        "obt-rel": relative_to(net, common.obt_rel_loss),
        "ascent": unlearn["ascent_loss"],
        "erasediff": unlearn["erasediff_loss"],
    }
    torch.manual_seed(0)
    x0 = torch.randn(shape)
    t = torch.rand(5)
    assert losses[name](net, common.VP(), x0, t).shape == (5,)


@SHAPES
def test_losses_of_siss_are_per_image_and_of_any_rank(shape, unlearn):
    torch.manual_seed(0)
    x_g = torch.randn(shape)
    t = torch.rand(5)
    x_f = torch.randn(shape)
    losses = unlearn["siss_losses"](shrinking_net(), common.VP(), x_g, x_f, t)
    assert [loss.shape for loss in losses] == [(5,), (5,)]
