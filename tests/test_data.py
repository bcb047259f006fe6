"""Data: the shipped MNIST, forget sets by name, dequantised scale."""
import pytest
import torch

import common as c


def test_mnist_is_whole():
    """Sizes and class counts of the published data set."""
    train, test = c.load_dataset("mnist"), c.load_dataset("mnist", train=False)
    assert train.images.shape == (60000, 1, 28, 28) and train.images.dtype == torch.uint8 and test.images.shape[0] == 10000
    assert torch.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_sd_of_the_recipe_is_that_of_the_data():
    torch.manual_seed(0)
    x = c.dequantize(c.load_dataset("mnist").images[:20000])
    assert x.std().item() == pytest.approx(c.RECIPES["mnist"]["sd"], rel=0.01)


def test_forget_sets_by_name():
    data = c.load_dataset("mnist")
    mask, ids = c.split_forget(data, ["7", "3", "3"])
    assert ids == [3, 7] and mask.sum() == 6131 + 6265 and set(data.labels[mask].tolist()) == {3, 7}


def test_dequantize_is_fresh_and_uniform():
    k = torch.full((100000,), 17, dtype=torch.uint8)
    a, b = c.dequantize(k), c.dequantize(k)
    u = (a + 1) * 128 - 17
    assert not torch.equal(a, b) and u.min() >= 0 and u.max() < 1 and u.mean().item() == pytest.approx(0.5, abs=0.005) and u.var().item() == pytest.approx(1 / 12, rel=0.02)
