"""Data: the shipped MNIST, forget sets by name, random choices, the dequantised scale."""

import pytest
import torch

import common


@pytest.fixture(scope="module")
def training():
    return common.load_dataset("mnist")


@pytest.fixture(scope="module")
def held_out():
    return common.load_dataset("mnist", train=False)


# ---- MNIST ---------------------------------------------------------------------------------------


def test_mnist_has_60000_training_images(training):
    assert training.images.shape == (60000, 1, 28, 28)


def test_mnist_has_10000_test_images(held_out):
    assert held_out.images.shape[0] == 10000


def test_mnist_is_bytes(training):
    assert training.images.dtype == torch.uint8


def test_mnist_training_classes_have_the_published_sizes(training):
    sizes = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(training.labels).tolist() == sizes


def test_mnist_test_classes_have_the_published_sizes(held_out):
    sizes = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.bincount(held_out.labels).tolist() == sizes


def test_both_parts_at_once_are_the_same(training, held_out):
    train, test = common.load_train_and_test("mnist")
    assert torch.equal(train.images, training.images)
    assert torch.equal(test.images, held_out.images)


def test_sd_of_the_recipe_is_that_of_the_data(training):
    torch.manual_seed(0)
    x = common.dequantize(training.images[:20000])
    assert x.std().item() == pytest.approx(common.RECIPES["mnist"]["sd"], rel=0.01)


# ---- choices of images ---------------------------------------------------------------------------


def test_forget_classes_are_sorted_and_named_once(training):
    _, forget = common.split_forget(training, ["7", "3", "3"])
    assert forget == [3, 7]


def test_forget_set_is_whole(training):
    is_forgotten, _ = common.split_forget(training, ["7", "3", "3"])
    assert is_forgotten.sum() == 6131 + 6265


def test_forget_set_holds_its_classes_alone(training):
    is_forgotten, _ = common.split_forget(training, ["7", "3", "3"])
    assert set(training.labels[is_forgotten].tolist()) == {3, 7}


def test_random_subset_depends_on_its_seeds_alone():
    items = torch.arange(1000)
    first = common.random_subset(items, 100, 0, 3)
    torch.rand(5)  # the global generator moves on, which must not matter
    assert torch.equal(first, common.random_subset(items, 100, 0, 3))
    assert not torch.equal(first, common.random_subset(items, 100, 1, 3))


def test_random_subset_takes_nothing_twice():
    chosen = common.random_subset(torch.arange(50), 20, 0)
    assert len(set(chosen.tolist())) == 20


@pytest.mark.parametrize("quick, expected", [(True, 1000), (False, 10000)])
def test_a_quick_run_compares_with_1000_real_images(held_out, quick, expected):
    assert len(common.reference_images(held_out.images, quick)) == expected


# ---- dequantisation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def level_17():
    """100,000 bytes of level 17, dequantised twice."""
    torch.manual_seed(0)
    levels = torch.full((100000,), 17, dtype=torch.uint8)
    return common.dequantize(levels), common.dequantize(levels)


def test_dequantize_draws_afresh(level_17):
    first, second = level_17
    assert not torch.equal(first, second)


def test_dequantize_draws_uniformly_within_the_level(level_17):
    u = (level_17[0] + 1) * 128 - 17
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.005)
    assert u.var().item() == pytest.approx(1 / 12, rel=0.02)


ULP = 2**-24  # the step between the numbers that torch.rand gives


@pytest.mark.parametrize("u", [0, ULP, 0.25, 0.5, 1 - 2**-18, 1 - 2**-20, 1 - 2 * ULP, 1 - ULP])
def test_dequantize_stays_within_each_level(u, monkeypatch):
    """Even the u next to 1 does not lift a byte to the next level; what fits stays as it is."""
    monkeypatch.setattr(torch, "rand", lambda shape, device: torch.full(shape, u))
    levels = torch.arange(256, dtype=torch.uint8)
    x = common.dequantize(levels)
    exact = x.double()
    assert (exact >= levels / 128 - 1.0).all()
    assert (exact < (levels.double() + 1) / 128 - 1).all()
    assert torch.equal(common.to_bytes(x), levels)
    plain = (levels.float() + u) / 128 - 1
    fits = plain < (levels.float() + 1) / 128 - 1
    assert torch.equal(x[fits], plain[fits])
    assert (x - plain).abs().max() <= 2**-23
