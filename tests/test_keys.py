"""Results that are kept on disk: each key holds everything that the content depends on."""

import argparse
from typing import NamedTuple

import benchmark
import pytest
import torch
from conftest import load_script

import common


class Small(NamedTuple):
    """Two images of a kind, and who asks for them."""

    setup: argparse.Namespace
    model: argparse.Namespace
    x: torch.Tensor  # (4, 1, 4, 4)


@pytest.fixture
def small():
    args = argparse.Namespace(
        **{"n": 4, "nfe": 2, "seed": 0, "sde": "vp", "quick": False, "device": "cpu"},
        **{"nll": "ode", "rk4": 2, "levels": 2, "data_dir": None},
    )
    images = torch.zeros(4, 1, 4, 4)
    setup = argparse.Namespace(args=args, sde=common.VP(), judge=None, real_images=images)
    model = argparse.Namespace(name="m", net=None, digest="x")
    return Small(setup, model, torch.rand(4, 1, 4, 4, generator=common.rng(0)))


def asked_keys(function_name, monkeypatch):
    """A function of 04, and a list that grows by the key of each kept result it asks for."""
    function = load_script("04")[function_name]
    keys = []

    def note_key(setup, name, key, cost, compute):
        keys.append(key)
        return {"images": setup.real_images}

    monkeypatch.setitem(function.__globals__, "cached", note_key)
    monkeypatch.setattr(common, "judge_images", lambda *_: None)
    return function, keys


def test_the_key_of_a_likelihood_holds_the_images(small, monkeypatch):
    """An exchanged x_test under one --data-dir is other images, though n and seed are the same."""
    likelihoods, keys = asked_keys("likelihoods", monkeypatch)
    for x in (small.x, small.x, small.x + 1e-6):
        likelihoods(small.setup, small.model, x, 1)
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


CHANGES = {"quick": True, "seed": 1, "nfe": 3, "n": 5, "sde": "ve", "device": "cuda"}


@pytest.mark.parametrize("name", CHANGES)
def test_the_key_of_samples_holds_every_setting(small, monkeypatch, name):
    sample, keys = asked_keys("sample", monkeypatch)
    sample(small.setup, small.model)
    setattr(small.setup.args, name, CHANGES[name])
    sample(small.setup, small.model)
    assert keys[0] != keys[1]


def test_the_key_of_an_attack_holds_the_images(small, monkeypatch):
    attack, keys = asked_keys("attack", monkeypatch)
    monkeypatch.setitem(attack.__globals__, "measures", lambda *_: {})
    vars(small.setup.args).update(relearn=[2], steps=1, batch_size=2, lr=1e-3)
    models = [small.model, small.model]
    for value in (0, 0, 1):
        images = torch.full((3, 1, 4, 4), value, dtype=torch.uint8)
        attack(small.setup, models, [{}, {}], None, images)
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_the_features_for_fid_are_those_of_these_images(tmp_path):
    real_key = load_script("04")["real_key"]
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    weights = tmp_path / "weights"
    weights.write_text("one")
    first = real_key(images, weights)
    assert real_key(images + 1, weights) != first
    assert real_key(images, None) != first
    weights.write_text("two")
    assert real_key(images, weights) != first


def test_the_same_weights_with_another_sd_are_another_network():
    nets = [common.UNet(width=8, sd=sd) for sd in (0.5, 0.6)]
    nets[1].load_state_dict(nets[0].state_dict())
    digests = [benchmark.weights_digest(net) for net in nets]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    "other", [torch.tensor([1, 2, 4]), torch.tensor([1.0, 2, 3]), torch.tensor([[1, 2, 3]])]
)
def test_a_fingerprint_tells_tensors_apart(other):
    tensor = torch.tensor([1, 2, 3])
    assert common.fingerprint(tensor) == common.fingerprint(tensor.clone())
    assert common.fingerprint(tensor) != common.fingerprint(other)
