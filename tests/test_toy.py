"""01: its numbers against independent quadrature, the released sign, and the command line."""

import math
from typing import NamedTuple

import pytest
import torch
from conftest import (
    check_refusal,
    check_success,
    quick,
    read_animation,
    read_json,
    run_script,
)

PAPER = ([[-2, -2], [0, 0], [2, 2]], [0.8, 0.4, 0.8], [1])  # means, weights, which to forget
OTHER = ([[-3, 0], [0, 0], [3, 0], [0, 2]], [2, 1, 3, 1], [1, 3])
ON_THE_EDGE = ([[-3, 0], [0, 0], [3, 0], [0, 3]], [3, 1, 3, 2], [1])  # of the triangle that is kept

STEP = 0.1  # of the tests' own lattice; the script has another step and another reach
CELL = STEP**2  # area around each point


def density(points, means, weights):
    """A mixture of unit Gaussians written out by hand: (N, 2) -> (N,)."""
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = shares / shares.sum()
    distances = torch.cdist(points, torch.tensor(means, dtype=torch.float64))
    return (torch.exp(-(distances**2) / 2) / (2 * math.pi)) @ shares


class World(NamedTuple):
    """A mixture as the script has it, and its densities on a lattice of the tests' own."""

    mixture: object  # the script's Toy
    p_g: torch.Tensor  # (N,) density of D_g, normalised by itself
    p_f: torch.Tensor  # (N,) density of D_f
    p: torch.Tensor  # (N,) density of everything


@pytest.fixture(scope="module", params=[PAPER, OTHER], ids=["paper", "other"])
def world(request, toy):
    """One mixture after the other, as a World."""
    means, weights, forget = request.param
    axis = torch.arange(-11, 11.01, STEP, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    kept = [i for i in range(len(means)) if i not in forget]

    def density_of(indices):
        chosen_means = [means[i] for i in indices]
        chosen_weights = [weights[i] for i in indices]
        return density(points, chosen_means, chosen_weights)

    return World(
        mixture=toy["Toy"](means, weights, forget),
        p_g=density_of(kept),
        p_f=density_of(forget),
        p=density_of(range(len(means))),
    )


ONLY_PAPER = pytest.mark.parametrize("world", [PAPER], ids=["paper"], indirect=True)


@pytest.fixture(scope="module")
def paper(toy):
    """The paper's mixture, as the script has it."""
    return toy["Toy"](*PAPER)


def exact_cross_entropies(toy, mixture, method, alpha, *steps):
    """E_g[-ln p] and E_f[-ln p] in nats of an exact optimum, as the script finds them."""
    net = toy["optimum"](mixture, method, alpha)
    return mixture.cross_entropy(toy["log_prob"](net, mixture.x, *steps))


# ---- exact optima whose density is known ---------------------------------------------------------


def quadrature(truth, world):
    """E_g[-ln p] and E_f[-ln p] in nats by a sum over the tests' lattice."""
    log_p = truth.clamp(min=1e-300).log()
    entropy_g = -(world.p_g * log_p).sum().item() * CELL
    entropy_f = -(world.p_f * log_p).sum().item() * CELL
    return entropy_g, entropy_f


def test_standard_equals_quadrature(world, toy):
    got = exact_cross_entropies(toy, world.mixture, "standard", None, 30)
    assert got == pytest.approx(quadrature(world.p, world), abs=0.004)


def test_unseen_equals_quadrature(world, toy):
    got = exact_cross_entropies(toy, world.mixture, "unseen", None, 30)
    assert got == pytest.approx(quadrature(world.p_g, world), abs=0.004)


@ONLY_PAPER  # in the other mixture D_f has room to itself: there is no legal weight
def test_ascent_equals_quadrature(world, toy):
    smallest_ratio = (world.p_g / world.p_f)[world.p_f > 1e-12].min().item()
    w = 0.9 * min(0.5, smallest_ratio)
    truth = (world.p_g - w * world.p_f) / (1 - w)
    got = exact_cross_entropies(toy, world.mixture, "ascent", w, 30)
    assert got == pytest.approx(quadrature(truth, world), abs=0.004)


# ---- the frontier --------------------------------------------------------------------------------


def ratio_along(mixture, direction, distance):
    """p_g/p_f far away from the middle, in one direction."""
    x = torch.tensor([direction], dtype=torch.float64) * distance
    return (mixture.g.log_prob(x) - mixture.f.log_prob(x)).exp().item()


@pytest.mark.parametrize("mixture", [PAPER, ON_THE_EDGE], ids=["paper", "edge"])
def test_eta_of_the_frontier_is_the_smallest_ratio(mixture, toy):
    axis = torch.arange(-30, 30.01, STEP, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    world = toy["Toy"](*mixture)
    want = (world.g.log_prob(points) - world.f.log_prob(points)).min().exp().item()
    assert toy["frontier"](world).eta == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize(
    "means, forget, direction",
    [
        (OTHER[0], [1, 3], (0, 1)),
        ([[0, 0], [1, 0]], [1], (1, 0)),
        ([[-2, -2], [0, 0.1], [2, 2]], [1], (-1, 1)),
    ],
)
def test_there_is_no_bound_where_the_forgotten_reaches_further_out(means, forget, direction, toy):
    """Far out in that direction p_g/p_f comes as near to 0 as wanted."""
    mixture = toy["Toy"](means, [1] * len(means), forget)
    assert ratio_along(mixture, direction, 200) < 1e-3
    bound = toy["frontier"](mixture)
    assert bound.eta == 0
    assert not bound.exists()


def test_constant_of_the_frontier_equals_quadrature(world, toy):
    eta, const = toy["frontier"](world.mixture)
    u = (world.p_g - eta * world.p_f).clamp(min=1e-300)
    want = -(u * (u / (1 - eta)).log()).sum().item() * CELL
    assert const == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize(
    "method, alpha",
    [("standard", None), ("unseen", None), ("obt", 0.9), ("obt-rel", 0.7), ("ort", 0.9)],
)
def test_no_model_crosses_the_frontier(method, alpha, world, toy):
    eta, const = toy["frontier"](world.mixture)
    nats_g, nats_f = exact_cross_entropies(toy, world.mixture, method, alpha)
    assert eta * nats_f <= nats_g - const + 5e-3


# ---- the paper's mixture, in the poster's unit ---------------------------------------------------


@pytest.mark.parametrize(
    "method, alpha, want_g, want_f",
    [
        ("standard", None, 10.617, 10.792),
        ("unseen", None, 10.542, 11.724),
        ("obt", 0.9, 10.626, 12.303),
        ("obt-rel", 0.7, 10.598, 12.875),
        ("ort", 0.9, 11.00, 11.81),
    ],
)
def test_the_paper_mixture_has_the_derived_numbers(method, alpha, want_g, want_f, paper, toy):
    nats_g, nats_f = exact_cross_entropies(toy, paper, method, alpha)
    assert toy["unit"](nats_g) == pytest.approx(want_g, abs=0.02)
    assert toy["unit"](nats_f) == pytest.approx(want_f, abs=0.02)


def test_eta_of_the_paper_mixture(paper, toy):
    assert toy["frontier"](paper).eta == pytest.approx(math.exp(-4), rel=1e-3)


def test_the_posters_d_g_allows_d_f_at_most_17_26(paper, toy):
    assert toy["frontier"](paper).highest_f(10.64) == pytest.approx(17.26, abs=0.02)


def test_the_posters_d_f_needs_d_g_at_least_11_04(paper, toy):
    assert toy["frontier"](paper).lowest_g(39.01) == pytest.approx(11.04, abs=0.02)


# ---- the released sign ---------------------------------------------------------------------------

NUM_SAMPLES = 40000
ERROR = 100 * math.sqrt(0.1 * 0.9 / NUM_SAMPLES)  # standard error of a share near 10 %, in percent


@pytest.fixture(scope="module")
def shares(paper, toy):
    """{method: share of samples in the middle, in percent} for exact optima at alpha 0.9."""
    result = {}
    for method in ("unseen", "obt", "obt-released"):
        net = toy["optimum"](paper, method, 0.9)
        x = toy["samples"](net, NUM_SAMPLES, torch.float64)
        result[method] = paper.share_at_forgotten(x)
    return result


@pytest.fixture(scope="module")
def share_of_unseen():
    """Unseen's share of the middle as an integral: the mass of p_g nearer to 0 than to a mode.

    That is |x1 + x2| < 2, and (x1 + x2)/sqrt 2 is normal about -2 sqrt 2 and about 2 sqrt 2.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    near = normal.cdf(torch.tensor(math.sqrt(2)))
    far = normal.cdf(torch.tensor(3 * math.sqrt(2)))
    return 100 * (far - near).item()


def test_unseen_draws_the_tails_of_the_other_two(shares, share_of_unseen):
    assert share_of_unseen == pytest.approx(7.86, abs=0.01)
    assert shares["unseen"] == pytest.approx(share_of_unseen, abs=4 * ERROR)


def test_the_released_sign_draws_the_middle_more_often_than_unseen(shares, share_of_unseen):
    """The released code's + r/2 z_f does not forget."""
    assert shares["obt-released"] > share_of_unseen + 10 * ERROR


def test_the_posters_sign_draws_the_middle_less_often_than_unseen(shares, share_of_unseen):
    assert shares["obt"] < share_of_unseen - 10 * ERROR


def largest_coordinate(toy, mixture, method):
    """The largest |x| among samples of an exact optimum at alpha 0.5."""
    net = toy["optimum"](mixture, method, 0.5)
    return toy["samples"](net, 2000, torch.float64).abs().max().item()


def test_obt_runs_away(paper, toy):
    assert largest_coordinate(toy, paper, "obt") > 50


def test_obt_rel_does_not_run_away(paper, toy):
    assert largest_coordinate(toy, paper, "obt-rel") < 8


# ---- the command line ----------------------------------------------------------------------------

KEYS = {
    "method",
    "alpha",
    "exact_g",
    "exact_f",
    "learned_g",
    "learned_f",
    "ur_exact",
    "ur_learned",
    "max_abs",
    "poster_g",
    "poster_f",
}
OTHER_FLAGS = "--means -3 0 0 0 3 0 0 2 --weights 2 1 3 1 --forget 1 3".split()


@pytest.fixture(scope="module", params=[[], OTHER_FLAGS], ids=["paper", "other"])
def quick_run(request, tmp_path_factory):
    """The folder that a quick run of the script has written, for one mixture after the other."""
    out = tmp_path_factory.mktemp("out")
    check_success(run_script("01", "--quick", "--out", out, *request.param))
    return quick(out) / "toy"


@pytest.fixture
def table(quick_run):
    """The content of the table.json of a quick run."""
    return read_json(quick_run / "table.json")


def test_which_files_are_written(quick_run):
    names = {path.name for path in quick_run.iterdir()}
    assert names == {"table.json", "panels.png", "frontier.png", "flow.gif"}


def test_the_animation_ends_with_samples_and_is_small(quick_run):
    """More than a few pictures, all different; the last one stands long enough to be read."""
    pictures, seconds = read_animation(quick_run / "flow.gif")
    assert len(pictures) > 10
    assert len(set(pictures)) == len(pictures)
    assert seconds[-1] >= 2 > seconds[0]
    assert (quick_run / "flow.gif").stat().st_size < 1.5e6


def test_the_table_has_a_row_for_each_method(table):
    methods = {row["method"] for row in table["rows"]}
    assert {"standard", "unseen", "ort", "obt", "obt-rel"} <= methods


def test_every_row_has_all_columns(table):
    for row in table["rows"]:
        assert KEYS <= set(row), f"row of {row['method']}"


def test_the_table_holds_both_limits_of_the_frontier(table):
    assert set(table["frontier"]) == {"df_max_at_10.64", "dg_min_at_39.01"}


@pytest.mark.parametrize(
    "flags",
    [
        *("--forget 3", "--forget 0 1 2", "--means 1 2 3", "--weights -1 1 1", "--steps 0"),
        "--means 1 1 1 1 --weights 1 2 --forget 1",  # D_f is D_g
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(script, tmp_path, flags):
    check_refusal(script("01", "--out", tmp_path, *flags.split()))
    assert list(tmp_path.iterdir()) == []


def test_another_mixture_is_not_held_against_the_poster(script, tmp_path):
    flags = "--means -3 0 0 0 3 0 0 3 --weights 3 1 3 2 --forget 1"
    run = script("01", "--quick", "--out", tmp_path, *flags.split())
    check_success(run)
    assert "frontier: eta" in run.out
    assert "poster" not in run.out.partition("method")[2].partition("\n")[2]
    table = read_json(quick(tmp_path) / "toy/table.json")
    assert {row["poster_g"] for row in table["rows"]} == {None}
    assert set(table["frontier"].values()) == {None}


def test_samples_that_run_away_keep_the_columns(toy, capsys):
    result = toy["ExactResult"](1.0, 2.0, 3.0, 7.1e40)
    toy["print_curves"]({"obt": [result, result], "obt-rel": [result, result]}, [0.9, 0.7])
    _, *lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1, "a column is wider than its title"


# ---- the full run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_rows(tmp_path_factory):
    """The rows of the table of a full run."""
    out = tmp_path_factory.mktemp("out")
    check_success(run_script("01", "--out", out))
    return read_json(out / "toy/table.json")["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("method, tolerance_f", [("standard", 0.06), ("unseen", 0.1)])
def test_learned_numbers_are_near_the_exact_ones(method, tolerance_f, full_rows):
    (row,) = [row for row in full_rows if row["method"] == method]
    assert row["learned_g"] == pytest.approx(row["exact_g"], abs=0.06)
    assert row["learned_f"] == pytest.approx(row["exact_f"], abs=tolerance_f)


def forgets_and_keeps(row):
    """Whether a learned model forgets D_f, keeps D_g and has no runaway samples."""
    keeps = row["learned_g"] <= 10.72
    forgets = row["learned_f"] >= 13.0 and row["ur_learned"] <= 2
    return keeps and forgets and row["max_abs"] < 8


@pytest.mark.slow
def test_a_learned_obt_rel_forgets_keeps_and_stays_near(full_rows):
    rows = [row for row in full_rows if row["method"] == "obt-rel"]
    assert any(forgets_and_keeps(row) for row in rows), rows
