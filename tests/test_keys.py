"""Results that are kept on disk: each key holds everything that the content depends on."""

import argparse
import json
import runpy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, check_success, load_script, run_script

import common


class Small(NamedTuple):
    """Two images of a kind, and who asks for them."""

    setup: argparse.Namespace
    model: argparse.Namespace
    x: torch.Tensor  # (4, 1, 4, 4)


@pytest.fixture
def small(tmp_path):
    flags = ["--forget", "3", "--n", "20", "--nfe", "2", "--device", "cpu", "--out", str(tmp_path)]
    args = load_script("04")["arguments"](flags)
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


CHANGES = {"quick": True, "seed": 1, "nfe": 3, "n": 5, "sde": "ve", "device": "cuda", "bf16": True}


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
    digests = [common.weights_digest(net) for net in nets]
    assert digests[0] != digests[1]


def test_the_flags_of_its_training_are_no_part_of_a_models_name(tmp_path):
    """A base that was made with another --out is the same to 03's runs and 04's kept results."""
    content = torch.load(ROOT / "data/mnist_base.pt", weights_only=True)
    content["args"] = {**content["args"], "out": "elsewhere"}
    common.save_checkpoint(tmp_path / "other.pt", **content)

    load_model = load_script("04")["load_model"]
    find_sources = load_script("03")["find_sources"]
    args = argparse.Namespace(device="cpu")
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    data = common.Dataset(images, torch.arange(2), ["a", "b"])
    names = set()
    for path in (ROOT / "data/mnist_base.pt", tmp_path / "other.pt"):
        model = load_model(args, "m", path, "", {}, (1, 28, 28))
        names |= {model.digest, find_sources(model.net, data)["base"]}
    assert len(names) == 1


def test_no_shipped_model_names_a_folder_of_a_machine():
    for path in sorted((ROOT / "data").glob("*.pt")):
        flags = torch.load(path, weights_only=True).get("args", {})
        folders = [value for value in flags.values() if str(value).startswith(("/", "~"))]
        assert not folders, f"{path.name}: {folders}"


# ---- models of other images ----------------------------------------------------------------------


@pytest.fixture
def two_sets():
    """Two Datasets with the same names of classes; one image of the second is another one."""
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)
    one = common.Dataset(images, torch.arange(8) % 2, ["a", "b"])
    other_images = images.clone()
    other_images[3, 0, 5, 5] = 1
    return one, one._replace(images=other_images)


def test_a_file_of_other_images_is_said_to_be_one(two_sets, capsys):
    one, other = two_sets
    common.warn_of_other_data("x.pt", [common.data_key(one)], one, "the command")
    common.warn_of_other_data("x.pt", None, other, "the command")
    assert capsys.readouterr().err == ""
    common.warn_of_other_data("x.pt", [common.data_key(one)], other, "the command")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "x.pt was trained on other images" in err
    assert "the command" in err


def test_other_labels_are_other_data(two_sets):
    one, _ = two_sets
    assert common.data_key(one) != common.data_key(one._replace(labels=1 - one.labels))


def test_a_judge_of_other_images_is_said_to_be_one(tmp_path, two_sets, capsys):
    one, other = two_sets
    judge = common.Judge(1, 2)
    path = tmp_path / "fashion_mnist/judge.pt"
    path.parent.mkdir()
    more = {"classes": one.classes, "data": [common.data_key(one)]}
    common.save_checkpoint(path, arch=judge.arch, model=judge.state_dict(), **more)
    args = arguments(tmp_path, dataset="fashion_mnist")
    common.load_judge(args, one)
    assert capsys.readouterr().err == ""
    common.load_judge(args, other)
    assert "trained on other images" in capsys.readouterr().err


def write_mnist(folder, seed):
    """A small mnist.npz of noise."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for part, n in (("train", 60), ("test", 40)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(n, dtype=np.uint8) % 10
    np.savez(folder / "mnist.npz", **arrays)


def test_unlearning_and_resuming_say_that_the_data_are_others(tmp_path):
    flags = ("--quick", "--data-dir", tmp_path, "--out", tmp_path / "out", "--batch-size", 4)
    write_mnist(tmp_path, 0)
    train = ("--width", 16, "--steps", 2)
    check_success(run_script("02", *flags, *train))
    unlearn = ("--forget", 3, "--steps", 1, "--n", 10, "--nfe", 2)
    same = run_script("03", *flags, *unlearn)
    write_mnist(tmp_path, 1)
    resumed = run_script("02", *flags, *train[:2], "--steps", 3, "--resume")
    for run in (same, resumed):
        check_success(run)
    assert "other images" not in same.err
    assert "base.pt was trained on other images" in resumed.err


@pytest.mark.parametrize(
    "other", [torch.tensor([1, 2, 4]), torch.tensor([1.0, 2, 3]), torch.tensor([[1, 2, 3]])]
)
def test_a_fingerprint_tells_tensors_apart(other):
    tensor = torch.tensor([1, 2, 3])
    assert common.fingerprint(tensor) == common.fingerprint(tensor.clone())
    assert common.fingerprint(tensor) != common.fingerprint(other)


# ---- tests/make_tables.py ------------------------------------------------------------------------


@pytest.fixture
def maker(tmp_path):
    """The globals of make_tables.py, with its table and its runs in a folder."""
    space = runpy.run_path(str(ROOT / "tests/make_tables.py"))["run"].__globals__
    space["PLACES"].runs = tmp_path
    space["PLACES"].table = tmp_path / "tables.json"
    return space


def test_figures_of_another_model_are_measured_again(maker, tmp_path):
    """A run was repeated with other flags under its old name."""
    table = {"vp/x": {"command": "new"}, "nll/x": {"command": "any", "model": "old", "value": 1}}
    maker["PLACES"].table.write_text(json.dumps(table))
    maker.update(network=lambda name: name)
    measured = []

    def figures(net):
        measured.append(net)
        return {"value": 2}

    for _ in range(2):
        maker["measure_models"]("nll", {"x": "vp/x"}, figures, None)
    assert measured == ["standard", "vp/x"]
    assert maker["load"]()["nll/x"]["value"] == 2


def test_a_model_of_another_command_is_made_again(maker, tmp_path):
    """A run that was killed has left a model under the name of the run that the table has."""
    maker["PLACES"].table.write_text(json.dumps({"vp/x": {"command": "wanted"}}))
    folder = tmp_path / "vp-x/mnist/forget-3/ort-vp"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(b"")
    note = tmp_path / "vp-x/command.txt"
    executed = []

    def execute(name, command):
        executed.append(command)
        return folder

    maker.update(execute=execute)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_net", lambda path, command, *_: path)
        note.write_text("wanted")
        assert maker["network"]("vp/x") == folder / "model.pt"
        assert executed == []
        note.write_text("another")
        maker["network"]("vp/x")
        assert executed == ["wanted --n 10"]
