"""Measures against closed forms, and against themselves on made-up verdicts."""
import math

import pytest
import torch
from conftest import arguments

import common as c


def exact_sample(mean, cov, n=500):
    """n points whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=c.rng(0), dtype=torch.float64)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return mean + x @ torch.linalg.cholesky(cov).T


def test_frechet_distance_of_gaussians():
    """Commuting covariances: |m1 - m2|^2 + SUM (sqrt a - sqrt b)^2."""
    q = torch.linalg.qr(torch.randn(4, 4, generator=c.rng(1), dtype=torch.float64))[0]
    a, b = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([4.0, 1, 0.5, 4]).double()
    m1, m2 = torch.zeros(4).double(), torch.tensor([1.0, 0, -2, 0]).double()
    x, y = exact_sample(m1, q @ torch.diag(a) @ q.T), exact_sample(m2, q @ torch.diag(b) @ q.T)
    want = 5 + ((a.sqrt() - b.sqrt()) ** 2).sum().item()
    assert c.frechet_distance(x, y) == pytest.approx(want, abs=1e-8)
    assert c.frechet_distance(x, x) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_equals_its_nuclear_norm_form_when_rank_deficient():
    """tr (S1 S2)^1/2 = |X1c X2c'|_* / (n-1) (FastFID), with fewer points than dimensions."""
    x, y = (torch.randn(20, 50, generator=c.rng(s), dtype=torch.float64) for s in (0, 1))
    xc, yc = x - x.mean(0), y - y.mean(0)
    cross = torch.linalg.svdvals(xc @ yc.T).sum() / 19
    want = (x.mean(0) - y.mean(0)).square().sum() + xc.square().sum() / 19 + yc.square().sum() / 19 - 2 * cross
    assert c.frechet_distance(x, y) == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("k, n", [(0, 1000), (7, 200), (50, 100), (1000, 1000)])
def test_wilson_interval_solves_its_equation(k, n):
    """Both ends p satisfy (k/n - p)^2 = z^2 p (1-p)/n; at 0 of 1000 the upper end is 0.38 %."""
    for p in c.wilson(k, n):
        assert (k / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)
    assert 100 * c.wilson(0, 1000)[1] == pytest.approx(0.38, abs=0.005)


def verdict(counts, confidence=0.9, seed=0):
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    return c.Verdict(labels, torch.full((len(labels),), confidence), torch.randn(len(labels), 3, generator=c.rng(seed), dtype=torch.float64))


def test_measure():
    before, after = verdict([100, 50, 50]), verdict([150, 25, 25], 0.7)
    real = torch.randn(500, 3, generator=c.rng(9), dtype=torch.float64)
    b, a = c.measure(before, [2], real, 3), c.measure(after, [2], real, 3, before)
    assert b["ur"] == pytest.approx(25) and a["ur"] == pytest.approx(12.5)
    assert a["low_confidence"] == pytest.approx(100) and b["low_confidence"] == 0
    # Class 1: 25 of 175 kept after, 50 of 150 before.
    assert a["class_min_ratio"] == pytest.approx((25 / 175) / (50 / 150))
    assert a["class_counts"] == [150, 25, 25] and "class_min_ratio" not in b
    # FD before leaves the forgotten samples out; after takes as many.
    assert b["fd"] == pytest.approx(c.frechet_distance(before.features[:150], real))
    assert a["fd"] == pytest.approx(c.frechet_distance(after.features[:150], real))


def test_class_min_ratio_sees_a_class_that_vanished():
    m = c.measure(verdict([200, 0, 0]), [2], torch.randn(50, 3).double(), 3, verdict([100, 50, 50]))
    assert m["class_min_ratio"] == 0 and m["class_counts"] == [200, 0, 0] and m["ur"] == 0


def test_the_shipped_judge_is_good_and_takes_bytes(tmp_path):
    test = c.load_dataset("mnist", train=False)
    judge = c.load_judge(arguments(tmp_path), test)
    v = c.judge_images(judge, test.images)
    assert (v.labels == test.labels).float().mean() >= 0.992
    noise = torch.randint(0, 256, (200, 1, 28, 28), dtype=torch.uint8, generator=c.rng(0))
    assert torch.equal(c.judge_images(judge, noise[:3]).labels, c.judge_images(judge, noise).labels[:3])
