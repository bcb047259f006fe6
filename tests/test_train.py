"""Training helpers: averages, rates, the guard, Muon, checkpoints; and 02's resume, bit for bit."""
import signal

import pytest
import torch
import torch.nn as nn

import common as c

QUICK = ("--quick", "--steps", 6, "--batch-size", 8)


def test_ema_warms_up_and_then_follows_its_decay():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = c.EMA(net, 0.5)
    nn.init.ones_(net.weight)
    want = 0.0
    for n in range(20):
        ema.update(net)
        d = min(0.5, (1 + n) / (10 + n))
        want = d * want + 1 - d
    assert ema.net.weight.item() == pytest.approx(want) and not ema.net.training


def test_learning_rate_never_is_zero_at_the_start_and_falls_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    rates = []
    for step in range(101):
        c.set_lr([optimizer], step, 100, warmup=10)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.2, rel=0.01) and max(rates) <= 2.0 and rates[50] == pytest.approx(1.0) and rates[100] == pytest.approx(0, abs=1e-12)


def test_a_nan_step_is_skipped_and_five_in_a_row_stop(capsys):
    net = nn.Linear(2, 1)
    optimizer, before, skipped = torch.optim.Adam(net.parameters(), 0.1), nn.Linear(2, 1).weight.shape, 0
    weight = net.weight.detach().clone()
    for k in range(4):
        net(torch.full((1, 2), float("nan"))).sum().backward()
        skipped = c.guarded_step(net, [optimizer], skipped)
        assert skipped == k + 1 and torch.equal(net.weight, weight)
    net(torch.full((1, 2), float("nan"))).sum().backward()
    with pytest.raises(SystemExit) as e:
        c.guarded_step(net, [optimizer], skipped)
    assert e.value.code == 2 and "--lr" in capsys.readouterr().err
    net(torch.ones(1, 2)).sum().backward()
    assert c.guarded_step(net, [optimizer], 3) == 0 and not torch.equal(net.weight, weight)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (64, 2, 3, 3)])
def test_muon_step_is_orthogonal(shape):
    """The update of one step, over its rate, has all singular values near 1 (0.7 to 1.2 by the polynomial's design)."""
    w = nn.Parameter(torch.zeros(shape))
    w.grad = torch.randn(shape, generator=c.rng(0))
    c.Muon([w], lr=1.0, momentum=0.0).step()
    flat = w.detach().flatten(1)
    values = torch.linalg.svdvals(flat) / max(1, flat.shape[0] / flat.shape[1]) ** 0.5
    assert values.min() > 0.6 and values.max() < 1.3
    assert (flat * w.grad.flatten(1)).sum() < 0  # downhill


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    c.save_checkpoint(path, arch=1, ema=2)

    def half(content, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        c.save_checkpoint(path, arch=3, ema=4)
    assert c.load_checkpoint(path, "")["arch"] == 1


def test_fresh_folder_replaces_only_when_done(tmp_path):
    path = tmp_path / "run"
    with c.fresh_folder(path) as out:
        (out / "a").write_text("old")
    with pytest.raises(RuntimeError), c.fresh_folder(path) as out:
        (out / "a").write_text("new")
        raise RuntimeError
    assert (path / "a").read_text() == "old"
    with c.fresh_folder(path) as out:
        (out / "b").write_text("new")
    assert [p.name for p in path.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["run"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_resume_is_bit_exact(script, tmp_path, monkeypatch):
    """Six steps in one go, and three steps, a crash, three more: the same weights, average and log."""
    assert script("02", *QUICK, "--out", tmp_path / "a")[0] == 0
    real = c.save_checkpoint

    def crash(path, **content):
        real(path, **content)
        raise SystemExit(9)

    monkeypatch.setattr(c, "save_checkpoint", crash)
    assert script("02", *QUICK, "--save-every", 3, "--out", tmp_path / "b")[0] == 9
    monkeypatch.setattr(c, "save_checkpoint", real)
    status, out, _ = script("02", *QUICK, "--resume", "--out", tmp_path / "b")
    assert status == 0 and "at step 3" in out
    a, b = (torch.load(tmp_path / k / "mnist/base.pt", weights_only=True) for k in "ab")
    assert a["step"] == b["step"] == 6 and same(a["model"], b["model"]) and same(a["ema"], b["ema"])
    assert not same(a["model"], a["ema"])


def test_ctrl_c_saves_a_whole_step_and_says_how_to_go_on(script, tmp_path, monkeypatch):
    real, calls = c.guarded_step, []

    def step(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(c, "guarded_step", step)
    status, out, _ = script("02", *QUICK, "--out", tmp_path)
    assert status == 0 and "--resume" in out
    assert torch.load(tmp_path / "mnist/base.pt", weights_only=True)["step"] == len(calls) == 2


def test_unet_starts_at_zero_and_takes_other_sizes():
    for kw, shape in (({}, (2, 1, 28, 28)), (dict(channels=3, mult=(1, 2, 2), attn=(False, True, False), patch=1, width=32), (2, 3, 32, 32))):
        net = c.UNet(**kw)
        out = net(torch.randn(shape), torch.tensor([0.3, 1.5]))
        assert out.shape == shape and torch.equal(out, torch.zeros(shape))


def test_mnist_network_fits_its_budget():
    """At most 0.12 GFLOP forward an image, about 0.7 M parameters."""
    from torch.utils.flop_counter import FlopCounterMode

    recipe = c.RECIPES["mnist"]
    net = c.UNet(**recipe["net"], sd=recipe["sd"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 1, 28, 28), torch.ones(1))
    assert counter.get_total_flops() <= 0.12e9 and sum(w.numel() for w in net.parameters()) < 0.9e6
