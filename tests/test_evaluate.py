"""04: its measures against closed forms, and what it does with models, interruptions, bad input."""

import argparse
import math
import shutil
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import (
    SCRIPTS,
    Run,
    arguments,
    check_refusal,
    check_success,
    load_script,
    quick,
    read_json,
    run_function,
    run_process,
    run_script,
    same_weights,
)

import common

FORGET = "--dataset mnist --quick --forget 3 --n 20 --nfe 2 --n-nll 3".split()
FILES = {"table.md", "table.json", "samples.png", "classes.png"}


@pytest.fixture(scope="module")
def evaluate():
    """The names of 04_evaluate.py."""
    return types.SimpleNamespace(**load_script("04"))


# ---- density and coverage ------------------------------------------------------------------------

SIZES = pytest.mark.parametrize("n, m", [(400, 400), (300, 150)])


def mean_density_coverage(evaluate, n, m):
    """Density and coverage of two sets of one distribution, averaged over 8 seeds, k = 5."""
    results = []
    for seed in range(8):
        points = torch.randn(n + m, 8, generator=common.rng(seed))
        results.append(evaluate.density_coverage(*points.split([n, m]), k=5))
    return torch.tensor(results).mean(0).tolist()


@SIZES
def test_density_of_one_distribution_is_one(evaluate, n, m):
    density, _ = mean_density_coverage(evaluate, n, m)
    assert density == pytest.approx(1, abs=0.08)


@SIZES
def test_coverage_of_one_distribution_follows_from_exchangeability(evaluate, n, m):
    """A ball stays empty when the k nearest of the other n - 1 + m points are all real."""
    _, coverage = mean_density_coverage(evaluate, n, m)
    all_real = math.prod((n - i) / (n + m - i) for i in range(1, 6))
    assert coverage == pytest.approx(1 - all_real, abs=0.012)


def cluster(seed, centre):
    """300 points of a Gaussian in 4 dimensions."""
    return torch.randn(300, 4, generator=common.rng(seed)) + centre


MODE_A = cluster(0, centre=0)
MODE_B = cluster(1, centre=50)
RUBBISH = cluster(2, centre=500)
REAL = torch.cat([MODE_A, MODE_B])
WHOLE = REAL + 0.1


def test_coverage_sees_that_all_modes_are_there(evaluate):
    _, coverage = evaluate.density_coverage(REAL, WHOLE)
    assert coverage > 0.95


def test_coverage_sees_a_lost_mode(evaluate):
    _, coverage = evaluate.density_coverage(REAL, torch.cat([MODE_A, MODE_A]) + 0.1)
    assert coverage == pytest.approx(0.5, abs=0.03)


def test_rubbish_has_neither_density_nor_coverage(evaluate):
    assert evaluate.density_coverage(REAL, RUBBISH) == (0, 0)


def test_density_sees_rubbish_beside_good_samples(evaluate):
    density, _ = evaluate.density_coverage(REAL, torch.cat([MODE_A, RUBBISH]))
    density_of_whole, _ = evaluate.density_coverage(REAL, WHOLE)
    assert density < 0.6 * density_of_whole


# ---- likelihood ----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [[0.4, -0.7], [1.0, 1.0], [-2.0, 0.5]], ids=str)
@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)], ids=["point", "image"])
def test_nll_bound_is_exact_for_an_exact_score(evaluate, gaussian, shape, point):
    """At typical points and far out, for points and images alike.

    E_z[-ln p(x + sigma z)] of a Gaussian is -ln N(x; m, C) + sigma^2 tr(C^-1)/2, where
    C = S + sigma^2 I.
    """
    sigma = 0.05
    n = 5000
    x = torch.tensor(point, dtype=torch.float64).reshape(1, *shape)
    cov = gaussian.covs[0] + sigma**2 * torch.eye(2, dtype=torch.float64)
    log_p = gaussian.log_prob(x, torch.tensor([sigma], dtype=torch.float64))
    want = -log_p + sigma**2 / 2 * torch.linalg.inv(cov).trace()

    copies = x.expand(n, *shape)
    got = evaluate.nll_bound(gaussian, copies, sigma, levels=32, generator=common.rng(0))
    assert got.shape == (n,)
    error = got.std() / n**0.5
    assert abs(got.mean() - want) < 4 * error
    assert error < 0.06


def test_a_wrong_score_raises_the_bound(evaluate, gaussian):
    x = gaussian.sample(4000, common.rng(0))
    wrong = common.ExactNet(lambda x_hat, sigma: 0.8 * gaussian.z_hat(x_hat, sigma), gaussian.sd)
    right_bound = evaluate.nll_bound(gaussian, x, 0.01, generator=common.rng(1)).mean()
    wrong_bound = evaluate.nll_bound(wrong, x, 0.01, generator=common.rng(1)).mean()
    assert wrong_bound > right_bound + 0.05


@pytest.mark.parametrize("sigma_max", [1.0, 2.0, 8.0])
def test_the_bound_does_not_depend_on_where_its_integral_ends(evaluate, sigma_max):
    """For data that are all 0, z_hat = x_hat/sigma, and the integral can be done by hand.

    It is |x|^2/2 (1/sigma_min^2 - 1/sigma_max^2), and the prior's share makes up for the end.
    """
    net = common.ExactNet(lambda x_hat, sigma: x_hat / sigma[:, None], sd=1.0)
    x = torch.full((20, 4), 3.0, dtype=torch.float64)
    bound = evaluate.nll_bound(net, x, 0.5, sigma_max, levels=100, generator=common.rng(0))
    entropy = 2 * math.log(2 * math.pi * math.e * 0.5**2)
    want = torch.full((20,), entropy + 36 / 2 / 0.5**2, dtype=torch.float64)
    torch.testing.assert_close(bound, want, rtol=0.012, atol=0)


def test_the_bound_carries_no_gradient(evaluate):
    net = common.UNet(width=8)
    assert not evaluate.nll_bound(net, torch.zeros(2, 1, 8, 8), levels=2).requires_grad


class Likelihoods(NamedTuple):
    """What `likelihoods` makes of two sets of 48 images whose exact values are known."""

    result: dict  # its columns
    kept: dict  # the values of single images that it has kept
    exact: torch.Tensor  # (2 * 48,) their exact values: D_g, then D_f


NUM_IMAGES = 48
DIM = 16  # numbers in each of them


@pytest.fixture(scope="module")
def of_two_sets(evaluate, tmp_path_factory):
    """Images of D_g from a correlated Gaussian and, farther out, of D_f, with exact scores."""
    root = torch.randn(DIM, DIM, generator=common.rng(0), dtype=torch.float64) / 4
    cov = root @ root.T + 0.1 * torch.eye(DIM)
    net = common.GaussianMixture(
        torch.zeros(1, DIM).double(), cov[None], torch.ones(1).double(), sd=0.5
    )
    points_g = net.sample(NUM_IMAGES, common.rng(1))
    points_f = 1.5 * net.sample(NUM_IMAGES, common.rng(2))
    x = torch.cat([points_g, points_f])
    exact = -net.log_prob(x, torch.full((len(x),), 0.001).double())

    folder = tmp_path_factory.mktemp("forget")
    setup = evaluate.Setup(
        args=argparse.Namespace(
            sde="vp", nll="ode", nll_floor=0.001, rk4=30, levels=64, seed=0, data_dir=None
        ),
        folder=folder,
        sde=common.VP(),
        judge=None,
        forget=[],
        classes=[],
        real_images=None,
        real=None,
        progress=evaluate.Progress(total=1),
    )
    model = evaluate.Model(name="gauss", net=net, trained={}, digest="x")
    result = evaluate.likelihoods(setup, model, x.reshape(-1, 1, 4, 4), 1)
    kept = torch.load(folder / "kept/gauss.nll.pt", weights_only=True)
    return Likelihoods(result, kept, exact)


KINDS = pytest.mark.parametrize("kind", ["ode", "bound"])
PARTS = pytest.mark.parametrize("part", ["g", "f"])


def half(values, part):
    """The values of D_g, the first ones, or those of D_f."""
    return values[:NUM_IMAGES] if part == "g" else values[NUM_IMAGES:]


# The standard errors come from one probe an image, or from 64 draws of z an image.
@pytest.mark.parametrize("kind, error", [("ode", 0.4), ("bound", 1.3)], ids=["ode", "bound"])
@PARTS
def test_mean_likelihood_is_the_exact_one(of_two_sets, kind, error, part):
    want = half(of_two_sets.exact, part).mean().item()
    mean = of_two_sets.result[f"{kind}_nats_{part}"]["mean"]
    assert mean == pytest.approx(want, abs=4 * error)


@KINDS
@PARTS
def test_columns_are_mean_and_standard_error_of_the_single_images(of_two_sets, kind, part):
    values = half(of_two_sets.kept[kind], part)
    nats = of_two_sets.result[f"{kind}_nats_{part}"]
    assert nats["mean"] == pytest.approx(values.mean().item())
    assert nats["se"] == pytest.approx(values.std().item() / NUM_IMAGES**0.5)


@KINDS
@PARTS
def test_bits_are_nats_in_another_unit(of_two_sets, kind, part):
    nats = of_two_sets.result[f"{kind}_nats_{part}"]
    bits = of_two_sets.result[f"{kind}_bits_{part}"]
    assert bits["mean"] == pytest.approx(nats["mean"] / (DIM * math.log(2)) + 7)
    assert bits["se"] == pytest.approx(nats["se"] / (DIM * math.log(2)))


def test_the_set_farther_out_is_less_likely(of_two_sets):
    nats_g = of_two_sets.result["ode_nats_g"]["mean"]
    nats_f = of_two_sets.result["ode_nats_f"]["mean"]
    assert nats_f > nats_g + 3


def test_the_error_of_the_solver_is_small_and_not_zero(of_two_sets):
    assert 0 < of_two_sets.result["ode_error_bits"] < 0.01


def test_the_error_of_the_solver_is_measured_with_twice_the_steps(evaluate, monkeypatch, tmp_path):
    """16 images of D_g and 16 of D_f are solved again, and no others."""
    calls = []

    def solve(net, sde, x, probes, steps, *args, **options):
        calls.append((len(x), steps))
        return torch.zeros(len(x))

    monkeypatch.setattr(common, "ode_log_likelihood", solve)
    args = evaluate.arguments(["--forget", "3", "--device", "cpu", "--out", str(tmp_path)])
    args.nll = "ode"
    args.rk4 = 5
    args.levels = 2
    setup = types.SimpleNamespace(args=args, sde=common.VP())
    net = common.UNet(width=8)
    evaluate.nll_in_nats(setup, net, torch.zeros(80, 1, 8, 8), "label")
    assert calls == [(64, 5), (16, 5), (32, 10)]


# ---- how much work it is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nll, relearn, cost",
    [
        ("none", None, 3 * 20),
        ("none", [1, 10], 3 * 20 + 2 * 2 * 20),  # Standard is not attacked
        ("bound", None, 3 * (20 + 4 * 64)),
        ("ode", None, 3 * (20 + 4 * (64 + 8 * 30))),
    ],
)
def test_cost_counts_network_evaluations(evaluate, nll, relearn, cost):
    args = argparse.Namespace(n=10, nfe=2, nll=nll, relearn=relearn, levels=64, rk4=30)
    assert evaluate.total_cost(args, num_models=3, num_nll_images=4) == cost


# ---- what is measured against what ---------------------------------------------------------------


def grey_judge(images):
    """Take the first pixel of an image for its class: logits (B, 10) and features (B, 3)."""
    label = images[:, 0, 0, 0].long()
    features = torch.stack([label, label**2 % 7, label**3 % 11], 1).float()
    return 10 * torch.eye(10)[label], features


class GreyJudge(torch.nn.Linear):
    """A judge whose verdict is known: the first pixel of an image."""

    def forward(self, images):
        return grey_judge(images)


def grey_images(labels):
    """One image of 1x1 for each label, which is its grey."""
    return torch.tensor(labels, dtype=torch.uint8).reshape(-1, 1, 1, 1)


@pytest.fixture
def grey_setup(evaluate):
    """A setup whose judge reads the class off the first pixel; 3 is to be forgotten."""
    judge = GreyJudge(1, 1)
    real = grey_images([0, 1, 2, 4, 5, 6, 7, 8, 9] * 6)
    return evaluate.Setup(
        args=argparse.Namespace(n=20, seed=0, fid=False),
        folder=None,
        sde=common.VP(),
        judge=judge,
        forget=[3],
        classes=[str(digit) for digit in range(10)],
        real_images=real,
        real=common.judge_images(judge, real),
        progress=None,
    )


def test_measures_take_as_many_real_images_as_samples_that_are_compared(evaluate, grey_setup):
    """Standard draws 4 images of D_f among 20; so 16 samples are compared, with 16 real images."""
    standard = evaluate.judged(grey_setup, grey_images([3, 3, 3, 3, *range(4, 10), *[1, 2] * 5]))
    other = evaluate.judged(grey_setup, grey_images([*range(10), *range(10)]))
    real = common.random_subset(grey_setup.real.features, 16, 0, 3)

    row = evaluate.measures(grey_setup, standard, standard)
    compared = standard["verdict"].features[4:]
    assert (row["density"], row["coverage"]) == evaluate.density_coverage(real, compared)
    assert row["fd"] == common.frechet_distance(compared, grey_setup.real.features)

    row = evaluate.measures(grey_setup, other, standard)
    compared = other["verdict"].features[:16]
    assert (row["density"], row["coverage"]) == evaluate.density_coverage(real, compared)
    assert row["fd"] == common.frechet_distance(compared, grey_setup.real.features)
    assert "class_min_ratio" in row


def test_recall_is_the_share_of_real_d_f_that_the_judge_knows(evaluate, grey_setup):
    """The images are chosen by the seed; in each half of them other shares are recognised."""
    test_f = grey_images([3] * 21 + [5] * 19)
    images = evaluate.Images(
        train_g=grey_images([1]),
        train_f=grey_images([3]),
        test_g=grey_images([0, 1, 2, 4, 5, 6, 7, 8, 9] * 4),
        test_f=test_f,
    )
    standard = evaluate.judged(grey_setup, grey_images([*range(10), *range(10)]))
    row, recall = evaluate.measure_real_images(grey_setup, images, standard)
    chosen = common.random_subset(test_f, 20, 0).flatten()
    assert recall == pytest.approx(100 * (chosen == 3).float().mean().item())
    assert row["model"] == "real D_g"
    assert row["ur"] == 0


def test_a_split_keeps_both_parts_apart(evaluate):
    labels = torch.arange(10).repeat(3)
    images = grey_images(labels.tolist())
    dataset = common.Dataset(images, labels, [str(digit) for digit in range(10)])
    args = argparse.Namespace(forget=["3", "7"], quick=False)
    split, forget = evaluate.split_images(dataset, dataset, args)
    assert forget == [3, 7]
    for kept in (split.train_g, split.test_g):
        assert sorted(set(kept.flatten().tolist())) == [0, 1, 2, 4, 5, 6, 8, 9]
    for forgotten in (split.train_f, split.test_f):
        assert sorted(set(forgotten.flatten().tolist())) == [3, 7]


# ---- relearning ----------------------------------------------------------------------------------


class Relearned(NamedTuple):
    """A network before and after `relearn` has shown it one image."""

    net: common.UNet
    before: dict  # a copy of its weights from before
    image: torch.Tensor  # (1, 1, 28, 28) uint8
    tuned: common.UNet


def relearn_from(evaluate, net, image):
    return evaluate.relearn(net, image, steps=30, batch=16, lr=2e-3, seed=0)


@pytest.fixture(scope="module")
def relearned(evaluate):
    """A small random network, and what 30 steps on one image make of it."""
    torch.manual_seed(0)
    net = common.UNet(width=16, sd=0.6).eval().requires_grad_(False)
    before = {name: w.clone() for name, w in net.state_dict().items()}
    image = common.load_dataset("mnist", train=False).images[:1]
    return Relearned(net, before, image, relearn_from(evaluate, net, image))


def test_relearning_lowers_the_loss_on_the_image(relearned):
    loss_by_noise = load_script("02")["loss_by_noise"]

    def loss(net):
        x0 = common.dequantize(relearned.image.expand(64, -1, -1, -1))
        return sum(value for _, _, value in loss_by_noise(net, x0))

    assert loss(relearned.tuned) < 0.9 * loss(relearned.net)


def test_the_relearned_network_is_in_eval_mode(relearned):
    assert not relearned.tuned.training


def test_relearning_leaves_the_model_alone(relearned):
    assert same_weights(relearned.before, relearned.net.state_dict())


def test_relearning_is_the_same_for_the_same_seed(evaluate, relearned):
    again = relearn_from(evaluate, relearned.net, relearned.image)
    assert same_weights(relearned.tuned.state_dict(), again.state_dict())


# ---- the table -----------------------------------------------------------------------------------


def test_table(evaluate):
    """Intervals, errors, empty cells, and a column that no row fills."""
    columns = {"model": 0, "ur": 2, "nll": 1, "none": 0}
    rows = [
        {"model": "a", "ur": [1.0, 2.5], "nll": {"mean": 3.14, "se": 0.25}},
        {"model": "bbb"},
    ]
    assert evaluate.table(columns, rows) == (
        "| model | ur           | nll       |\n"
        "| ----- | ------------ | --------- |\n"
        "| a     | 1.00 to 2.50 | 3.1 ± 0.2 |\n"
        "| bbb   |              |           |\n"
    )


# ---- models, and what is written -----------------------------------------------------------------

MODELS = ["standard", "unseen-any-scratch", "obt-rel-vp", "ort-ve"]  # rows of the table, in order


def save_model(path, scale=1.0, **args):
    """The shipped base with its first layer scaled, as a run would have left it."""
    content = torch.load(common.HERE / "data/mnist_base.pt", weights_only=True)
    content["ema"]["stem.weight"] *= scale
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(path, arch=content["arch"], ema=content["ema"], args=args)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The --out of a finished evaluation of four models, with runs around that it must not take."""
    out = tmp_path_factory.mktemp("out")
    root = quick(out) / "mnist"
    folder = root / "forget-3"
    # equal to Standard on purpose
    save_model(folder / "obt-rel-vp/model.pt", 1.0, method="obt-rel", sde="vp", seed=0)
    save_model(folder / "ort-ve/model.pt", 1.3, method="ort", sde="ve", seed=0)
    # as 02 --without 3 leaves it
    save_model(folder / "unseen-any-scratch/model.pt", 0.9, method="unseen", sde="any", seed=0)

    # a run in progress, and runs that have forgotten other classes
    save_model(folder / ".obt-vp.tmp123/model.pt", method="obt")
    save_model(root / "forget-3-7/unseen-any-scratch/model.pt", 0.9, method="unseen")
    save_model(root / "forget-7/obt-vp/model.pt", method="obt")
    check_success(run_script("04", *FORGET, "--relearn", 2, "--out", out))
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """The --out of a finished evaluation, for a test that changes something in it."""
    return shutil.copytree(finished, tmp_path / "out")


def forget_folder(out):
    return quick(out) / "mnist/forget-3"


def read_table(out):
    """The content of table.json."""
    return read_json(forget_folder(out) / "table.json")


@pytest.fixture(scope="module")
def rows(finished):
    """{model: its row of the table}."""
    return {row["model"]: row for row in read_table(finished)["models"]}


def test_which_files_are_written(finished):
    names = {path.name for path in forget_folder(finished).iterdir() if path.is_file()}
    assert names == FILES | {"relearn.json", "relearn.png", "relearned.png"}


def test_which_models_are_measured(rows):
    """Standard, Unseen, then the finished runs for this class and no others."""
    assert list(rows) == MODELS


def test_the_table_says_how_many_were_measured(finished):
    content = read_table(finished)
    assert content["n"] == 20
    assert content["n_nll"] == 3


def test_a_row_says_how_its_model_was_trained(rows):
    assert rows["ort-ve"]["method"] == "ort"
    assert rows["ort-ve"]["sde"] == "ve"


@pytest.mark.parametrize("name", MODELS)
def test_every_sample_is_counted_once(rows, name):
    assert sum(rows[name]["class_counts"]) == 20


@pytest.mark.parametrize("name", MODELS)
def test_ur_is_the_share_of_3s_and_lies_in_its_interval(rows, name):
    row = rows[name]
    low, high = row["ur_interval"]
    assert row["ur"] == pytest.approx(100 * row["class_counts"][3] / 20)
    assert low <= row["ur"] <= high


@pytest.mark.parametrize("name", MODELS)
def test_coverage_is_a_share(rows, name):
    assert 0 <= rows[name]["coverage"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_the_likelihood_has_an_error(rows, name):
    assert rows[name]["ode_bits_g"]["se"] > 0


@pytest.mark.parametrize(
    "key",
    [
        "ur",
        "class_counts",
        "low_confidence",
        "ode_bits_g",
        "ode_bits_f",
        "bound_bits_g",
        "bound_bits_f",
    ],
)
def test_a_copy_of_standard_has_standards_numbers(rows, key):
    """Because noise, images and probes are the same for all models."""
    assert rows["obt-rel-vp"][key] == rows["standard"][key]


def test_a_copy_of_standard_has_lost_no_class(rows):
    assert rows["obt-rel-vp"]["class_min_ratio"] == 1


def test_another_model_has_other_numbers(rows):
    assert rows["ort-ve"]["ode_bits_g"] != rows["standard"]["ode_bits_g"]


def test_the_judge_recognises_real_images(finished):
    content = read_table(finished)
    assert 80 < content["judge_recall"] <= 100
    assert content["real"]["ur"] < 10


def test_real_images_are_test_images_of_d_g_against_training_images_of_d_g(finished):
    """Under --quick 1000 training images are compared with."""
    train, test = common.load_train_and_test("mnist")
    judge = common.load_judge(arguments(finished, quick=True), train)
    real = common.judge_images(judge, train.images[train.labels != 3][:1000])
    drawn = common.judge_images(judge, common.random_subset(test.images[test.labels != 3], 20, 0))
    content = read_table(finished)
    num_compared = 20 - content["models"][0]["class_counts"][3]
    want = common.frechet_distance(drawn.features[:num_compared], real.features)
    assert content["real"]["fd"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("text", [*MODELS, "real D_g", "± "])
def test_table_md_holds(finished, text):
    assert text in (forget_folder(finished) / "table.md").read_text()


# ---- the attack ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked(finished):
    """The rows of relearn.json."""
    return read_json(forget_folder(finished) / "relearn.json")["rows"]


def test_each_unlearned_model_is_attacked(attacked):
    """First as it is, k = 0; Standard has nothing to relearn."""
    want = []
    for model in MODELS[1:]:
        want += [(model, 0), (model, 2)]
    assert [(row["model"], row["k"]) for row in attacked] == want


def test_before_the_attack_the_numbers_are_those_of_the_table(attacked, rows):
    before = {row["model"]: row["ur"] for row in attacked if row["k"] == 0}
    assert before == {name: rows[name]["ur"] for name in MODELS[1:]}


def test_the_attack_changes_the_samples(finished):
    def images(name):
        path = forget_folder(finished) / f"kept/obt-rel-vp.{name}.pt"
        return torch.load(path, weights_only=True)["images"]

    assert not torch.equal(images("samples"), images("relearn-2"))


def test_the_picture_shows_what_was_relearned_from_and_what_is_drawn_of_it(
    evaluate, tmp_path, monkeypatch
):
    """Two images were shown; of five samples the second and the last are judged D_f."""
    tiles = []

    def tile(images, columns):
        tiles.append(images)
        return torch.zeros(4, columns)

    monkeypatch.setattr(common, "tile", tile)
    shown = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    samples = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 4, 4)
    verdict = argparse.Namespace(labels=torch.tensor([1, 3, 0, 8, 3]))
    drawn = {"images": samples, "verdict": verdict}
    one = evaluate.Attack("obt-rel-vp", shown, drawn)
    evaluate.plot_relearned(tmp_path / "relearned.png", [one], [3], num_shown=3, num_drawn=4)
    (row,) = tiles
    white = 255
    want = [100, 100, white, white, 1, 4, white, white]
    assert row[:, 0, 0, 0].tolist() == want
    assert (tmp_path / "relearned.png").exists()


# ---- kept results, interruptions -----------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch):
    """A list that grows by one each time a model is sampled."""
    calls = []
    sample_images = common.sample_images

    def count_and_sample(*args, **options):
        calls.append(1)
        return sample_images(*args, **options)

    monkeypatch.setattr(common, "sample_images", count_and_sample)
    return calls


def test_a_rerun_measures_nothing_again(script, copy, sampled):
    before = (forget_folder(copy) / "table.json").read_text()
    check_success(script("04", *FORGET, "--out", copy))
    assert len(sampled) == 0
    assert (forget_folder(copy) / "table.json").read_text() == before


def test_only_what_changed_is_measured_again(script, copy, sampled):
    """With new weights in one folder, that model alone; and a kept result that is damaged."""
    before = read_table(copy)["models"]
    save_model(forget_folder(copy) / "ort-ve/model.pt", 1.2, method="ort", sde="ve", seed=0)
    damaged = forget_folder(copy) / "kept/unseen-any-scratch.nll.pt"
    damaged.write_bytes(b"damaged")

    run = script("04", *FORGET, "--out", copy)
    check_success(run)
    assert len(sampled) == 1, "only the model with new weights is sampled"
    assert "unseen-any-scratch.nll" in run.out, "the damaged result must be computed again"
    assert "standard.nll" not in run.out, "what is kept must not be computed again"
    after = read_table(copy)["models"]
    assert after[:3] == before[:3]
    assert after[3] != before[3], "new weights have other numbers"


@pytest.mark.parametrize(
    "flags, changes_likelihood",
    [("--sde ve", True), ("--seed 1", True), ("--nfe 3 --n 24", False)],
)
def test_no_flag_is_ignored(script, copy, flags, changes_likelihood):
    """Each changes the samples, the likelihood or both, as it should; and only that."""
    shutil.rmtree(forget_folder(copy) / "ort-ve")
    shutil.rmtree(forget_folder(copy) / "unseen-any-scratch")
    before = read_table(copy)["models"][0]
    check_success(script("04", *FORGET, *flags.split(), "--overwrite", "--out", copy))
    after = read_table(copy)["models"][0]
    assert after["fd"] != before["fd"]
    assert (after["ode_nats_g"] != before["ode_nats_g"]) == changes_likelihood


class Interrupted(NamedTuple):
    """An evaluation that was stopped in the likelihood of its second model, out of three."""

    out: Path  # its --out
    run: Run
    before: dict  # {name: content} of the older results


def read_results(out):
    return {name: (forget_folder(out) / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def interrupted(finished, tmp_path_factory):
    """Beside older results, an evaluation with another seed that did not come to its end."""
    out = shutil.copytree(finished, tmp_path_factory.mktemp("interrupted") / "out")
    shutil.rmtree(forget_folder(out) / "unseen-any-scratch")
    before = read_results(out)
    calls = []
    ode_log_likelihood = common.ode_log_likelihood

    def stop_at_the_third(*args, **options):
        """The likelihood of a model takes two calls."""
        calls.append(1)
        if len(calls) == 3:
            common.exit_with_error("interrupted")
        return ode_log_likelihood(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "ode_log_likelihood", stop_at_the_third)
        run = run_script("04", *FORGET, "--seed", 5, "--overwrite", "--out", out)
    return Interrupted(out, run, before)


def test_an_interrupted_run_leaves_the_old_results(interrupted):
    check_refusal(interrupted.run, "interrupted")
    assert read_results(interrupted.out) == interrupted.before


def test_the_next_run_goes_on_from_there(interrupted, script, monkeypatch, tmp_path):
    """It samples nothing again, and takes up the likelihoods where they were left."""
    out = shutil.copytree(interrupted.out, tmp_path / "out")

    def refuse(*args, **options):
        common.exit_with_error("sampled again")

    monkeypatch.setattr(common, "sample_images", refuse)
    run = script("04", *FORGET, "--seed", 5, "--overwrite", "--out", out)
    check_success(run)
    assert "standard.nll" not in run.out, "this one was finished"
    assert "ort-ve.nll" in run.out, "this one was not"


# ---- FID -----------------------------------------------------------------------------------------


class FidRun(NamedTuple):
    """A run with --fid and a stand-in for torch-fidelity."""

    calls: list  # the arguments of each call, dicts
    rows: list  # of the table
    printed: str
    weights: str  # what --inception-weights has named


@pytest.fixture(scope="module")
def with_fid(finished, tmp_path_factory):
    """Four models and real images, measured by a stand-in that always answers 12.5."""
    folder = tmp_path_factory.mktemp("fid")
    out = shutil.copytree(finished, folder / "out")
    weights = folder / "weights.pth"
    weights.write_bytes(b"")  # never read: the package is a stand-in
    calls = []

    def calculate_metrics(**options):
        calls.append(options)
        return {"frechet_inception_distance": 12.5}

    package = types.SimpleNamespace(__spec__=object(), calculate_metrics=calculate_metrics)
    flags = ["--nll", "none", "--fid", "--inception-weights", weights, "--overwrite"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", package)
        run = run_script("04", *FORGET[:-2], *flags, "--out", out)  # without --n-nll
    check_success(run)
    return FidRun(calls, read_table(out)["models"], run.out, str(weights))


def test_torch_fidelity_is_asked_for_the_fid_of_all_models_and_of_real_images(with_fid):
    assert [call["fid"] for call in with_fid.calls] == [True] * 5


def test_torch_fidelity_gets_the_weights(with_fid):
    weights = [call["feature_extractor_weights_path"] for call in with_fid.calls]
    assert weights == [with_fid.weights] * 5


@pytest.mark.parametrize("images", ["input1", "input2"])
def test_torch_fidelity_gets_bytes_of_three_channels(with_fid, images):
    for call in with_fid.calls:
        assert call[images][0].shape == (3, 28, 28)
        assert call[images][0].dtype == torch.uint8


def test_torch_fidelity_gets_as_many_samples_as_standard_has_of_other_classes(with_fid):
    num_kept = 20 - with_fid.rows[0]["class_counts"][3]
    assert [len(call["input1"]) for call in with_fid.calls] == [num_kept] * 5


def test_fid_is_a_column_of_its_own(with_fid):
    assert [row["fid"] for row in with_fid.rows] == [12.5] * 4
    assert 12.5 not in [row["fd"] for row in with_fid.rows]
    assert "fid" in with_fid.printed


def test_a_wrong_file_of_inception_is_one_line(monkeypatch):
    def calculate_metrics(**options):
        raise RuntimeError("Error(s) in loading state_dict:\n\tMissing key(s)")

    package = types.SimpleNamespace(calculate_metrics=calculate_metrics)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    args = argparse.Namespace(device="cpu", inception_weights="judge.pt")
    images = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    run = run_function(common.standard_fid, args, images, images)
    check_refusal(run, "Missing key(s)", "--inception-weights")


def test_fid_without_the_package(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    run = script("04", *FORGET, "--fid", "--out", tmp_path)
    check_refusal(run, "pip install torch-fidelity")


# ---- the command line ----------------------------------------------------------------------------

MAKE_8 = "python 03_unlearn.py --dataset mnist --forget 8"
MAKE_5 = "python 03_unlearn.py --dataset mnist --forget 5"


@pytest.mark.parametrize(
    "flags, word",
    [
        pytest.param("", "--forget", id="no forget"),
        pytest.param("--forget eleven", "0, 1, 2", id="unknown class"),
        pytest.param("--forget 8", MAKE_8, id="no model"),
        pytest.param("--forget 5", MAKE_5, id="damaged model"),
        pytest.param("--forget 5 --sde xp", "subvp", id="sde"),
        pytest.param("--forget 5 --nll guess", "bound", id="nll"),
        pytest.param("--forget 5 --n 3", "--n", id="n"),
        pytest.param("--forget 5 --relearn 0", "--relearn", id="relearn"),
        pytest.param("--forget 5 --inception-weights nowhere.pth", "nowhere.pth", id="weights"),
        pytest.param("--forget 5 --dataset imagenet", "mnist", id="data set"),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(script, tmp_path, flags, word):
    path = quick(tmp_path) / "mnist/forget-5/obt-vp/model.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a checkpoint")
    check_refusal(script("04", "--quick", *flags.split(), "--out", tmp_path), word)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert not (quick(tmp_path) / "mnist/forget-5/kept").exists()


def test_04_finds_what_03_has_written_both_as_processes(tmp_path):
    flags = ["--quick", "--forget", 3, "--out", tmp_path]
    unlearn_flags = ["--method", "obt", "--steps", 2, "--n", 10, "--nfe", 2]
    evaluate_flags = ["--n", 20, "--nfe", 2, "--nll", "bound"]
    for number, more in (("03", unlearn_flags), ("04", evaluate_flags)):
        run = run_process(SCRIPTS[number], *flags, *more, cwd=tmp_path)
        check_success(run)
        assert run.err == ""

    assert "next: " in run.out
    assert FILES <= {path.name for path in forget_folder(tmp_path).iterdir()}
    names = [row["model"] for row in read_table(tmp_path)["models"]]
    assert names == ["standard", "obt-vp-steps2"]
