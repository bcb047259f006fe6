"""Training helpers: average, rates, guard, Muon, checkpoints; and 02's resume, bit for bit."""

import argparse
import itertools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    check_refusal,
    check_success,
    load_script,
    quick,
    run_function,
    run_script,
    same_weights,
)
from torch.utils.flop_counter import FlopCounterMode

import common

QUICK = ("--quick", "--steps", 6, "--batch-size", 8)

# ---- the average of the weights ------------------------------------------------------------------


@pytest.fixture
def ema():
    """The average of one weight, which was 0 at the start and 1 at each of 20 updates."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = common.EMA(net, 0.5)
    nn.init.ones_(net.weight)
    for _ in range(20):
        average.update(net)
    return average


def test_ema_warms_up_and_then_follows_its_decay(ema):
    expected = 0.0
    for n in range(20):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + 1 - decay
    assert ema.net.weight.item() == pytest.approx(expected)


def test_ema_is_always_in_eval_mode(ema):
    assert not ema.net.training


def test_ema_needs_no_gradient(ema):
    """With a graph of all steps behind it the average would fill the memory."""
    assert not any(weight.requires_grad for weight in ema.net.parameters())


# ---- the learning rate ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rates():
    """The rate at each of 101 steps: peak 2, 10 steps of warm-up, 100 steps in all."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    result = []
    for step in range(101):
        common.set_lr([optimizer], step, 100, warmup=10)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def test_learning_rate_never_is_zero_at_the_start(rates):
    assert rates[0] == pytest.approx(0.2, rel=0.01)


def test_learning_rate_never_is_above_its_peak(rates):
    assert max(rates) <= 2.0


def test_learning_rate_is_half_in_the_middle(rates):
    assert rates[50] == pytest.approx(1.0)


def test_learning_rate_falls_to_zero(rates):
    assert rates[100] == pytest.approx(0, abs=1e-12)


# ---- the guard against numbers that are not finite -----------------------------------------------


class Guarded:
    """A small network whose steps are guarded; it counts the steps skipped in a row."""

    def __init__(self):
        self.net = nn.Linear(2, 1)
        self.start = self.net.weight.detach().clone()
        self.optimizer = torch.optim.Adam(self.net.parameters(), 0.1)
        self.skipped = 0

    def step(self, value):
        """Train one step with an input full of `value`."""
        self.net(torch.full((1, 2), value)).sum().backward()
        self.skipped = common.guarded_step(self.net, [self.optimizer], self.skipped)

    def has_moved(self):
        """Whether the weight is no longer what it was at the start."""
        return not torch.equal(self.net.weight, self.start)


@pytest.fixture
def guarded():
    """A network of which four steps in a row were not finite."""
    result = Guarded()
    for k in range(4):
        result.step(float("nan"))
        assert result.skipped == k + 1
    return result


def test_a_nan_step_leaves_the_weights(guarded):
    assert not guarded.has_moved()


def test_five_nan_steps_in_a_row_stop_with_advice(guarded):
    check_refusal(run_function(guarded.step, float("nan")), "--lr")


def test_a_finite_step_is_taken_and_starts_the_count_anew(guarded):
    guarded.step(1.0)
    assert guarded.skipped == 0
    assert guarded.has_moved()


def test_training_goes_on_after_the_guard_has_stopped_it(guarded):
    """No gradient that is not finite stays behind."""
    run_function(guarded.step, float("nan"))
    guarded.skipped = 3
    guarded.step(1.0)
    assert guarded.skipped == 0
    assert guarded.has_moved()


# ---- the length of a gradient --------------------------------------------------------------------


def step_by(*gradients, **options):
    """How far a guarded step of rate 1 moves two weights with these gradients -> (2,)."""
    net = nn.Linear(2, 1, bias=False)
    start = net.weight.detach().clone()
    net.weight.grad = torch.tensor([gradients])
    common.guarded_step(net, [torch.optim.SGD(net.parameters(), 1.0)], 0, **options)
    return (start - net.weight.detach())[0]


def test_a_long_gradient_is_shortened_to_length_one_and_keeps_its_direction():
    torch.testing.assert_close(step_by(30.0, 40.0), torch.tensor([0.6, 0.8]))


def test_a_long_gradient_is_shortened_to_the_length_that_is_asked_for():
    torch.testing.assert_close(step_by(30.0, 40.0, clip=5.0), torch.tensor([3.0, 4.0]))


def test_a_short_gradient_stays_as_it_is():
    torch.testing.assert_close(step_by(0.03, 0.04), torch.tensor([0.03, 0.04]))


def test_the_gradient_is_cleared_after_a_step():
    net = nn.Linear(2, 1)
    net(torch.ones(1, 2)).sum().backward()
    common.guarded_step(net, [torch.optim.SGD(net.parameters(), 1.0)], 0)
    assert all(weight.grad is None for weight in net.parameters())


# ---- random numbers of the parts of a step -------------------------------------------------------


def parts_of(step, grad_accum=2, seed=0):
    """The first random number of each part of a step, with --grad-accum."""
    args = argparse.Namespace(grad_accum=grad_accum, device="cpu", seed=seed)
    return [torch.rand(()).item() for _ in common.batch_parts(args, step)]


def test_every_part_of_every_step_has_its_own_random_numbers():
    drawn = parts_of(0) + parts_of(1) + parts_of(2, seed=1) + parts_of(2)
    assert len(set(drawn)) == 8


def test_a_part_of_a_step_has_the_same_random_numbers_again():
    assert parts_of(3) == parts_of(3)


def test_a_batch_that_is_not_split_goes_on_with_the_numbers_that_come_next():
    torch.manual_seed(0)
    drawn = parts_of(0, grad_accum=1) + parts_of(0, grad_accum=1)
    torch.manual_seed(0)
    assert drawn == torch.rand(2).tolist()


# ---- Muon ----------------------------------------------------------------------------------------


@pytest.fixture(params=[(8, 4, 3, 3), (64, 2, 3, 3)], ids=["wide", "tall"])
def muon_step(request):
    """One step of rate 1 from zero -> the update and the gradient, both as (out, in * k * k)."""
    w = nn.Parameter(torch.zeros(request.param))
    w.grad = torch.randn(request.param, generator=common.rng(0))
    common.Muon([w], lr=1.0, momentum=0.0).step()
    return w.detach().flatten(1), w.grad.flatten(1)


def test_muon_step_is_orthogonal(muon_step):
    """All singular values are near 1: 0.7 to 1.2 by the polynomial's design."""
    update, _ = muon_step
    out, inside = update.shape
    values = torch.linalg.svdvals(update) / max(1, out / inside) ** 0.5
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_step_goes_downhill(muon_step):
    update, grad = muon_step
    assert (update * grad).sum() < 0


def muon_updates(*gradients, momentum):
    """What each of these gradients in turn changes of one weight of 4x4, at rate 1."""
    weight = nn.Parameter(torch.zeros(4, 4))
    muon = common.Muon([weight], lr=1.0, momentum=momentum)
    updates = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        muon.step()
        updates.append(weight.detach() - before)
    return updates


def test_muon_goes_on_with_its_momentum():
    """Nesterov: m <- 0.9 m + 0.1 g, and the step is along 0.9 m + 0.1 g, made orthogonal."""
    first, second = torch.randn(2, 4, 4, generator=common.rng(1))
    momentum = 0.1 * first
    momentum = 0.9 * momentum + 0.1 * second
    ahead = 0.9 * momentum + 0.1 * second
    _, update = muon_updates(first, second, momentum=0.9)
    torch.testing.assert_close(update, -common.orthogonalize(ahead), rtol=1e-4, atol=1e-5)


def test_muon_without_momentum_forgets_the_gradient_before():
    first, second = torch.randn(2, 4, 4, generator=common.rng(1))
    _, update = muon_updates(first, second, momentum=0.0)
    torch.testing.assert_close(update, -common.orthogonalize(second), rtol=1e-4, atol=1e-5)


def test_muon_has_momentum_by_default():
    (group,) = common.Muon([nn.Parameter(torch.zeros(2, 2))], lr=1.0).param_groups
    assert group["momentum"] == 0.95


def test_muon_trains_the_convolutions_inside_and_adam_everything_else():
    net = common.UNet(width=8)
    names = {id(weight): name for name, weight in net.named_parameters()}
    muon, adam = common.muon_and_adam(net, lr=1e-3)
    by_muon = [names[id(weight)] for weight in muon.param_groups[0]["params"]]
    by_adam = [names[id(weight)] for weight in adam.param_groups[0]["params"]]
    assert sorted(by_muon + by_adam) == sorted(names.values())
    assert {"down.0.conv1.weight", "mid.conv2.weight", "fuse.1.weight"} <= set(by_muon)
    assert {"stem.weight", "head.2.weight", "down.0.film.weight"} <= set(by_adam)
    assert muon.param_groups[0]["lr"] == 0.02
    assert adam.param_groups[0]["lr"] == 1e-3


# ---- the judge's training ------------------------------------------------------------------------


def fit_small_judge(n=6, **options):
    """A judge of two classes after two epochs on n images of 8x8."""
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=common.rng(0))
    data = common.Dataset(images, torch.arange(n) % 2, ["a", "b"])
    return common.fit_judge(data, epochs=2, **options)


@pytest.fixture
def judge_steps(monkeypatch):
    """The arguments of each guarded step of a judge's training."""
    calls = []
    guarded_step = common.guarded_step

    def record(net, optimizers, skipped, clip=1.0):
        calls.append((skipped, clip))
        return guarded_step(net, optimizers, skipped, clip)

    monkeypatch.setattr(common, "guarded_step", record)
    return calls


def test_fit_judge_depends_on_its_seed_alone():
    torch.manual_seed(5)
    first = fit_small_judge(seed=1).state_dict()
    torch.manual_seed(6)
    assert same_weights(first, fit_small_judge(seed=1).state_dict())
    assert not same_weights(first, fit_small_judge(seed=2).state_dict())


@pytest.mark.parametrize("batch_size, steps", [(2, 6), (4, 2), (100, 2)])
def test_fit_judge_sees_every_image_about_once_an_epoch(judge_steps, batch_size, steps):
    """The 6 images of an epoch are 3 batches of 2, or one of 4; a batch never has more than 6."""
    fit_small_judge(batch_size=batch_size)
    assert len(judge_steps) == steps


def test_fit_judge_never_gives_up_and_clips_at_five(judge_steps):
    fit_small_judge(batch_size=2)
    assert set(judge_steps) == {(0, 5.0)}


def test_fit_judge_speaks_of_skipped_steps_only_if_there_were_some(capsys):
    fit_small_judge()
    out = capsys.readouterr().out
    assert "judge step" in out
    assert common.skipped_text(1) not in out


def test_a_judge_comes_out_of_its_training_in_eval_mode():
    assert not fit_small_judge().training


def test_random_affine_turns_scales_and_shifts_and_nothing_else(monkeypatch):
    """Its matrix, divided by its scale, is a rotation: it keeps all lengths and mirrors nothing."""
    grids = []
    affine_grid = F.affine_grid

    def record(theta, *args, **options):
        grids.append(theta)
        return affine_grid(theta, *args, **options)

    monkeypatch.setattr(F, "affine_grid", record)
    torch.manual_seed(0)
    common.random_affine(torch.zeros(500, 1, 8, 8))
    (theta,) = grids
    matrix = theta[:, :, :2]
    scale = torch.linalg.det(matrix).sqrt()
    assert 0.9 - 1e-4 < scale.min() < 0.92
    assert 1.08 < scale.max() < 1.1 + 1e-4
    rotation = matrix / scale[:, None, None]
    identity = torch.eye(2).expand(500, 2, 2)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), identity)
    degrees = torch.rad2deg(torch.asin(rotation[:, 1, 0]))
    assert 9 < degrees.abs().max() < 10
    pixels = theta[:, :, 2] * 8 / 2
    assert 1.9 < pixels.abs().max() <= 2


# ---- the loss by noise level ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
def test_loss_by_noise_of_a_network_that_answers_zero(size):
    """F* = sin x0/sd - cos z: with |x0| = size sd the loss is sin^2 size^2 + cos^2 on average."""
    sd = 0.6
    net = common.ExactNet(lambda x, sigma: x * (sigma / (sigma**2 + sd**2))[:, None], sd)
    signs = torch.randint(0, 2, (2000, 16), generator=common.rng(0)) * 2.0 - 1
    edges = (0.1, 0.11, 0.6, 0.61, 5.0, 5.1)
    bins = load_script("02")["loss_by_noise"](net, size * sd * signs, edges)
    assert [(low, high) for low, high, _ in bins] == list(zip(edges[:-1], edges[1:]))
    for low, high, loss in bins[::2]:
        sin_squared = low * high / (low * high + sd**2)
        assert loss == pytest.approx(sin_squared * size**2 + 1 - sin_squared, rel=0.03)


def test_loss_by_noise_is_the_same_again():
    net = common.UNet(width=8)
    loss_by_noise = load_script("02")["loss_by_noise"]
    x0 = torch.zeros(4, 1, 8, 8)
    assert loss_by_noise(net, x0) == loss_by_noise(net, x0)


# ---- checkpoints and folders ---------------------------------------------------------------------


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    common.save_checkpoint(path, arch=1, ema=2)

    def save_half(content, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        common.save_checkpoint(path, arch=3, ema=4)
    assert common.load_checkpoint(path, "")["arch"] == 1


@pytest.fixture
def finished_folder(tmp_path):
    """A finished run: a folder with the file "a"."""
    path = tmp_path / "run"
    with common.fresh_folder(path) as out:
        (out / "a").write_text("old")
    return path


def test_failed_block_leaves_the_old_folder(finished_folder):
    with pytest.raises(RuntimeError), common.fresh_folder(finished_folder) as out:
        (out / "a").write_text("new")
        raise RuntimeError
    assert (finished_folder / "a").read_text() == "old"


def test_finished_block_replaces_the_folder(finished_folder):
    with common.fresh_folder(finished_folder) as out:
        (out / "b").write_text("new")
    assert [path.name for path in finished_folder.iterdir()] == ["b"]


def test_fresh_folder_leaves_nothing_temporary(finished_folder):
    with pytest.raises(RuntimeError), common.fresh_folder(finished_folder):
        raise RuntimeError
    with common.fresh_folder(finished_folder) as out:
        (out / "b").write_text("new")
    assert [path.name for path in finished_folder.parent.iterdir()] == ["run"]


# ---- 02: resume ----------------------------------------------------------------------------------


def test_resume_is_bit_exact(tmp_path, monkeypatch):
    """Six steps in one go give what three steps, a crash and three more give."""
    check_success(run_script("02", *QUICK, "--out", tmp_path / "whole"))
    save = common.save_checkpoint

    def save_and_crash(path, **content):
        save(path, **content)
        raise SystemExit(9)

    monkeypatch.setattr(common, "save_checkpoint", save_and_crash)
    crashed = run_script("02", *QUICK, "--save-every", 3, "--out", tmp_path / "parts")
    assert crashed.status == 9
    monkeypatch.setattr(common, "save_checkpoint", save)
    resumed = run_script("02", *QUICK, "--resume", "--out", tmp_path / "parts")
    check_success(resumed)
    assert "at step 3" in resumed.out

    whole = torch.load(quick(tmp_path / "whole") / "mnist/base.pt", weights_only=True)
    parts = torch.load(quick(tmp_path / "parts") / "mnist/base.pt", weights_only=True)
    assert whole["step"] == 6
    assert parts["step"] == 6
    assert same_weights(whole["model"], parts["model"]), "the weights differ"
    assert same_weights(whole["ema"], parts["ema"]), "the averages differ"
    assert not same_weights(whole["model"], whole["ema"]), "the average is the weights themselves"


# ---- 02: the log and the samples belong to the checkpoint beside them ----------------------------

SMALL = ("--quick", "--batch-size", 4, "--width", 8, "--steps", 3, "--sample-every", 2)


def test_the_files_of_a_training_stay_until_another_one_takes_its_place(tmp_path, monkeypatch):
    """Then they go, its samples too: the first run has drawn some after 2 steps, the second not."""

    def crash(*_):
        raise SystemExit(9)

    flags = (*SMALL, "--without", 3, "--out", tmp_path)
    check_success(run_script("02", *flags))
    (model,) = tmp_path.rglob("model.pt")
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    assert set(before) >= {"log.jsonl", "command.txt", "samples_000002.png"}
    again = (*flags, "--sample-every", 3, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(common, "guarded_step", crash)
        assert run_script("02", *again).status == 9
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before
    check_success(run_script("02", *again))
    names = {path.name for path in model.parent.iterdir()}
    assert names == {"model.pt", "log.jsonl", "command.txt", "samples_000003.png"}
    assert "--sample-every 3" in (model.parent / "command.txt").read_text()


@pytest.fixture
def write_training(tmp_path):
    """The function write_training(name, step, outdated): save a training with a log of its own."""
    script = load_script("02")
    path = tmp_path / "model.pt"

    def write(name, step, outdated):
        net = nn.Linear(1, 1)
        net.arch = {}
        model = script["Model"](net, argparse.Namespace(net=net), [], None, (1, 8, 8))
        model.log = [f"{name} {k}\n" for k in range(step)]
        args = argparse.Namespace(without=["3"], command=name)
        script["save"](path, step, model, args, outdated)

    return write


@pytest.mark.parametrize("is_other", [True, False], ids=["another training", "the same"])
@pytest.mark.parametrize("moment", range(12))
def test_whenever_02_is_killed_its_files_belong_together(
    tmp_path, monkeypatch, write_training, is_other, moment
):
    """It ends before its first move or removal of a file, its second, and so on: SIGKILL."""
    write_training("first", 3, [])
    picture = tmp_path / "samples_000003.png"
    picture.write_text("first")
    outdated = [tmp_path / "log.jsonl", tmp_path / "command.txt", picture] if is_other else []
    operations = itertools.count()

    def mortal(function):
        def call(*args, **options):
            if next(operations) >= moment:
                raise SystemExit(9)  # the dead do nothing more
            function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        run_function(write_training, "second" if is_other else "first", 5, outdated)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    owner = content["args"]["command"]
    for path in tmp_path.glob("[!.]*"):
        if path.suffix in (".jsonl", ".txt", ".png"):
            assert path.read_text().startswith(owner), f"{path.name} beside the {owner}"
    log = tmp_path / "log.jsonl"
    if log.exists():
        assert "".join(content["log"]).startswith(log.read_text())


# ---- 02: what a step trains on -------------------------------------------------------------------


class Trained(NamedTuple):
    """What three steps of 02 have asked for, and the lines of their log."""

    batches: list  # the images of each step
    times: list  # their times
    weights: list  # how the loss is weighted
    rates: list  # of Adam
    log: list  # the lines of log.jsonl


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 02 of three steps, of a narrow network."""
    out = tmp_path_factory.mktemp("trained")
    result = Trained([], [], [], [], [])
    dsm_loss = common.dsm_loss
    set_lr = common.set_lr

    def record_loss(net, sde, x0, t, weight="std2"):
        result.batches.append(x0)
        result.times.append(t)
        result.weights.append(weight)
        return dsm_loss(net, sde, x0, t, weight)

    def record_rate(optimizers, *args, **options):
        set_lr(optimizers, *args, **options)
        result.rates.append(optimizers[-1].param_groups[0]["lr"])

    flags = ("--quick", "--steps", 3, "--batch-size", 8, "--width", 8, "--lr", 1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "dsm_loss", record_loss)
        patch.setattr(common, "set_lr", record_rate)
        check_success(run_script("02", *flags, "--without", 3, "--out", out))
    (log,) = out.rglob("log.jsonl")
    result.log.extend(json.loads(line) for line in log.read_text().splitlines())
    return result


@pytest.mark.parametrize("drawn", ["batches", "times"])
def test_every_step_of_02_draws_its_own_random_numbers(trained, drawn):
    first, second, third = getattr(trained, drawn)
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(second, third)


def test_the_base_is_trained_with_the_v_loss(trained):
    assert trained.weights == ["v"] * 3


def test_the_rate_of_02_rises_for_200_steps_and_falls_along_a_cosine(trained):
    for step, rate in enumerate(trained.rates):
        cosine = 0.5 * (1 + math.cos(math.pi * step / 3))
        assert rate == pytest.approx(1e-3 * (step + 1) / 200 * cosine)


def test_the_log_of_02_has_the_speed_of_the_training(trained):
    assert trained.log[-1]["images_per_s"] > 0.01


def test_training_without_a_class_draws_none_of_its_images(trained):
    """Bytes are compared: dequantize adds less than one level."""
    data = common.load_dataset("mnist")
    threes = {image.numpy().tobytes() for image in data.images[data.labels == 3]}
    for x0 in trained.batches:
        for image in common.to_bytes(x0):
            assert image.numpy().tobytes() not in threes


# ---- the network ---------------------------------------------------------------------------------

NETWORKS = {
    "digits": ({}, (2, 1, 28, 28)),
    "photos": (
        {
            "channels": 3,
            "mult": (1, 2, 2),
            "attn": (False, True, False),
            "patch": 1,
            "width": 32,
        },
        (2, 3, 32, 32),
    ),
}


@pytest.mark.parametrize("arch, shape", NETWORKS.values(), ids=NETWORKS.keys())
def test_unet_starts_at_zero_and_takes_other_sizes(arch, shape):
    net = common.UNet(**arch)
    out = net(torch.randn(shape), torch.tensor([0.3, 1.5]))
    assert torch.equal(out, torch.zeros(shape))


def test_attention_is_a_softmax_over_all_pixels():
    """64 channels are two heads of 32; queries, keys and values written out one by one."""
    torch.manual_seed(0)
    attention = common.Attention(64)
    nn.init.normal_(attention.out.weight, std=0.1)
    x = torch.randn(2, 64, 3, 5)
    with torch.no_grad():
        qkv = attention.qkv(attention.norm(x)).flatten(2)  # (2, 3 * 64, 15)
        mixed = []
        for head in range(2):
            first = 32 * head
            query = qkv[:, first : first + 32]
            key = qkv[:, 64 + first : 64 + first + 32]
            value = qkv[:, 128 + first : 128 + first + 32]
            share = (query.transpose(1, 2) @ key / 32**0.5).softmax(2)  # (2, 15, 15)
            mixed.append(value @ share.transpose(1, 2))
        want = x + attention.out(torch.cat(mixed, 1).reshape(x.shape))
        torch.testing.assert_close(attention(x), want, rtol=1e-4, atol=1e-5)


@pytest.fixture
def mnist_net():
    """The network of the MNIST recipe with random weights."""
    recipe = common.RECIPES["mnist"]
    return common.UNet(**recipe["net"], sd=recipe["sd"])


def test_mnist_network_fits_its_budget_of_operations(mnist_net):
    """At most 0.12 GFLOP forward an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mnist_net(torch.zeros(1, 1, 28, 28), torch.ones(1))
    assert counter.get_total_flops() <= 0.12e9


def test_mnist_network_fits_its_budget_of_parameters(mnist_net):
    """About 0.7 M parameters."""
    assert sum(w.numel() for w in mnist_net.parameters()) < 0.9e6


# ---- how good the Standard model is --------------------------------------------------------------


def test_measure_keeps_what_it_prints_and_replaces_no_other_result(small_base, tmp_path):
    argv = ("--quick", "--out", tmp_path, "--measure")
    check_success(run_script("02", *argv, "--n", 100))
    path = quick(tmp_path) / "mnist/measure.json"
    kept = json.loads(path.read_text())
    assert sum(kept["model"]["class_counts"]) == sum(kept["real"]["class_counts"]) == 100
    before = path.read_bytes()
    check_refusal(run_script("02", *argv, "--n", 101), "measure.json", "--n was 100", "--overwrite")
    assert path.read_bytes() == before
    check_success(run_script("02", *argv, "--n", 101, "--overwrite"))
    assert json.loads(path.read_text())["n"] == 101


def test_measure_takes_as_many_samples_as_there_are_test_images(small_base, tmp_path, monkeypatch):
    """FD of two numbers of images cannot be compared."""
    load = common.load_train_and_test

    def load_few(*args):
        train_set, test_set = load(*args)
        return train_set, test_set._replace(
            images=test_set.images[:60], labels=test_set.labels[:60]
        )

    monkeypatch.setattr(common, "load_train_and_test", load_few)
    check_success(run_script("02", "--quick", "--out", tmp_path, "--measure", "--n", 100))
    kept = json.loads((quick(tmp_path) / "mnist/measure.json").read_text())
    assert (
        kept["n"] == sum(kept["model"]["class_counts"]) == sum(kept["real"]["class_counts"]) == 60
    )
