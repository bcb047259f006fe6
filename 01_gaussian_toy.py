"""01  Three Gaussians: what unlearning can and cannot do, with exact answers.

    python 01_gaussian_toy.py
    python 01_gaussian_toy.py --means -3 0 0 0 3 0 0 3 --weights 3 1 3 2 --forget 1 --out out/mine

It takes a minute and a half on 2 CPU cores and needs no data. The second line is a mixture of your
own: x y of each Gaussian.

Question: a score model learned p = .4 N((-2,-2), I) + .2 N(0, I) + .4 N((2,2), I). It must forget
          the middle one, D_f, and keep the other two, D_g. How far can D_f's likelihood fall, and
          how often is the middle still drawn?
Answer:   everything is Gaussian, so every score, density and optimum below is a formula. A small
          network is then trained with the very losses the images use and lands on the formula.

A diffusion model in five lines. Noise a data point x0: x_hat = x0 + sigma z with z ~ N(0, I). A
network sees x_hat and sigma and estimates z. The best estimate is z_hat = E[z | x_hat], and
-z_hat/sigma = grad log p_sigma(x_hat) is the score: the way uphill in density. Going from sigma
large to small along the score turns noise into data. Unlearning changes the estimate, hence where
the walk ends.

The models: Standard has learned all data, and Unseen only D_g. The others are Standard after
unlearning: Ort and Obt are the paper's, Obt-rel is ours, and ascent is a baseline. In the table D_g
and D_f stand for the negative log-likelihood of points of D_g and of D_f. Good is a low D_g and a
high D_f.

Expect: the learned D_g and D_f of Standard and Unseen within 0.08 of the exact ones. The middle
holds 23 % of Standard's samples, 8 % of Unseen's (tails of the other two), 2 % of Obt-rel's. Writes
out/toy/: table.json, panels.png, frontier.png, flow.gif. Those of another mixture are replaced only
with --overwrite.

Predict, then run:
  1. Unseen never saw the middle. Why does it still put 8 % of its samples there, and what would
     0 % cost?
  2. Ascent and Obt with alpha 0.9 give D_f the same exact value, 12.31. Do they draw equally many
     samples from the middle? Why can the likelihood of D_f and the share of samples disagree?
  3. The released code has the other sign in Obt's loss. Is the middle's share then above or below
     Unseen's? (obt_released_optimum)
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

import common

# Table 1 of the paper's poster: (D_g, D_f), in the unit of the function `unit`. The poster has one
# row for Ort or Obt and does not say which of them it is. Here it stands beside Obt.
POSTER = {"standard": (10.91, 10.73), "unseen": (10.63, 11.59), "obt": (10.64, 39.01)}
POSTER_G, POSTER_F = POSTER["obt"]

# The paper's mixture, as --means, --weights and --forget have it.
PAPERS_MIXTURE = {"means": [-2, -2, 0, 0, 2, 2], "weights": [0.8, 0.4, 0.8], "forget": [1]}

NATS_PER_BIT = 2 * math.log(2)  # one bit per dimension is so many nats of a 2-D point


def unit(nats):
    """Convert nats of a 2-D point to the poster's unit: bits per dimension + 8.

    The likelihood code of Song et al. 2021 (score_sde) adds 8 to every result. That is right for
    images in [0, 1] with 256 grey levels, since 8 = log2 256. It has no meaning for points. The
    poster's table has the 8 in it: its Standard row says 10.91, and the exact value is 3.63 nats,
    which is 10.62 in this unit.
    """
    return nats / NATS_PER_BIT + 8


# ---- the world: what is kept, what is forgotten --------------------------------------------------


class Toy:
    """A mixture of unit Gaussians, some of which are to be forgotten: p = pi_g p_g + pi_f p_f.

    means    list of [x, y], one for each of the K components
    weights  list of K numbers, normalised here to sum 1
    forget   list of the indices of the components to forget

    It has these attributes:

    all, g, f       exact networks (common.GaussianMixture) of all data, of D_g and of D_f
    is_f            (K,) bool, which components are D_f
    pi_f            share of D_f in the data; that of D_g is pi_g = 1 - pi_f
    sd              standard deviation of a coordinate of the data
    x               (N, 2) a lattice for exact integrals, where the data have density
    cell_area       area around each point of the lattice
    mass_g, mass_f  (N,) probability of that area under D_g and under D_f
    """

    def __init__(self, means, weights, forget):
        means = torch.tensor(means, dtype=torch.float64)  # (K, 2)
        weights = torch.tensor(weights, dtype=torch.float64)  # (K,)
        weights /= weights.sum()
        self.is_f = torch.zeros(len(means), dtype=torch.bool)
        self.is_f[forget] = True
        self.pi_f = weights[self.is_f].sum().item()

        # Variance of a mixture: that of its means, plus 1 within each component.
        mean = weights @ means
        variance = weights @ (means - mean) ** 2 + 1  # (2,)
        self.sd = variance.mean().sqrt().item()

        covs = torch.eye(2, dtype=torch.float64).expand(len(means), 2, 2)

        def mixture(chosen):
            """Return the exact network of some of the components, given by a mask or a slice."""
            return common.GaussianMixture(means[chosen], covs[chosen], weights[chosen], self.sd)

        self.all = mixture(slice(None))
        self.g = mixture(~self.is_f)
        self.f = mixture(self.is_f)

        # A sum over a lattice of step h integrates a Gaussian of width 1 with an error of only
        # 2 exp(-2 pi^2 / h^2). Our integrals also have ln p in them, which is less smooth and needs
        # a finer lattice: hence 0.25.
        step = 0.25
        reach = means.abs().max() + 6  # six standard deviations: nothing is left outside
        axis = torch.arange(-reach, reach, step, dtype=torch.float64)
        lattice = torch.cartesian_prod(axis, axis)
        self.x = lattice[self.all.log_prob(lattice).exp() > 1e-9]
        self.cell_area = step**2
        self.mass_g = self.g.log_prob(self.x).exp() * self.cell_area
        self.mass_f = self.f.log_prob(self.x).exp() * self.cell_area

    def cross_entropy(self, log_p):
        """Return the means E_g[-ln p] over D_g and E_f[-ln p] over D_f, in nats.

        log_p  (N,) the log-density of a model on the lattice x
        """
        nats_g = -(self.mass_g * log_p).sum().item()
        nats_f = -(self.mass_f * log_p).sum().item()
        return nats_g, nats_f

    def share_at_forgotten(self, x):
        """Return the share of samples x (n, 2) that lie nearest to a forgotten mean, in percent."""
        nearest = torch.cdist(x.double(), self.all.means).argmin(1)
        return 100 * self.is_f[nearest].double().mean().item()


# ---- the optima: which z_hat minimises alpha L_g + (1 - alpha) L_f -------------------------------
#
# On data of D_g all methods have the same loss, L_g = |z_hat - z|^2. On data of D_f they have
#
#     Obt      L_f = z_hat . z                  Obt-rel  L_f = z_hat . (z - z_base)
#     Ort      L_f = |z_hat o z|^2              ascent   L_f = -|z_hat - z|^2
#     Ort with the inner product  L_f = (z_hat . z)^2
#
# where o multiplies number by number, and . and |...|^2 are sums over the two coordinates. (The
# losses of common.py are half of these, which changes no optimum.)
#
# Look at one x_hat. Points of D_g come there with the density p_g, points of D_f with p_f. So L_f
# counts r = (1 - alpha) p_f / (alpha p_g) times as much as L_g. Let z_g, z_f and z_base be the
# means of z, given x_hat, under D_g, under D_f and under all data. Set the derivative by z_hat to
# zero, and what is left is one equation for z_hat. Each function solves one of these:
# x_hat (B, 2), sigma (B,) -> z_hat (B, 2).


def log_ratio(toy, x_hat, sigma):
    """Return ln p_f/p_g for the densities of the noised data at x_hat: (B,)."""
    return toy.f.log_prob(x_hat, sigma) - toy.g.log_prob(x_hat, sigma)


def forget_pull(toy, alpha, x_hat, sigma):
    """Return r = (1 - alpha) p_f / (alpha p_g), how hard L_f pulls compared with L_g: (B, 1)."""
    log_r = log_ratio(toy, x_hat, sigma) + math.log((1 - alpha) / alpha)
    # r has no bound where there is no D_g. e^60 is as good as infinite, and does not overflow.
    return log_r.clamp(max=60).exp()[:, None]


def obt_optimum(toy, alpha, x_hat, sigma):
    """Obt: solve 2 (z_hat - z_g) + r z_f = 0.

    Where there is no D_g, r is huge and z_hat runs away.
    """
    z_g = toy.g.z_hat(x_hat, sigma)
    z_f = toy.f.z_hat(x_hat, sigma)
    return z_g - 0.5 * forget_pull(toy, alpha, x_hat, sigma) * z_f


def obt_released_optimum(toy, alpha, x_hat, sigma):
    """Obt with the sign that L_f has in the released code: solve 2 (z_hat - z_g) - r z_f = 0."""
    z_g = toy.g.z_hat(x_hat, sigma)
    z_f = toy.f.z_hat(x_hat, sigma)
    return z_g + 0.5 * forget_pull(toy, alpha, x_hat, sigma) * z_f


def obt_rel_optimum(toy, alpha, x_hat, sigma):
    """Obt-rel: solve 2 (z_hat - z_g) + r (z_f - z_base) = 0.

    All data are a mixture, so z_base = (pi_g p_g z_g + pi_f p_f z_f)/p, and
    z_f - z_base = (pi_g p_g/p) (z_f - z_g). Put that in: its p_g cancels the p_g that r divides by.
    With p(D_f | x_hat) = pi_f p_f/p, the probability that x_hat comes from D_f, what is left is

        z_hat = z_g + kappa p(D_f | x_hat) (z_g - z_f),   kappa = (1 - alpha) pi_g / (2 alpha pi_f)

    A probability is at most 1, so this cannot run away.
    """
    z_g = toy.g.z_hat(x_hat, sigma)
    z_f = toy.f.z_hat(x_hat, sigma)
    pi_g = 1 - toy.pi_f
    kappa = (1 - alpha) * pi_g / (2 * alpha * toy.pi_f)
    # Bayes: the log-odds of D_f are ln p_f/p_g + ln pi_f/pi_g. sigmoid makes a probability of them.
    log_odds = log_ratio(toy, x_hat, sigma) + math.log(toy.pi_f / pi_g)
    posterior_f = torch.sigmoid(log_odds)[:, None]
    return z_g + kappa * posterior_f * (z_g - z_f)


def ort_optimum(toy, alpha, x_hat, sigma):
    """Ort: solve 2 (z_hat - z_g) + 2 r E_f[z o z] o z_hat = 0, each coordinate by itself."""
    z_g = toy.g.z_hat(x_hat, sigma)
    r = forget_pull(toy, alpha, x_hat, sigma)
    # E_f[z o z] is the diagonal of the matrix E_f[z z']: (B, 2, 2) -> (B, 2).
    moment = toy.f.second_moment(x_hat, sigma).diagonal(dim1=1, dim2=2)
    return z_g / (1 + r * moment)


def ort_inner_optimum(toy, alpha, x_hat, sigma):
    """Ort with the inner product: solve (I + r E_f[z z']) z_hat = z_g, a matrix for each x_hat."""
    z_g = toy.g.z_hat(x_hat, sigma)
    r = forget_pull(toy, alpha, x_hat, sigma)[..., None]  # (B, 1) -> (B, 1, 1)
    moment = toy.f.second_moment(x_hat, sigma)  # (B, 2, 2)
    return torch.linalg.solve(torch.eye(2, dtype=moment.dtype) + r * moment, z_g)


def ascent_optimum(toy, weight, x_hat, sigma):
    """Gradient ascent: solve p_g (z_hat - z_g) - w p_f (z_hat - z_f) = 0, w the `weight`.

    w is (1 - alpha)/alpha. The solution is the score of (p_g - w p_f)/(1 - w), as long as that is a
    density, which means that it is nowhere below 0.
    """
    z_g = toy.g.z_hat(x_hat, sigma)
    z_f = toy.f.z_hat(x_hat, sigma)
    pull = weight * log_ratio(toy, x_hat, sigma).exp()[:, None]  # w p_f/p_g, (B, 1)
    return (z_g - pull * z_f) / (1 - pull)


OPTIMA = {
    "obt": obt_optimum,
    "obt-released": obt_released_optimum,
    "obt-rel": obt_rel_optimum,
    "ort": ort_optimum,
    "ort-inner": ort_inner_optimum,
    "ascent": ascent_optimum,
}


def optimum(toy, method, alpha=None):
    """Return the network that minimises alpha L_g + (1 - alpha) L_f exactly, at every noise level.

    method  "standard", "unseen" (both without alpha) or a key of OPTIMA
    alpha   the weight of L_g; for "ascent" the weight w
    """
    if method == "standard":
        return toy.all
    if method == "unseen":
        return toy.g
    return common.ExactNet(partial(OPTIMA[method], toy, alpha), toy.sd)


# ---- learned scores ------------------------------------------------------------------------------


class MLP(nn.Module):
    """A small network for points, F(y, phi): (B, 2), (B,) -> (B, 2).

    y is x_hat scaled to variance 1, and phi is the noise level as an angle, tan(phi) = sigma/sd.
    From F follows z_hat: see "The circle" in common.py. The noise level enters as sines and cosines
    of ln(sigma/sd) at several frequencies, as in the U-Net.
    """

    def __init__(self, sd, width=128):
        super().__init__()
        self.sd = sd
        freq = torch.exp(torch.linspace(math.log(0.25), math.log(4.0), 8))
        self.register_buffer("freq", freq)
        self.net = nn.Sequential(
            nn.Linear(2 + 16, width),  # two coordinates, 8 sines and 8 cosines
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, y, phi):
        """Compute F at the points y (B, 2) with the noise levels phi (B,)."""
        angle = torch.log(torch.tan(phi))[:, None] * self.freq  # ln tan(phi) = ln(sigma/sd), (B, 8)
        return self.net(torch.cat([y, angle.sin(), angle.cos()], 1))


def forget_loss(net, base, sde, method, x_f, t):
    """Return L_f of a method at points x_f (B, 2) of D_f and times t (B,): (B,)."""
    if method == "ort":
        return common.ort_loss(net, sde, x_f, t)
    if method == "obt":
        # No floor: the exact optimum has none. In two dimensions the loss of a point is mostly
        # chance, and a floor would cut that off.
        return common.obt_loss(net, sde, x_f, t, floor=None)
    return common.obt_rel_loss(net, base, sde, x_f, t)


def train(toy, method, alpha, steps, base=None, batch=1024):
    """Train a network towards `optimum`, and return the average of its weights as a network.

    base   None: start with random weights and use L_g alone, on all data for "standard", on D_g for
           any other method. Otherwise the Standard model: start there and unlearn
    batch  points in a step, of D_g and of D_f each
    """
    sde = common.VP()
    net = MLP(toy.sd)
    lr = 1e-2
    if base is not None:
        net.load_state_dict(base.state_dict())
        lr = 4e-3  # gentler: most of what the base knows is to stay
    optimizers = [torch.optim.Adam(net.parameters(), lr, fused=True)]
    ema = common.EMA(net, 0.995)
    num_skipped = 0  # steps in a row whose gradient was not finite
    total_skipped = 0
    kept = toy.all if method == "standard" else toy.g  # what L_g sees

    for step in range(steps):
        common.set_lr(optimizers, step, steps, warmup=50)
        x_g = kept.sample(batch).float()  # exact networks compute in float64, learned ones do not
        # Nine of ten have ln sigma ~ N(0, 1.2^2), where the three Gaussians merge. The others keep
        # both ends of the range alive.
        t = common.lognormal_t(batch, sde, 0.0, 1.2, uniform=0.1)
        if base is None:
            # "v" weighs all noise levels alike: training from random weights is far quicker so.
            loss = common.dsm_loss(net, sde, x_g, t, weight="v").mean()
        else:
            # Both losses get the same t and no weight by noise level: `optimum` assumes that.
            x_f = toy.f.sample(batch).float()
            loss_g = common.dsm_loss(net, sde, x_g, t).mean()
            loss_f = forget_loss(net, base, sde, method, x_f, t).mean()
            loss = alpha * loss_g + (1 - alpha) * loss_f
        loss.backward()
        num_skipped = common.guarded_step(net, optimizers, num_skipped)
        total_skipped += num_skipped > 0
        ema.update(net)
    common.refuse_skipped(total_skipped, steps)
    if total_skipped:
        print(f"{method}: {steps} steps{common.skipped_text(total_skipped)}")
    ema.net.skipped_steps = total_skipped  # for table.json
    return ema.net


def log_prob(net, x, steps=20):
    """Return ln p(x) of a network at points x (N, 2): (N,), by the same ODE as for images.

    steps  of the solver
    """
    parts = []
    for part in x.split(20000):  # not all at once: this bounds the memory
        # The ODE needs the trace of dF/dy. For images random probes estimate it. In two dimensions
        # two products with the unit vectors give it exactly.
        probes = common.basis_probes(part)
        parts.append(common.ode_log_likelihood(net, common.VP(), part, probes, steps))
    return torch.cat(parts)


def samples(net, n, dtype, seed=0):
    """Draw n samples (n, 2) by the probability-flow ODE (Heun, 30 steps).

    dtype  float64 for an exact network, float32 for a learned one
    """
    noise = torch.randn(n, 2, generator=common.rng(seed), dtype=dtype)
    sigmas = common.karras_sigmas(31, common.VP().sigma_max()).to(dtype)
    return common.ode_sample(net, noise, sigmas)


# ---- what no density can do ----------------------------------------------------------------------


class Frontier(NamedTuple):
    """The bound E_f[-ln p] <= (E_g[-ln p] - const)/eta, which holds for EVERY density p, in nats.

    `frontier` derives it. Unlearning wants E_f, the D_f of the table, high and E_g, its D_g, low.
    """

    eta: float  # smallest p_g/p_f anywhere; 0 if D_f reaches further out than D_g: then no bound
    const: float  # nats

    def exists(self):
        """Return whether D_f overlaps with D_g enough for the bound to say anything."""
        return self.eta > 1e-3

    def highest_f(self, value_g):
        """Return the highest D_f that a density with this D_g can have, in the poster's unit."""
        nats_g = (value_g - 8) * NATS_PER_BIT  # undoes `unit`
        return unit((nats_g - self.const) / self.eta)

    def lowest_g(self, value_f):
        """Return the lowest D_g that a density with this D_f can have, in the poster's unit."""
        return unit(self.const + self.eta * (value_f - 8) * NATS_PER_BIT)


def frontier(toy):
    """Find out what ANY density p can do on this mixture: a Frontier.

    Let eta be the smallest p_g/p_f. Then u = p_g - eta p_f is nowhere negative, and its integral is
    1 - eta. By Gibbs' inequality no density p makes INT u (-ln p) smaller than p = u/(1 - eta), so

        E_g[-ln p] - eta E_f[-ln p] = INT u (-ln p) >= const = -INT u ln(u/(1 - eta)).

    Pushing D_f out costs D_g, because D_g lives there too, if only in its tails. Ascent with
    w = eta reaches the bound: p = u/(1 - eta) is its optimum.

    Far out in some direction only the Gaussian counts whose mean lies furthest in it. If a mean of
    D_f lies outside the convex hull of those of D_g, p_g/p_f falls to 0 there, and D_f can be
    pushed out for nothing.
    """
    log_g_over_f = toy.g.log_prob(toy.x) - toy.f.log_prob(toy.x)
    eta = log_g_over_f.min().exp().item()
    if not all(is_in_hull(mean, toy.g.means) for mean in toy.f.means):
        eta = 0.0
    # The integral of u over the cell of each point. It is 0 where p_g/p_f is smallest. There
    # 0 ln 0 would be nan in a computer and not 0, so keep it above 0.
    mass = (toy.mass_g - eta * toy.mass_f).clamp(min=1e-300)
    density = mass / (1 - eta) / toy.cell_area  # u/(1 - eta) at each point
    return Frontier(eta, -(mass * density.log()).sum().item())


def is_in_hull(point, corners):
    """Tell whether a point (2,) lies in the convex hull of corners (K, 2), its edge included.

    From a point outside all corners are seen within less than half a turn. So the directions to
    them leave a gap of more than half a turn.
    """
    x, y = (corners - point).T
    if (x.hypot(y) < 1e-9).any():  # on a corner, and so without a direction
        return True
    angles = torch.atan2(y, x).sort().values
    gaps = torch.cat([angles.diff(), angles[:1] + 2 * math.pi - angles[-1:]])
    return gaps.max().item() <= math.pi + 1e-9


# ---- the table -----------------------------------------------------------------------------------


class ExactResult(NamedTuple):
    """What the exact optimum of a method does."""

    nats_g: float  # E_g[-ln p]
    nats_f: float  # E_f[-ln p]
    share: float  # samples at the forgotten components, in percent
    max_abs: float  # the largest coordinate of a sample, without its sign


@dataclass
class Row:
    """One row of the table.

    _g and _f are the means of -ln p over D_g and over D_f, in the poster's unit. ur, the unlearning
    ratio, is the share of samples at the forgotten components, in percent.
    """

    method: str
    alpha: float | None  # weight of L_g; for ascent the weight w

    # The exact optimum.
    exact_g: float
    exact_f: float
    ur_exact: float

    # The learned network. None where none was trained.
    learned_g: float | None = None
    learned_f: float | None = None
    ur_learned: float | None = None
    max_abs: float | None = None  # the largest coordinate of a sample, without its sign
    field_error: float | None = None  # root mean square of learned minus exact z_hat

    # The poster. None where it has no such row, and with a mixture that is not the paper's.
    poster_g: float | None = None
    poster_f: float | None = None


def exact_result(toy, method, alpha, args):
    """Measure the exact optimum of a method: an ExactResult."""
    net = optimum(toy, method, alpha)
    x = samples(net, args.n // 2, torch.float64)
    nats_g, nats_f = toy.cross_entropy(log_prob(net, toy.x, args.rk4))
    return ExactResult(nats_g, nats_f, toy.share_at_forgotten(x), x.abs().max().item())


def exact_curves(toy, known, args):
    """Measure the exact optima for all args.alphas: {method: list of ExactResult}.

    known  {(method, alpha): ExactResult}, those that the table has already; each takes seconds
    """
    curves = {}
    for method in ("obt", "obt-rel", "ort"):
        curves[method] = []
        for alpha in args.alphas:
            result = known.get((method, alpha)) or exact_result(toy, method, alpha, args)
            curves[method].append(result)
    return curves


def table_row(toy, method, alpha, exact, nets, args):
    """Make a row of the table: of the exact optimum, and of a network that is trained here.

    exact  ExactResult of the method
    nets   {method: network}, to which the trained network is added

    Ascent gets no network: its row is there to show that the frontier can be reached.
    """
    row = Row(method, alpha, unit(exact.nats_g), unit(exact.nats_f), exact.share)
    if method in POSTER and is_papers(args):
        row.poster_g, row.poster_f = POSTER[method]
    if method != "ascent":
        nets[method] = train_method(method, toy, alpha, nets, args)
        measure_learned(row, toy, nets[method], args)
    return row


def train_method(method, toy, alpha, nets, args):
    """Train the network of a method; one that unlearns starts from Standard, with fewer steps."""
    if method in ("standard", "unseen"):
        return train(toy, method, alpha, args.steps)
    return train(toy, method, alpha, max(1, args.steps // 3), nets["standard"])


def measure_learned(row, toy, net, args):
    """Fill in the columns of a row that are about the learned network."""
    # 5,000 points give a mean to 0.01. Standard and Unseen unlearn nothing, so their numbers have
    # to be right: they get all 20,000.
    n = args.n // 4
    rk4 = 12  # steps of the solver
    if row.method in ("standard", "unseen"):
        n = args.n
        rk4 = 9  # fewer, because there are four times as many points
    x = samples(net, args.n // 2, torch.float32, args.seed)
    test_g = toy.g.sample(n, common.rng(args.seed, 1)).float()
    test_f = toy.f.sample(n, common.rng(args.seed, 1)).float()

    row.learned_g = unit(-log_prob(net, test_g, rk4).mean().item())
    row.learned_f = unit(-log_prob(net, test_f, rk4).mean().item())
    row.ur_learned = toy.share_at_forgotten(x)
    row.max_abs = x.abs().max().item()

    # How far the learned z_hat is from the exact one, on noised data of D_g at all noise levels.
    # For comparison: a coordinate of z has the standard deviation 1.
    sde = common.VP()
    sigma = sde.sigma(common.uniform_t(n, sde))
    z = torch.randn(n, 2, generator=common.rng(args.seed, 2))
    x_hat = test_g + sigma[:, None] * z
    z_exact = optimum(toy, row.method, row.alpha).z_hat(x_hat.double(), sigma.double())
    _, z_learned = common.predict(net, x_hat, sigma)
    row.field_error = (z_learned - z_exact).square().mean().sqrt().item()


def plan(bound):
    """Return which rows the table has: a list of (method, alpha)."""
    rows = [
        ("standard", None),
        ("unseen", None),
        ("ort", 0.9),
        ("obt", 0.9),
        ("obt-rel", 0.7),
        ("obt-rel", 0.65),
    ]
    if bound.exists():
        # Ascent with the largest weight w that has an optimum, rounded down. When w is above eta,
        # p_g - w p_f is below 0 somewhere, hence no density.
        rows.append(("ascent", math.floor(bound.eta * 1000) / 1000))
    return rows


def format_cell(value):
    """Write one number of the table 7 characters wide; blanks if it is None."""
    if value is None:
        return " " * 7
    if value < 1000:
        return f"{value:7.2f}"
    return f"{value:7.0e}"


def print_row(row):
    """Print one row of the table, method and alpha first."""
    method, alpha, *numbers = asdict(row).values()  # in the order of the fields of Row
    alpha_text = "" if alpha is None else f"{alpha:g}"
    cells = "".join(format_cell(number) for number in numbers)
    print(f"{method:9}{alpha_text:>6}{cells}", flush=True)


def print_curves(curves, alphas):
    """Print how the samples of Obt and Obt-rel change as L_f gains weight."""
    print("\nalpha        " + "".join(f"{alpha:10g}" for alpha in alphas))
    for method in ("obt", "obt-rel"):
        shares = "".join(f"{result.share:9.1f}%" for result in curves[method])
        # Of 1e40, which is where Obt's samples can end, .1f would print all 41 digits.
        largest = "".join(
            f"{result.max_abs:10.1f}" if result.max_abs < 1e6 else f"{result.max_abs:10.0e}"
            for result in curves[method]
        )
        print(f"{method:8}share{shares}")
        print(f"{'':7}max|x|{largest}")


def print_bound(bound, unseen):
    """Print what the frontier allows on a mixture of one's own; `unseen` is that row."""
    print(
        f"\nfrontier: eta = {bound.eta:.5f}.  With the D_g of Unseen, {unseen.exact_g:.2f}, "
        f"D_f is at most {bound.highest_f(unseen.exact_g):.2f}."
    )


def print_limits(bound, limits):
    """Print what the frontier means for the poster's pair of numbers, on the paper's mixture."""
    print(
        f"\nfrontier: eta = {bound.eta:.5f}.  "
        f"D_g = 10.64 allows D_f at most {limits['df_max_at_10.64']:.2f}; "
        f"D_f = 39.01 needs D_g at least {limits['dg_min_at_39.01']:.2f}."
    )
    print(
        "On the paper's mixture no density has the poster's pair 10.64 / 39.01.  "
        "A finite test set, another covariance, or the error\n"
        "of a likelihood solver (39.01 is 43 nats, far outside where the network was trained) "
        "could each explain it."
    )


# ---- pictures ------------------------------------------------------------------------------------


def draw_panels(path, toy, nets):
    """Draw four panels as the poster has them: three models, and what unlearning has changed.

    nets  {name: network} of three models, "standard" and "obt-rel" among them

    A panel of a model shows its density, some samples, and its score as arrows. The fourth panel
    shows the score of Obt-rel minus that of Standard, over the density of Obt-rel.
    """
    reach = toy.all.means.abs().max().item() + 3
    axis = torch.linspace(-reach, reach, 60)
    pixels = torch.cartesian_prod(axis, axis)  # (3600, 2)
    arrow_axis = torch.linspace(-reach, reach, 15)
    arrows = torch.cartesian_prod(arrow_axis, arrow_axis)  # (225, 2)

    noise_level = 0.5  # of all arrows; a network has one score for each level
    sigma = torch.full((len(arrows),), noise_level)
    scores = {}
    for name, net in nets.items():
        _, z_hat = common.predict(net, arrows, sigma)
        scores[name] = -z_hat.detach() / noise_level  # score = -z_hat/sigma
    scores["obt-rel minus standard"] = scores["obt-rel"] - scores["standard"]

    plt = common.pyplot()
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.9))
    for ax, name in zip(axes, scores):
        net = nets.get(name, nets["obt-rel"])  # the fourth panel has no network of its own
        # The second coordinate runs fastest: (3600,) -> (60 of x, 60 of y). contourf wants y along
        # the rows: hence .T
        density = log_prob(net, pixels, 8).exp().reshape(60, 60).T
        ax.contourf(axis, axis, density, levels=12, cmap="Blues")
        if name in nets:
            drawn = samples(net, 400, torch.float32)
            ax.plot(*drawn.T, ".", ms=2, color="k", alpha=0.5)
        ax.quiver(*arrows.T, *scores[name].T, color=common.FORGOTTEN, width=0.004)
        ax.plot(*toy.f.means.T, "x", color="black", ms=10, mew=2.5)
        ax.set(title=name, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    fig.tight_layout()
    common.save_figure(fig, path, dpi=80)


def draw_frontier(path, curves, rows, bound, has_poster):
    """Draw D_f (left) and the share of samples at D_f (right) against D_g.

    curves      {method: list of ExactResult}, one for each alpha
    rows        list of Row: their learned points, or the exact one where nothing was learned
    bound       Frontier, grey on the left where it exists
    has_poster  show the poster's point, on the axes that fit the paper's mixture

    The left axis is broken where the poster's point is shown, which lies far above all others.
    """
    plt = common.pyplot()
    upper = ["top", "right"] if has_poster else ["left", "right"]
    fig, axes = plt.subplot_mosaic(
        [upper, ["left", "right"]], figsize=(10, 4.8), height_ratios=[1, 4]
    )
    left = axes["left"]
    right = axes["right"]
    limits = PAPERS_LIMITS if has_poster else limits_of(rows)
    left.set(xlim=limits["g"], ylim=limits["f"])
    right.set(xlim=limits["g"], ylim=limits["share"])
    if bound.exists():
        values_g = torch.linspace(*limits["g"], 50)
        values_f = [bound.highest_f(value.item()) for value in values_g]
        for name in set(axes) - {"right"}:
            # Grey from the bound up to above the top of the picture.
            ceiling = max(45, limits["f"][1])
            axes[name].fill_between(
                values_g, values_f, ceiling, color="0.85", label="no density can be here"
            )

    styles = common.method_styles(common.METHOD_STYLES)
    for method, results in curves.items():
        table = torch.tensor(results)  # (number of alphas, 4), columns as in ExactResult
        values_g = unit(table[:, 0])
        style = {**styles[method], "markersize": 4}
        left.plot(values_g, unit(table[:, 1]), **style)
        right.plot(values_g, table[:, 2], **style, label=f"{method}, exact")
    draw_points(left, right, rows, styles)
    if has_poster:
        draw_poster(axes["top"], left)

    label_g = "D_g, bits/dim + 8 (low: kept)"
    left.set(xlabel=label_g, ylabel="D_f, bits/dim + 8 (high: unlikely)")
    right.set(xlabel=label_g, ylabel="samples at the forgotten mode, %")
    if left.get_legend_handles_labels()[1]:  # what is not on the right: the bound, the poster
        left.legend(fontsize=9, loc="upper right")
    right.legend(fontsize=9, loc="upper right")
    fig.tight_layout(h_pad=0.3)
    common.save_figure(fig, path, dpi=80)


# The axes of draw_frontier that fit the paper's mixture: Obt's D_f runs out of the picture.
PAPERS_LIMITS = {"g": (10.5, 11.2), "f": (10.5, 16.5), "share": (0, 25)}


def limits_of(rows):
    """Return the axes of draw_frontier on which all rows of the table can be seen."""
    points = [shown_point(row) for row in rows]
    limits = {}
    for name, values in zip(("g", "f", "share"), zip(*points)):
        margin = 0.1 * (max(values) - min(values)) + 0.05
        limits[name] = (min(values) - margin, max(values) + margin)
    return limits


def draw_poster(top, left):
    """Draw the poster's point into an axis of its own above the left one."""
    break_axis(top, left)
    star = {"marker": "*", "color": common.METHOD_STYLES["erasediff"][0], "linestyle": ""}
    top.plot(POSTER_G, POSTER_F, **star, markersize=13)
    top.set(xlim=PAPERS_LIMITS["g"], ylim=(36.5, 41.5), yticks=(38, 40))
    left.plot([], [], **star, markersize=13, label="poster, MSGM")  # for the legend alone


def break_axis(top, bottom):
    """Let two axes, one above the other, look like one whose y axis leaves something out."""
    top.spines["bottom"].set_visible(False)
    bottom.spines["top"].set_visible(False)
    top.tick_params(bottom=False, labelbottom=False)
    slash = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": 9, "color": "k", "linestyle": ""}
    top.plot([0, 1], [0, 0], transform=top.transAxes, clip_on=False, **slash)
    bottom.plot([0, 1], [1, 1], transform=bottom.transAxes, clip_on=False, **slash)


def draw_points(left, right, rows, styles):
    """Draw the rows of the table as points: with a black edge where a network has learned them."""
    named = set()  # Obt-rel has two rows, and needs one line of the legend
    for row in rows:
        style = {**styles[row.method], "linestyle": "", "markersize": 8}
        name = f"{row.method}, exact"
        if row.learned_g is not None:
            style |= {"markeredgecolor": "black", "markersize": 9}
            name = f"{row.method}, learned"
        value_g, value_f, share = shown_point(row)
        left.plot(value_g, value_f, **style)
        right.plot(value_g, share, **style, label=None if name in named else name)
        named.add(name)


def shown_point(row):
    """Return D_g, D_f and the share of a row: as learned, or exact where nothing was learned."""
    if row.learned_g is None:
        return row.exact_g, row.exact_f, row.ur_exact
    return row.learned_g, row.learned_f, row.ur_learned


def draw_flow(path, toy, nets, num_points=600):
    """Draw an animation: the same noise on its way to samples of Standard and of Obt-rel.

    nets  {name: network} of both

    A triangle is a point that ends at a forgotten mode. A circle, one standard deviation around its
    mean, marks the mode. All points are shrunk to the size of the data, because at high noise they
    would be far outside.
    """
    plt = common.pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 5.6), dpi=80, sharey=True)
    reach = toy.all.means.abs().max().item() + 3
    noise = torch.randn(num_points, 2, generator=common.rng(0))
    sigmas = common.karras_sigmas(61, common.VP().sigma_max())
    ways = []
    marks = []
    for ax, name in zip(axes, ("standard", "obt-rel")):
        recorder = common.Recorder(nets[name])
        x = common.ode_sample(recorder, noise, sigmas)
        # Heun's method asks twice a step. Every other question is about a point on the way itself.
        # Where sigma is far from the size of the data nothing moves.
        way = [(sigma, point) for sigma, point in recorder.seen[::2] if 0.1 < sigma < 10]
        ways.append([*way, (0, x)])
        ends_there = toy.is_f[torch.cdist(x.double(), toy.all.means).argmin(1)]
        kept = ax.plot([], [], "o", ms=3, color=common.METHOD_STYLES["obt-rel"][0], alpha=0.6)
        forgotten = ax.plot([], [], "^", ms=5, color=common.FORGOTTEN)
        marks.append([(*kept, ~ends_there), (*forgotten, ends_there)])
        for mean in toy.f.means.tolist():
            ax.add_patch(plt.Circle(mean, 1, fill=False, linewidth=2))
        share = toy.share_at_forgotten(x)
        ax.set_title(f"{name}: {share:.0f} % end at the forgotten mode", fontsize=13)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.set_xlabel("first coordinate")
    axes[0].set_ylabel("second coordinate")
    fig.subplots_adjust(left=0.06, right=0.99, bottom=0.1, top=0.86, wspace=0.05)

    def show(k):
        """Show step k of both models."""
        for way, points in zip(ways, marks):
            for line, chosen in points:
                line.set_data(*way[k][1][chosen].T)
        fig.suptitle(f"noise level sigma = {ways[0][k][0]:.2f}", fontsize=13)

    common.save_animation(fig, path, show, len(ways[0]))


# ---- the story -----------------------------------------------------------------------------------


FILES = ("table.json", "panels.png", "frontier.png", "flow.gif")  # what a run writes


def arguments(argv):
    """Read the command line; exit with one line if the mixture makes no sense."""
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--means",
        type=common.number(float, -20, 20),
        nargs="+",
        default=PAPERS_MIXTURE["means"],
        help="x y of each Gaussian",
    )
    parser.add_argument(
        "--weights",
        type=common.number(float, 1e-3, 1e3),
        nargs="+",
        default=PAPERS_MIXTURE["weights"],
        help="shares of the Gaussians, normalised to sum 1",
    )
    parser.add_argument(
        "--forget",
        type=common.number(int, 0),
        nargs="+",
        default=PAPERS_MIXTURE["forget"],
        help="which Gaussians to forget, from 0",
    )
    parser.add_argument(
        "--steps",
        type=common.number(int, 1),
        help="training steps of Standard and Unseen; unlearning takes a third (default: 1500)",
    )
    parser.add_argument(
        "--n",
        type=common.number(int, 100, 10**6),
        help="test points of D_g and of D_f each; half as many samples (default: 20000)",
    )
    common.add_seed(parser)
    common.add_out(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the same path with few steps and samples, in <out>/quick",
    )
    common.add_overwrite(parser)
    args = parser.parse_args(argv)

    # rk4: steps of the likelihood's solver. alphas: where the curves of the exact optima are taken.
    full = {"steps": 1500, "n": 20000, "rk4": 20, "alphas": [0.95, 0.9, 0.8, 0.7, 0.5]}
    quick = {"steps": 20, "n": 500, "rk4": 4, "alphas": [0.9, 0.7]}
    chosen = quick if args.quick else full
    args.rk4 = chosen["rk4"]
    args.alphas = chosen["alphas"]
    args.steps = args.steps or chosen["steps"]
    args.n = args.n or chosen["n"]

    num_components = len(args.weights)
    has_all_means = len(args.means) == 2 * num_components
    is_known = max(args.forget) < num_components
    is_something_kept = len(set(args.forget)) < num_components
    if not (has_all_means and is_known and is_something_kept):
        common.exit_with_error(
            f"--means takes x y for each of the {num_components} --weights; "
            f"--forget takes some of 0..{num_components - 1}, not all"
        )
    return args


def is_papers(args):
    """Tell whether the mixture is the paper's, so that the poster's figures belong to it."""
    return all(getattr(args, name) == value for name, value in PAPERS_MIXTURE.items())


def make_toy(args):
    """Make the mixture of the command line, where the means stand as x y x y ..."""
    means = [args.means[i : i + 2] for i in range(0, len(args.means), 2)]
    return Toy(means, args.weights, args.forget)


def refuse_equal_parts(toy):
    """Exit with one line if D_f and D_g are the same density, of which nothing can be forgotten."""
    if torch.allclose(toy.mass_g, toy.mass_f, atol=1e-9):
        common.exit_with_error(
            "what --forget names has the same density as the rest: give it other --means"
        )


def next_command(args):
    """Return the command to try next: a --quick run of 02 with the same --out."""
    where = {"dataset": "mnist", "data_dir": None, "out": args.out, "device": None}
    args_of_02 = argparse.Namespace(**where, quick=True)
    if not args.quick:  # else args.out is the folder of --quick already
        common.separate_quick(args_of_02)
    return common.command_line("02_train_sde.py", args_of_02)


def main(argv=None):
    """Compare exact optima with learned networks, and both with what any density can do."""
    args = arguments(argv)
    common.separate_quick(args)
    toy = make_toy(args)
    refuse_equal_parts(toy)
    out = common.make_folder(Path(args.out) / "toy")
    common.remove_leftovers(out)
    common.refuse_unwritable(*[out / name for name in FILES])
    now = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite")}
    common.refuse_other_result(args, out / "table.json", now)
    start = time.time()
    torch.manual_seed(args.seed)

    # ---- what any density could reach; no bound where D_f reaches further out than D_g
    bound = frontier(toy)
    has_poster = is_papers(args)
    limits = {"df_max_at_10.64": None, "dg_min_at_39.01": None}
    if bound.exists() and has_poster:
        limits["df_max_at_10.64"] = bound.highest_f(POSTER_G)
        limits["dg_min_at_39.01"] = bound.lowest_g(POSTER_F)

    # ---- the table
    print("D_g, D_f: negative log-likelihood in bits/dim + 8; share: % of samples nearest to D_f")
    print(f"{'exact':>22}{'learned':>30}{'poster':>36}")
    print("method    alpha    D_g    D_f  share    D_g    D_f  share max|x|  error    D_g    D_f")
    exact = {}  # (method, alpha) -> ExactResult
    nets = {}  # method -> learned network; of the two runs of Obt-rel the later one
    rows = []
    for method, alpha in plan(bound):
        exact[method, alpha] = exact_result(toy, method, alpha, args)
        row = table_row(toy, method, alpha, exact[method, alpha], nets, args)
        rows.append(row)
        print_row(row)

    # ---- where the exact optima go as L_f gains weight: Obt's samples run away, Obt-rel's do not
    curves = exact_curves(toy, exact, args)
    print_curves(curves, args.alphas)
    if bound.exists() and has_poster:
        print_limits(bound, limits)
    elif bound.exists():
        print_bound(bound, *[row for row in rows if row.method == "unseen"])

    # ---- outputs
    content = {
        "rows": [asdict(row) for row in rows],
        "frontier": limits,
        "curves": curves,
        "skipped_steps": {name: net.skipped_steps for name, net in nets.items()},
        "args": vars(args),
    }
    common.write_json(out / "table.json", content)
    panels = {name: nets[name] for name in ("standard", "unseen", "obt-rel")}
    again = common.own_command("01_gaussian_toy.py", argv)
    common.draw_picture(out / "panels.png", draw_panels, toy, panels, again=again)
    common.draw_picture(
        out / "frontier.png", draw_frontier, curves, rows, bound, has_poster, again=again
    )
    common.draw_picture(out / "flow.gif", draw_flow, toy, panels, again=again)
    common.say(
        f"{time.time() - start:.0f} s; wrote {out}/table.json, panels.png, frontier.png, flow.gif; "
        f"next: {next_command(args)}"
    )


if __name__ == "__main__":
    common.run(main)
