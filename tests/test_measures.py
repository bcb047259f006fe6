"""The measures against closed forms, and against themselves on made-up verdicts."""

import math

import pytest
import torch
from conftest import arguments

import common


def randn(*shape, seed):
    """Gaussian numbers in float64, the same ones for the same seed."""
    return torch.randn(*shape, generator=common.rng(seed), dtype=torch.float64)


# ---- the Frechet distance ------------------------------------------------------------------------


def exact_sample(mean, cov, n=500):
    """n points whose sample mean and covariance are exactly these."""
    x = randn(n, len(mean), seed=0)
    x = x - x.mean(0)
    own_root = torch.linalg.cholesky(torch.cov(x.T))
    white = torch.linalg.solve_triangular(own_root, x.T, upper=False).T
    root = torch.linalg.cholesky(cov)
    return mean + white @ root.T


def test_frechet_distance_of_gaussians():
    """Covariances that commute: |m1 - m2|^2 + SUM (sqrt a - sqrt b)^2."""
    axes, _ = torch.linalg.qr(randn(4, 4, seed=1))
    variances_x = torch.tensor([1.0, 2, 3, 4]).double()
    variances_y = torch.tensor([4.0, 1, 0.5, 4]).double()
    cov_x = axes @ torch.diag(variances_x) @ axes.T
    cov_y = axes @ torch.diag(variances_y) @ axes.T
    mean_x = torch.zeros(4).double()
    mean_y = torch.tensor([1.0, 0, -2, 0]).double()
    difference = variances_x.sqrt() - variances_y.sqrt()
    want = 5 + (difference**2).sum().item()

    x = exact_sample(mean_x, cov_x)
    y = exact_sample(mean_y, cov_y)
    distance = common.frechet_distance(x, y)
    assert distance == pytest.approx(want, abs=1e-8)
    assert isinstance(distance, float)


def test_frechet_distance_of_a_single_point_is_nan():
    x = randn(20, 4, seed=0)
    assert math.isnan(common.frechet_distance(x[:1], x))
    assert math.isnan(common.frechet_distance(x, x[:1]))


def test_frechet_distance_to_itself_is_zero():
    x = randn(500, 4, seed=0)
    distance = common.frechet_distance(x, x)
    assert distance == pytest.approx(0, abs=1e-8)


def test_frechet_distance_equals_its_nuclear_norm_form_when_rank_deficient():
    """tr (S1 S2)^1/2 = |X1c X2c'|_* / (n-1) (FastFID), with fewer points than dimensions."""
    x = randn(20, 50, seed=0)
    y = randn(20, 50, seed=1)
    centred_x = x - x.mean(0)
    centred_y = y - y.mean(0)
    cross = torch.linalg.svdvals(centred_x @ centred_y.T).sum() / 19
    trace_x = centred_x.square().sum() / 19
    trace_y = centred_y.square().sum() / 19
    between_means = (x.mean(0) - y.mean(0)).square().sum()
    want = between_means + trace_x + trace_y - 2 * cross
    distance = common.frechet_distance(x, y)
    assert distance == pytest.approx(want.item(), rel=1e-6)


# ---- the interval of a share ---------------------------------------------------------------------


@pytest.mark.parametrize("end", [0, 1], ids=["low", "high"])
@pytest.mark.parametrize(
    "k, n",
    [
        (0, 1000),
        (7, 200),
        (50, 100),
        (1000, 1000),
    ],
)
def test_wilson_interval_solves_its_equation(k, n, end):
    """Both ends p satisfy (k/n - p)^2 = z^2 p (1-p)/n."""
    p = common.wilson(k, n)[end]
    want = 1.96**2 * p * (1 - p) / n
    assert (k / n - p) ** 2 == pytest.approx(want, abs=1e-12)


def test_wilson_interval_at_none_of_a_thousand_ends_at_0_38_percent():
    _, high = common.wilson(0, 1000)
    assert 100 * high == pytest.approx(0.38, abs=0.005)


# ---- measure -------------------------------------------------------------------------------------

REAL = common.Verdict(None, None, randn(500, 3, seed=9), torch.arange(500) / 1000)


def make_verdict(counts, confidence=0.9):
    """A Verdict with so many samples of each class, equally sure of all, and random features."""
    classes = torch.arange(len(counts))
    labels = torch.repeat_interleave(classes, torch.tensor(counts))
    n = len(labels)
    return common.Verdict(
        labels=labels,
        confidence=torch.full((n,), confidence),
        features=randn(n, 3, seed=0),
        roughness=torch.zeros(n),
    )


BEFORE = make_verdict([100, 50, 50])
AFTER = make_verdict([150, 25, 25], confidence=0.7)


@pytest.fixture
def before():
    """The measures of the Standard model; class 2 is to be forgotten."""
    return common.measure(BEFORE, [2], REAL, 3)


@pytest.fixture
def after():
    """The measures of an unlearned model, beside the Standard one."""
    return common.measure(AFTER, [2], REAL, 3, BEFORE)


def test_ur_is_the_share_of_the_forget_class(before, after):
    assert before["ur"] == pytest.approx(25)
    assert after["ur"] == pytest.approx(12.5)


def test_low_confidence_is_the_share_below_80_percent(before, after):
    assert before["low_confidence"] == 0
    assert after["low_confidence"] == pytest.approx(100)


def test_class_min_ratio_compares_shares_of_the_kept_samples(after):
    """Class 1 has lost most: 25 of 175 kept samples after, 50 of 150 before."""
    share_before = 50 / 150
    share_after = 25 / 175
    assert after["class_min_ratio"] == pytest.approx(share_after / share_before)


def test_class_min_ratio_needs_the_standard_model(before):
    assert "class_min_ratio" not in before


def test_class_counts_are_the_samples_of_each_class(after):
    assert after["class_counts"] == [150, 25, 25]


def test_fd_of_the_standard_model_leaves_the_forgotten_samples_out(before):
    want = common.frechet_distance(BEFORE.features[:150], REAL.features)
    assert before["fd"] == pytest.approx(want)


def test_fd_of_an_unlearned_model_takes_as_many_samples_as_the_standard_models(after):
    want = common.frechet_distance(AFTER.features[:150], REAL.features)
    assert after["fd"] == pytest.approx(want)


def test_measures_see_a_class_that_vanished():
    collapsed = make_verdict([200, 0, 0])
    result = common.measure(collapsed, [2], REAL, 3, BEFORE)
    assert result["class_min_ratio"] == 0
    assert result["class_counts"] == [200, 0, 0]
    assert result["ur"] == 0


# ---- noise, and what stands where the forgotten class was ----------------------------------------


def test_roughness_of_white_noise_is_eight_ninths_of_its_variance():
    """A mean of nine independent values keeps a ninth of their variance."""
    generator = common.rng(0)
    noise = torch.randint(0, 256, (20, 3, 64, 64), dtype=torch.uint8, generator=generator)
    variance = (256**2 - 1) / 12 / 255**2
    # At the edge, where pixels are repeated, a little less is taken away.
    assert common.roughness(noise).mean().item() == pytest.approx(8 / 9 * variance, rel=0.02)


def test_roughness_of_a_checkerboard():
    """Around each cell five of nine are like it: their mean lies 4/9 of the range away from it."""
    rows = torch.arange(512)
    board = (rows[:, None] + rows) % 2 * 255
    x = board.to(torch.uint8)[None, None]
    assert common.roughness(x).item() == pytest.approx((4 / 9) ** 2, rel=0.01)


def test_roughness_of_one_grey_is_zero():
    assert common.roughness(torch.full((2, 1, 8, 8), 77, dtype=torch.uint8)).tolist() == [0, 0]


def test_a_ramp_is_smooth():
    ramp = (4 * torch.arange(64)).to(torch.uint8).expand(1, 1, 64, 64)
    assert common.roughness(ramp).item() < 1e-5


def rough_verdict(roughness):
    """A Verdict of which only the roughness counts."""
    return AFTER._replace(roughness=torch.tensor(roughness))


def test_noise_is_what_is_rougher_than_every_real_image():
    real = rough_verdict([0.1, 0.4, 0.2])
    samples = rough_verdict([0.3, 0.4, 0.5])
    assert common.is_noise(samples, real).tolist() == [False, False, True]


def test_real_test_digits_are_not_noise_and_noise_is(mnist, judge):
    train = common.load_dataset("mnist")
    real = common.judge_images(judge, train.images[:5000])
    of_test = common.is_noise(common.judge_images(judge, mnist.images), real)
    assert of_test.float().mean() < 0.001

    generator = common.rng(0)
    noise = torch.randint(0, 256, (500, 1, 28, 28), dtype=torch.uint8, generator=generator)
    assert common.is_noise(common.judge_images(judge, noise), real).all()


def instead_of_class_2():
    """Eight samples: four where Standard draws class 2, one of each fate, and four elsewhere."""
    standard = common.Verdict(
        labels=torch.tensor([2, 2, 2, 2, 0, 0, 1, 1]),
        confidence=torch.ones(8),
        features=randn(8, 3, seed=1),
        roughness=torch.zeros(8),
    )
    drawn = common.Verdict(
        labels=torch.tensor([2, 2, 0, 1, 2, 0, 1, 2]),
        confidence=torch.tensor([0.99, 0.99, 0.5, 0.99, 0.9, 0.9, 0.9, 0.9]),
        features=randn(8, 3, seed=2),
        roughness=torch.tensor([2.0, 0, 0, 0, 0, 2.0, 0, 0]),  # 2 is above all real images
    )
    return common.measure(drawn, [2], REAL, 3, standard)


def test_what_stands_where_standard_draws_the_forget_class():
    result = instead_of_class_2()
    for name in ("noise", "forgotten", "unsure", "other"):
        assert result[f"instead_{name}"] == 25, name


def test_ur_without_noise_leaves_the_noise_out_that_the_judge_calls_a_forget_class():
    result = instead_of_class_2()
    assert result["ur"] == 50
    assert result["ur_no_noise"] == 37.5
    assert result["noise"] == 25


def test_only_a_model_beside_standard_has_something_instead(before, after):
    assert set(common.COMPARED) <= set(after)
    assert not set(common.COMPARED) & set(before)


# ---- the judge that ships ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist():
    """The test images of MNIST."""
    return common.load_dataset("mnist", train=False)


@pytest.fixture(scope="module")
def judge(mnist, tmp_path_factory):
    """The judge of MNIST that ships with the project."""
    return common.load_judge(arguments(tmp_path_factory.mktemp("out")), mnist)


def test_the_shipped_judge_is_good(judge, mnist):
    labels = common.judge_images(judge, mnist.images).labels
    is_right = labels == mnist.labels
    assert is_right.float().mean() >= 0.992


def test_a_verdict_carries_no_gradient():
    verdict = common.judge_images(common.Judge(), torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    assert not verdict.features.requires_grad
    assert not verdict.confidence.requires_grad


def test_a_verdict_does_not_depend_on_the_batch(judge):
    shape = (200, 1, 28, 28)
    generator = common.rng(0)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    together = common.judge_images(judge, noise).labels
    alone = common.judge_images(judge, noise[:3]).labels
    assert torch.equal(alone, together[:3])
