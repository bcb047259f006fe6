"""03 from inside: what a step trains on, how flags become weights, what the result is about."""

import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    arguments,
    check_refusal,
    check_success,
    load_script,
    load_weights,
    run_function,
    run_script,
    same_weights,
    write_small_base,
)

import common

# A network and images so small that a step takes a few milliseconds.
SHAPE = (1, 8, 8)
BYTE_G = 60  # every pixel of every image of D_g
BYTE_F = 190  # the same of D_f


@pytest.fixture(scope="module")
def unlearn(tmp_path_factory):
    """The names of 03_unlearn.py, and `out`, a folder for --out."""
    return types.SimpleNamespace(**load_script("03"), out=tmp_path_factory.mktemp("unlearn"))


def tiny_net():
    """A small U-Net with random weights everywhere: a fresh one answers 0."""
    torch.manual_seed(0)
    net = common.UNet(width=8, sd=0.6)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return net


def tiny_arguments(unlearn, *flags):
    """What 03 makes of its flags."""
    argv = ["--forget", "3", "--device", "cpu", "--out", unlearn.out, *flags]
    return unlearn.arguments([str(value) for value in argv])


def constant_data(unlearn, num_g=90, num_f=10, part_size=8):
    """D_g are images of one grey, and D_f are images of another."""
    images = torch.full((num_g + num_f, *SHAPE), BYTE_G, dtype=torch.uint8)
    images[num_g:] = BYTE_F
    return unlearn.Data(
        images=images,
        index_g=torch.arange(num_g),
        index_f=torch.arange(num_g, num_g + num_f),
        labels_g=torch.zeros(num_g, dtype=torch.int64),
        test_g=images[:num_g],
        forget_classes=[3],
        forget_names=["3"],
        class_names=[str(digit) for digit in range(10)],
        part_size=part_size,
        flip=False,
    )


def train(unlearn, args, data, model):
    """The loop of 03, with a file for --resume that nobody reads."""
    return unlearn.train(args, data, model, unlearn.out / "x.resume.pt", common.CtrlC())


# ---- the loop ------------------------------------------------------------------------------------


class Batches:
    """What objective gets in each step, and the rate of that step; stands in for `objective`."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.of_g = []
        self.of_f = []
        self.rates = []  # of the optimizer, in each step

    def objective(self, args, net, base, sde, x_g, x_f):
        self.of_g.append(x_g)
        self.of_f.append(x_f)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        loss = sum(weight.square().sum() for weight in net.parameters())
        return loss, loss, loss


@pytest.fixture
def batches(unlearn, monkeypatch):
    """What objective gets in five steps."""
    args = tiny_arguments(unlearn, "--method", "ort", "--steps", 5)
    net = tiny_net()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    result = Batches(optimizer)
    model = unlearn.Model(
        net=net,
        base=None,
        ema=common.EMA(net, 0.9),
        optimizers=[optimizer],
        sde=common.VP(),
        shape=SHAPE,
    )
    monkeypatch.setitem(unlearn.train.__globals__, "objective", result.objective)
    train(unlearn, args, constant_data(unlearn), model)
    return result


def test_what_is_kept_is_d_g_and_what_is_forgotten_is_d_f(batches):
    for x_g, x_f in zip(batches.of_g, batches.of_f):
        assert (common.to_bytes(x_g) == BYTE_G).all()
        assert (common.to_bytes(x_f) == BYTE_F).all()


@pytest.mark.parametrize("part", ["of_g", "of_f"])
def test_every_step_draws_its_own_random_numbers(batches, part):
    """The images are all alike: what differs is the noise of dequantize."""
    drawn = getattr(batches, part)
    assert len(drawn) == 5
    for i, x in enumerate(drawn):
        for other in drawn[:i]:
            assert not torch.equal(x, other)


def test_the_rate_rises_for_20_steps_and_falls_along_a_cosine(batches):
    for step, rate in enumerate(batches.rates):
        cosine = 0.5 * (1 + math.cos(math.pi * step / 5))
        assert rate == pytest.approx(1e-3 * (step + 1) / 20 * cosine)


def small_digits(digit):
    """Test images of one digit, 12x12 pixels: (n, 1, 12, 12) uint8."""
    test = common.load_dataset("mnist", train=False)
    images = test.images[test.labels == digit].float()[..., 2:26, 2:26]
    return F.avg_pool2d(images, 2).byte()


@pytest.fixture(scope="module")
def forgotten(unlearn):
    """The losses {digit: (before, after)} on held-out images; the 3s are forgotten, the 7s kept."""
    sevens = small_digits(7)
    threes = small_digits(3)
    data = unlearn.Data(
        images=torch.cat([sevens[:500], threes[:500]]),
        index_g=torch.arange(500),
        index_f=torch.arange(500, 1000),
        labels_g=torch.full((500,), 7),
        test_g=sevens[500:],
        forget_classes=[3],
        forget_names=["3"],
        class_names=[str(digit) for digit in range(10)],
        part_size=16,
        flip=False,
    )
    args = tiny_arguments(unlearn, "--method", "ascent", "--alpha", 0.7, "--steps", 60, "--ema", 0)
    torch.manual_seed(0)
    net = common.UNet(width=8, sd=0.6)
    model = unlearn.Model(
        net=net,
        base=None,
        ema=common.EMA(net, args.ema),
        optimizers=[torch.optim.Adam(net.parameters(), 3e-3)],
        sde=common.VP(),
        shape=(1, 12, 12),
    )

    @torch.no_grad()
    def loss(images):
        torch.manual_seed(1)
        t = common.lognormal_t(len(images), model.sde, 0.0, 0.7)
        return common.dsm_loss(net, model.sde, common.dequantize(images), t).mean().item()

    before = [loss(threes[500:]), loss(sevens[500:])]
    train(unlearn, args, data, model)
    after = [loss(threes[500:]), loss(sevens[500:])]
    return dict(zip((3, 7), zip(before, after)))


def test_60_steps_of_ascent_raise_the_loss_on_3s_more_than_on_7s(forgotten):
    before_3, after_3 = forgotten[3]
    before_7, after_7 = forgotten[7]
    assert after_3 > before_3 + 0.2
    assert after_3 - before_3 > 1.5 * (after_7 - before_7)


# ---- one step ------------------------------------------------------------------------------------


def gradients(unlearn, method, *flags):
    """Gradients of the loss that 03 steps on, of L_g and of L_f, for one batch."""
    args = tiny_arguments(unlearn, "--method", method, *flags)
    torch.manual_seed(0)
    x_g, x_f = torch.randn(2, 8, *SHAPE)
    net = tiny_net()
    losses = unlearn.objective(args, net, None, common.VP(), x_g, x_f)
    return [unlearn.flat_grad(loss, net) for loss in losses]


@pytest.mark.parametrize("c", [0.5, 3.0])
def test_siss_goes_uphill_in_the_loss_of_d_f_by_the_length_c(unlearn, c):
    total, grad_g, grad_f = gradients(unlearn, "siss", "--c", c)
    uphill = total - grad_g
    assert uphill.norm().item() == pytest.approx(c, rel=1e-3)
    cosine = uphill @ grad_f / (uphill.norm() * grad_f.norm())
    assert cosine.item() == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("method", ["ort", "obt", "ascent"])
def test_alpha_is_the_weight_of_l_g_and_the_rest_is_that_of_l_f(unlearn, method):
    total, grad_g, grad_f = gradients(unlearn, method, "--alpha", 0.8)
    torch.testing.assert_close(total, 0.8 * grad_g + 0.2 * grad_f, rtol=1e-3, atol=1e-5)


def test_unseen_steps_on_l_g_alone(unlearn):
    args = tiny_arguments(unlearn, "--method", "unseen")
    x_g, x_f = torch.randn(2, 8, *SHAPE, generator=common.rng(0))
    losses = unlearn.objective(args, tiny_net(), None, common.VP(), x_g, x_f)
    loss, loss_g, loss_f = (value.item() for value in losses)
    assert loss == loss_g
    assert loss_f == 0


# ---- --forget-every and --no-floor ---------------------------------------------------------------


def losses_of_seven_steps(unlearn, monkeypatch, *flags):
    """L_g and L_f of seven steps (7, 2), and how often L_f was computed."""
    args = tiny_arguments(unlearn, "--steps", 7, *flags)
    net = tiny_net()
    adam = torch.optim.Adam(net.parameters(), 1e-4)
    model = unlearn.Model(net, tiny_net(), common.EMA(net, 0.9), [adam], common.VP(), SHAPE)
    names = unlearn.train.__globals__
    forget_loss = names["forget_loss"]
    count = 0

    def count_and_compute(*arguments):
        nonlocal count
        count += 1
        return forget_loss(*arguments)

    monkeypatch.setitem(names, "forget_loss", count_and_compute)
    unlearn.set_alpha(args, constant_data(unlearn))
    return train(unlearn, args, constant_data(unlearn), model), count


@pytest.mark.parametrize("method", ["obt-rel", "obt", "ort", "ascent", "erasediff"])
def test_l_f_is_computed_at_every_kth_step_from_the_first_on(unlearn, monkeypatch, method):
    flags = ("--method", method, "--forget-every", 3)
    losses, count = losses_of_seven_steps(unlearn, monkeypatch, *flags)
    assert count == 3
    assert losses[:, 0].isfinite().all()
    assert losses[:, 1].isfinite().tolist() == [True, False, False, True, False, False, True]


def test_l_f_is_computed_at_every_step_by_default(unlearn, monkeypatch):
    losses, count = losses_of_seven_steps(unlearn, monkeypatch, "--method", "ort")
    assert count == 7
    assert losses.isfinite().all()


@pytest.mark.parametrize("method, weight", [("ort", 0.8), ("erasediff", 1)])
def test_a_step_without_l_f_minimises_l_g_with_its_weight(unlearn, method, weight):
    """EraseDiff gives L_g the weight 1; the others give it alpha, also in these steps."""
    flags = ("--alpha", weight) if method == "ort" else ()
    args = tiny_arguments(unlearn, "--method", method, *flags)
    x_g = torch.randn(8, *SHAPE, generator=common.rng(0))
    losses = unlearn.objective(args, tiny_net(), None, common.VP(), x_g, None)
    loss, loss_g, loss_f = (value.item() for value in losses)
    assert loss == pytest.approx(weight * loss_g)
    assert math.isnan(loss_f)


class FarBeyond(torch.nn.Module):
    """A network whose z_hat . z is far below -2, with one weight."""

    sd = 0.6

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(100.0))

    def forward(self, y, phi):
        return self.weight * y


@pytest.mark.parametrize("flags, pushes", [((), False), (("--no-floor",), True)])
def test_only_without_its_floor_obt_pushes_what_lies_beyond_it(unlearn, flags, pushes):
    # At the uniform times sigma can be so small that even this network is not beyond it.
    args = tiny_arguments(unlearn, "--method", "obt", "--no-uniform-t", *flags)
    torch.manual_seed(0)
    net = FarBeyond()
    losses = unlearn.forget_loss(args, net, None, common.VP(), torch.zeros(8, *SHAPE))
    assert (losses <= -2).all()
    losses.mean().backward()
    assert (net.weight.grad != 0) == pushes


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--method unseen --forget-every 2", "--forget-every has no part in --method unseen"),
        ("--method siss --forget-every 2", "--forget-every has no part in --method siss"),
        ("--method ort --no-floor", "--no-floor has no part in --method ort"),
        ("--no-floor", "--no-floor has no part in --method obt-rel"),
        ("--forget-every 0", "0 is out of range"),
    ],
)
def test_where_they_have_no_part_they_are_refused(unlearn, flags, word):
    argv = ["--forget", "3", "--out", str(unlearn.out), *flags.split()]
    check_refusal(run_function(unlearn.arguments, argv), word)


def test_a_run_says_that_it_had_no_floor_and_which_steps_had_no_l_f(tmp_path):
    write_small_base(tmp_path)
    flags = "--quick --forget 3 --method obt --no-floor --forget-every 2 --n 10 --nfe 2".split()
    run = run_script("03", *flags, "--out", tmp_path)
    check_success(run)
    assert run.err == "", "a picture could not be drawn"
    (path,) = tmp_path.rglob("log.jsonl")
    assert path.parent.name == "obt-vp-no-floor-forget-every2"
    losses = [json.loads(line)["loss_f"] for line in path.read_text().splitlines()]
    assert [loss is None for loss in losses] == [False, True, False, True, False]
    recorded = json.loads(path.with_name("result.json").read_text())["args"]
    assert recorded["no_floor"] is True
    assert recorded["forget_every"] == 2
    check_success(run_script("03", *flags, "--out", tmp_path, "--redraw"))


# ---- kappa and noise levels ----------------------------------------------------------------------


@pytest.mark.parametrize("num_f", [10, 45])
@pytest.mark.parametrize("kappa", [1.0, 2.8])
def test_alpha_of_obt_rel_is_the_one_whose_optimum_has_this_kappa(unlearn, kappa, num_f):
    """The optimum has kappa = (1 - alpha) pi_g / (2 alpha pi_f), see common.obt_rel_loss."""
    args = tiny_arguments(unlearn, "--kappa", kappa)
    unlearn.set_alpha(args, constant_data(unlearn, num_g=90, num_f=num_f))
    odds_of_g = 90 / num_f
    assert (1 - args.alpha) / (2 * args.alpha) * odds_of_g == pytest.approx(kappa)


def test_a_given_alpha_stays(unlearn):
    args = tiny_arguments(unlearn, "--alpha", 0.6)
    unlearn.set_alpha(args, constant_data(unlearn))
    assert args.alpha == 0.6


@pytest.mark.parametrize("number, name", [("03", "forget_times"), ("02", "training_times")])
def test_log_sigma_is_the_mean_and_then_the_std(number, name, tmp_path):
    """The noise levels of D_f in 03, and those of all images in 02."""
    script = load_script(number)
    argv = {"03": ["--forget", "3"], "02": ["--wide", "0"]}[number]
    args = script["arguments"]([*argv, "--log-sigma", "1.5", "0.4", "--out", str(tmp_path)])
    sde = common.TRAINING_SDE
    torch.manual_seed(0)
    log_sigma = sde.sigma(script[name](args, sde, 4000)).log()
    assert log_sigma.mean().item() == pytest.approx(1.5, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(0.4, abs=0.02)


def test_uniform_t_is_the_papers_noise_of_d_f(unlearn):
    args = tiny_arguments(unlearn, "--uniform-t")
    torch.manual_seed(0)
    t = unlearn.forget_times(args, common.VP(), 4000)
    assert t.std().item() == pytest.approx(1 / 12**0.5, rel=0.02)


# ---- a run, and what its result is about ---------------------------------------------------------


class Recorded:
    """A run of 03: its files, and the networks that it has sampled, with what they drew."""

    def __init__(self, out, monkeypatch):
        self.drawn = []
        self.weights = []
        sample_images = common.sample_images

        def record(net, *args, **options):
            self.weights.append({k: w.clone() for k, w in net.state_dict().items()})
            images = sample_images(net, *args, **options)
            self.drawn.append(images)
            return images

        monkeypatch.setattr(common, "sample_images", record)
        base = write_small_base(out)
        training = ("--steps", 3, "--batch-size", 8, "--ema", 0.5, "--lr", 1e-2)
        flags = ("--quick", "--forget", 3, "--method", "ort", "--n", 40, "--nfe", 2)
        check_success(run_script("03", *flags, *training, "--out", out))
        self.base = load_weights(base)
        (path,) = out.rglob("model.pt")
        self.saved = load_weights(path)
        self.result = json.loads(path.with_name("result.json").read_text())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Recorded(out, monkeypatch)


def test_before_is_drawn_from_the_standard_model(recorded):
    assert same_weights(recorded.weights[0], recorded.base)


def test_after_is_drawn_from_the_average_that_is_saved(recorded):
    assert same_weights(recorded.weights[1], recorded.saved)
    assert not same_weights(recorded.weights[1], recorded.weights[0])


def test_what_is_saved_is_the_average_and_not_the_weights_of_the_last_step(unlearn, tmp_path):
    args = tiny_arguments(unlearn, "--method", "unseen", "--ema", 0.9, "--steps", 2)
    net = tiny_net()
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    model = unlearn.Model(net, None, common.EMA(net, args.ema), [adam], common.VP(), SHAPE)
    train(unlearn, args, constant_data(unlearn), model)
    path = tmp_path / "model.pt"
    unlearn.save(path, 2, model, args)
    saved = load_weights(path)
    assert same_weights(saved, model.ema.net.state_dict())
    assert not same_weights(saved, net.state_dict())


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Verdicts of the shipped judge on images that a test names: real ones of D_g, and floors."""
    train, test = common.load_train_and_test("mnist")
    judge = common.load_judge(arguments(tmp_path_factory.mktemp("out")), train)
    real = train.images[train.labels != 3][:1000]  # so many under --quick
    held_out = test.images[test.labels != 3]
    return types.SimpleNamespace(
        judge=judge,
        real=common.judge_images(judge, real),
        floor=common.judge_images(judge, common.random_subset(held_out, 40, 0)),
    )


def test_the_floor_compares_test_images_of_d_g_with_training_images_of_d_g(recorded, oracle):
    row = common.measure(oracle.floor, [3], oracle.real, 10)
    num_compared = 40 - recorded.result["class_counts"]["before"][3]
    fd = common.frechet_distance(oracle.floor.features[:num_compared], oracle.real.features)
    assert recorded.result["fd_floor"] == pytest.approx(fd, rel=1e-6)
    assert recorded.result["ur_floor"] == row["ur"]


def test_the_floor_has_as_many_images_as_the_distances_beside_it(unlearn, oracle):
    """The Standard model's samples are 40 real digits here; five classes of ten are forgotten."""
    train, test = common.load_train_and_test("mnist")
    args = tiny_arguments(unlearn, "--forget", 0, 1, 2, 3, 4, "--n", 40)
    data = unlearn.split_data(args, train, test)
    images = test.images[:40]
    before = unlearn.Samples(images, common.judge_images(oracle.judge, images))
    real_g = train.images[data.index_g][:1000]
    _, _, floor = unlearn.measure_all(args, data, oracle.judge, real_g, before, before)
    num_compared = int((before.verdict.labels > 4).sum())
    assert 10 < num_compared < 30
    real_test = common.random_subset(data.test_g, 40, args.seed)
    features = common.judge_images(oracle.judge, real_test).features[:num_compared]
    expected = common.frechet_distance(features, common.judge_images(oracle.judge, real_g).features)
    assert floor["fd"] == pytest.approx(expected, rel=1e-6)


def test_the_figures_before_and_after_are_those_of_the_samples(recorded, oracle):
    before, after = [common.judge_images(oracle.judge, images) for images in recorded.drawn]
    row_before = common.measure(before, [3], oracle.real, 10)
    row_after = common.measure(after, [3], oracle.real, 10, before)
    result = recorded.result
    for name in ("ur", "fd", "low_confidence"):
        assert result[f"{name}_before"] == pytest.approx(row_before[name], rel=1e-6)
        assert result[f"{name}_after"] == pytest.approx(row_after[name], rel=1e-6)
    assert result["class_min_ratio"] == pytest.approx(row_after["class_min_ratio"])
    assert result["class_counts"]["before"] == row_before["class_counts"]
    assert result["class_counts"]["after"] == row_after["class_counts"]


# ---- which images are which ----------------------------------------------------------------------


def test_split_data_finds_d_g_and_d_f(unlearn):
    """Each image holds its own label: 3 and 7 are forgotten."""
    labels = torch.arange(10).repeat(4)
    images = labels.byte().reshape(-1, 1, 1, 1).expand(-1, *SHAPE)
    dataset = common.Dataset(images, labels, [str(digit) for digit in range(10)])
    args = tiny_arguments(unlearn, "--forget", 3, 7, "--batch-size", 8)
    data = unlearn.split_data(args, dataset, dataset)
    assert set(labels[data.index_f].tolist()) == {3, 7}
    assert len(data.index_f) == 8
    assert set(labels[data.index_g].tolist()) == {0, 1, 2, 4, 5, 6, 8, 9}
    assert len(data.index_g) == 32
    assert set(data.test_g.flatten().tolist()) == {0, 1, 2, 4, 5, 6, 8, 9}
    assert data.forget_names == ["3", "7"]
    assert data.part_size == 8


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--method ort", True),
        ("--method obt", True),
        ("--method obt --no-uniform-t", False),
        ("--method obt --log-sigma 0 0.7", False),
        ("--method erasediff", False),
        ("", False),
    ],
)
def test_the_papers_losses_have_the_papers_noise_levels(tmp_path, flags, expected):
    argv = ["--forget", "3", *flags.split(), "--device", "cpu", "--out", str(tmp_path)]
    assert load_script("03")["arguments"](argv).uniform_t is expected
