"""--bf16: networks train and sample in bfloat16; weights and likelihoods stay in float32."""

import argparse
import types

import pytest
import torch
from conftest import (
    check_success,
    load_script,
    load_weights,
    only_run,
    quick,
    read_json,
    run_script,
    write_small_base,
)

import common

UNLEARN = "--quick --forget 3 --steps 2 --batch-size 4 --n 10 --nfe 2".split()
EVALUATE = "--quick --forget 3 --n 20 --nfe 2 --n-nll 2".split()
RESTORE = "--quick --forget 3 --n 3 --steps 2 --resample 1".split()


class Types:
    """The types in which U-Nets answer, {what is being done: set of types}."""

    def __init__(self, patch):
        self.of = {}
        self.doing = "other"
        forward = common.UNet.forward

        def note(net, *args):
            out = forward(net, *args)
            self.of.setdefault(self.doing, set()).add(out.dtype)
            return out

        patch.setattr(common.UNet, "forward", note)
        for name in ("ode_log_likelihood", "sample_images", "dsm_loss"):
            patch.setattr(common, name, self.named(name))

    def named(self, name):
        """A function of common.py that says what is being done."""
        function = getattr(common, name)

        def run(*args, **more):
            before = self.doing
            self.doing = name
            try:
                return function(*args, **more)
            finally:
                self.doing = before

        return run


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "bf16"])
def runs(request, tmp_path_factory):
    """03, 04 and 05 one after the other, with and without --bf16."""
    out = tmp_path_factory.mktemp("bf16")
    write_small_base(out)
    flag = ["--bf16"] if request.param else []
    where = [*flag, "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        types_of = Types(patch)
        unlearned = run_script("03", *UNLEARN, "--method", "unseen", *where)
        check_success(unlearned)
        check_success(run_script("04", *EVALUATE, *where))
        types_of.doing = "restore"
        check_success(run_script("05", *RESTORE, *where))
    return types.SimpleNamespace(
        is_on=request.param, out=out, of=types_of.of, unlearned=unlearned, folder=only_run(out)
    )


@pytest.mark.parametrize("doing", ["dsm_loss", "sample_images", "restore"])
def test_training_sampling_and_restoring_are_in_the_type_that_was_asked_for(runs, doing):
    assert runs.of[doing] == {torch.bfloat16 if runs.is_on else torch.float32}


def test_the_likelihood_stays_in_float32(runs):
    assert runs.of["ode_log_likelihood"] == {torch.float32}


def test_the_weights_stay_in_float32(runs):
    weights = load_weights(runs.folder / "model.pt")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_it_is_said_in_the_log_and_in_the_results(runs):
    assert ("bf16: networks compute in bfloat16" in runs.unlearned.out) == runs.is_on
    assert runs.folder.name.endswith("-bf16") == runs.is_on
    result = read_json(runs.folder / "result.json")
    assert result["args"]["bf16"] is runs.is_on
    assert result["device"] == "cpu"
    folder = quick(runs.out) / "mnist/forget-3"
    assert read_json(folder / "table.json")["bf16"] is runs.is_on
    (restored,) = folder.glob("downstream/*/table.json")
    assert read_json(restored)["args"]["bf16"] is runs.is_on


def test_02_trains_in_it(tmp_path, monkeypatch):
    train = load_script("02")
    args = train["arguments"](["--bf16", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    noted = Types(monkeypatch)
    x_g = torch.randn(2, 1, 8, 8, generator=common.rng(0))
    loss = train["objective"](args, common.UNet(width=8, sd=0.6), common.TRAINING_SDE, x_g)
    assert noted.of == {"dsm_loss": {torch.bfloat16}}
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    "flags, is_slow",
    [
        ("avx2 avx512_bf16 amx_bf16", False),
        ("asimd bf16 i8mm", False),
        ("fpu avx2 avx512f", True),
        ("fpu nobf16x", True),
    ],
)
def test_a_processor_without_units_is_one_line(tmp_path, capsys, flags, is_slow):
    path = tmp_path / "cpuinfo"
    path.write_text(f"flags\t\t: {flags}\n")
    common.say_bf16(argparse.Namespace(bf16=True, device="cpu"), path)
    assert ("will be slower" in capsys.readouterr().err) == is_slow


@pytest.mark.parametrize("bf16", [False, True])
def test_cuda_trains_in_it_in_any_case(monkeypatch, bf16):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *words: asked.append(words))
    common.autocast("cuda:0", bf16)
    assert asked == [("cuda", torch.bfloat16)]


@pytest.mark.parametrize("likelihood", ["ode", "bound"])
def test_a_likelihood_is_computed_without_tf32(likelihood):
    # On a CPU these settings change nothing, but they can be read there.
    seen = []

    def z_hat(x_hat, sigma):
        allowed = torch.backends.cudnn.allow_tf32
        seen.append((torch.get_float32_matmul_precision(), allowed))
        return x_hat / 2

    net = common.ExactNet(z_hat)
    x = torch.zeros(1, 2)
    before = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")  # as the scripts set it
    if likelihood == "ode":
        common.ode_log_likelihood(net, common.VP(), x, steps=1)
    else:
        load_script("04")["nll_bound"](net, x, levels=1)
    assert set(seen) == {("highest", False)}
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.allow_tf32 == before
