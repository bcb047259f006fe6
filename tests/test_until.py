"""03 --until: it stops when it has forgotten and not before, and pushes no harder than it must.

The controller, `steer`, is tried on a simulated model first: what a push does to UR and to a kept
class is given there, and nothing is trained.
"""

import inspect
import types

import numpy as np
import pytest
import torch
from conftest import (
    check_refusal,
    check_success,
    crash_in_training,
    load_script,
    load_weights,
    only_run,
    read_json,
    run_script,
    same_weights,
    write_small_base,
)

import common

NUM_CLASSES = 10
FORGET = [3]
FRAGILE = 5  # the kept class that pays for the forgetting


@pytest.fixture(scope="module")
def unlearn(tmp_path_factory):
    """The names of 03_unlearn.py, and `out`, a folder for --out."""
    return types.SimpleNamespace(**load_script("03"), out=tmp_path_factory.mktemp("until"))


# ---- a simulated model ---------------------------------------------------------------------------


class Simulated:
    """A model of which three numbers are known: UR, what is left of a class, and what is unsure.

    ease     how far a push comes in the end: UR is then 10 % exp(-ease kappa)
    harm     and exp(-harm kappa^2) of the class is left
    pace     which part of the way there 50 steps go
    chatter  part of the samples of which the judge becomes unsure in the end, for each kappa
    seed     of the samples

    Runs of obt-rel that forget the 3 (assets/tables.json) have an ease of about 1.6, a harm of .03.
    """

    def __init__(self, ease, harm, pace=0.3, chatter=0.0, seed=0):
        self.ease = ease
        self.harm = harm
        self.pace = pace
        self.chatter = chatter
        self.seed = seed
        self.steps = 0
        self.ur = 10.0  # in percent
        self.kept = 1.0
        self.unsure = 0.1
        self.generator = np.random.default_rng(seed)

    def train(self, kappa):
        """Train 50 steps with a push."""
        self.steps += 50
        self.ur *= (10 / self.ur * np.exp(-self.ease * kappa)) ** self.pace
        self.kept *= (np.exp(-self.harm * kappa**2) / self.kept) ** self.pace
        self.unsure += self.pace * (0.1 + self.chatter * kappa - self.unsure)

    def look(self, num_looks, n=250):
        """Draw samples and count them, as `look` of 03 does.

        Most samples are of the same class as the Standard model's. Some change by chance.
        """
        batch = num_looks % 4
        before = np.random.default_rng([self.seed, batch]).integers(NUM_CLASSES, size=n)
        after = before.copy()
        chance = self.generator.random(n)
        goes = (before == FORGET[0]) & (chance > self.ur / 10)
        goes |= (before == FRAGILE) & (chance > self.kept)
        goes |= (before != FORGET[0]) & (chance < 0.05)
        others = np.setdiff1d(np.arange(NUM_CLASSES), FORGET)
        after[goes] = self.generator.choice(others, goes.sum())
        return {
            "step": self.steps,
            "batch": batch,
            "counts": np.bincount(after, minlength=NUM_CLASSES).tolist(),
            "unsure": int((self.generator.random(n) < self.unsure).sum()),
            "before": {
                "counts": np.bincount(before, minlength=NUM_CLASSES).tolist(),
                "unsure": n // 10,
            },
        }


def simulate(unlearn, model, kappa=2.4, wish=1.0, max_steps=1000):
    """Let `steer` train a Simulated as 03 does -> (decision, kappa of each 50 steps)."""
    looks = []
    kappas = []
    while model.steps < max_steps:
        kappas.append(kappa)
        model.train(kappa)
        decision = "look again"
        while decision == "look again":
            looks.append(model.look(len(looks)))
            kappa, decision = unlearn.steer(kappa, looks, FORGET, wish)
        if decision == "stop":
            break
    return decision, kappas


MODELS = {
    "easy": {"ease": 2.2, "harm": 0.01},
    "slow": {"ease": 2.2, "harm": 0.01, "pace": 0.1},
    "stubborn": {"ease": 0.9, "harm": 0.01},
    # The first push takes away more than a quarter of the class; a gentler one leaves most of it.
    "fragile": {"ease": 2.4, "harm": 0.08},
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", MODELS)
def test_it_comes_to_the_wish_and_keeps_the_rest(unlearn, name, seed):
    model = Simulated(**MODELS[name], seed=seed)
    decision, _ = simulate(unlearn, model)
    assert decision == "stop"
    assert model.ur < 1.0
    assert model.kept > 0.7


def test_it_takes_no_more_steps_than_it_must(unlearn):
    steps = {}
    for name in ("easy", "slow"):
        model = Simulated(**MODELS[name])
        simulate(unlearn, model)
        steps[name] = model.steps
    assert steps["easy"] <= 300
    assert steps["slow"] > steps["easy"]


def test_a_stubborn_model_is_pushed_harder_and_a_fragile_one_less(unlearn):
    _, kappas = simulate(unlearn, Simulated(**MODELS["stubborn"]))
    assert kappas[-1] > 1.3 * kappas[0]
    _, kappas = simulate(unlearn, Simulated(**MODELS["fragile"]))
    assert kappas[-1] < kappas[0]


def test_a_model_that_becomes_rubbish_is_pushed_less(unlearn):
    _, kappas = simulate(unlearn, Simulated(ease=1.0, harm=0.0, chatter=0.2), max_steps=400)
    assert kappas[-1] < kappas[0]


def test_the_push_never_shrinks_to_that_of_the_standard_model(unlearn):
    """With distill as L_g a kappa of 1 pushes nowhere, and the class would come back."""
    looks = [seen(50 * (i + 1), 8, fragile=15) for i in range(4)]
    assert unlearn.steer(1.25, looks, FORGET, 1.0) == (1.2, "go on")


@pytest.mark.parametrize("seed", range(10))
def test_a_model_that_cannot_forget_is_not_taken_for_one_that_has(unlearn, seed):
    """2 % remain: now and then none of 250 samples is one, but never so few of 1,000."""
    model = Simulated(ease=0.0, harm=0.0, pace=0.0, seed=seed)
    model.ur = 2.0
    decision, _ = simulate(unlearn, model)
    assert decision == "go on"
    assert model.steps == 1000


@pytest.mark.parametrize("seed", range(5))
def test_forgetting_that_costs_a_class_is_no_success(unlearn, seed):
    """Whatever the push, the class goes before UR is down."""
    model = Simulated(ease=1.0, harm=0.3, seed=seed)
    decision, _ = simulate(unlearn, model)
    assert decision == "go on"


# ---- the controller ------------------------------------------------------------------------------


def seen(step, forgotten, fragile=25, unsure=25, batch=0):
    """A look at 250 samples, of which so many show the class to forget, and a kept one."""
    counts = [25] * NUM_CLASSES
    before = {"counts": list(counts), "unsure": 25}
    counts[3] = forgotten
    counts[FRAGILE] = fragile
    counts[0] += 250 - sum(counts)
    return {"step": step, "batch": batch, "counts": counts, "unsure": unsure, "before": before}


def test_none_of_one_look_is_no_reason_to_stop(unlearn):
    """It takes four looks, all at one model."""
    looks = [seen(50, 0)]
    for _ in range(3):
        assert unlearn.steer(2.0, looks, FORGET, 1.0) == (2.0, "look again")
        looks.append(seen(50, 0))
    assert unlearn.steer(2.0, looks, FORGET, 1.0) == (2.0, "stop")


def test_four_looks_at_four_models_are_no_reason_to_stop(unlearn):
    looks = [seen(step, 0) for step in (50, 100, 150, 200)]
    assert unlearn.steer(2.0, looks, FORGET, 1.0)[1] == "look again"


@pytest.mark.parametrize("counts, decision", [((0, 2, 1, 2), "stop"), ((0, 2, 2, 2), "go on")])
def test_the_aim_is_half_of_the_wish(unlearn, counts, decision):
    """5 of 1,000 are 0.5 %."""
    looks = [seen(50, forgotten) for forgotten in counts]
    assert unlearn.steer(2.0, looks, FORGET, 1.0)[1] == decision


@pytest.mark.parametrize(
    "counts, factor",
    [
        ((20, 10, 5, 3), 1),  # it falls by itself
        ((8, 8, 8, 8), 1.15),
        ((2, 2, 2, 2), 1.06),  # 0.8 % are only 0.3 above the aim
        ((8, 8), 1),  # too early to say
    ],
)
def test_the_push_grows_while_ur_does_not_fall_and_most_far_from_the_aim(unlearn, counts, factor):
    looks = [seen(50 * (i + 1), forgotten) for i, forgotten in enumerate(counts)]
    kappa, decision = unlearn.steer(2.0, looks, FORGET, 1.0)
    assert kappa == pytest.approx(2.0 * factor)
    assert decision == "go on"


@pytest.mark.parametrize("harm", [{"fragile": 15}, {"unsure": 60}])
def test_the_push_shrinks_when_the_rest_suffers_even_if_ur_is_too_high(unlearn, harm):
    looks = [seen(50 * (i + 1), 8, **harm) for i in range(4)]
    assert unlearn.steer(2.0, looks, FORGET, 1.0) == (1.7, "go on")


def test_a_class_that_seems_to_suffer_in_one_look_changes_nothing(unlearn):
    """25 samples of a class are 15 now and then by chance alone."""
    looks = [seen(50 * (i + 1), 8 - 3 * i, fragile=15) for i in range(2)]
    assert unlearn.steer(2.0, looks, FORGET, 1.0) == (2.0, "go on")


def test_a_student_can_read_it(unlearn):
    assert len(inspect.getsource(unlearn.steer).splitlines()) <= 40


def test_the_figures_of_looks_are_those_of_the_measures(unlearn):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, NUM_CLASSES, (2, 400), generator=generator)
    confidence = torch.rand(2, 400, generator=generator)
    verdicts = []
    for k in range(2):
        features = torch.zeros(400, 2, dtype=torch.float64)
        verdicts.append(common.Verdict(labels[k], confidence[k], features, torch.zeros(400)))
    after, before = verdicts
    row = common.measure(after, [3, 7], after, NUM_CLASSES, before)
    counts = [torch.bincount(label, minlength=NUM_CLASSES).tolist() for label in labels]
    unsure = (confidence < common.SURE).sum(1).tolist()
    whole = {"counts": counts[0], "unsure": unsure[0]}
    whole["before"] = {"counts": counts[1], "unsure": unsure[1]}
    figures = unlearn.pool([whole], [3, 7])
    assert figures["num"] == 400
    assert figures["ur"] == pytest.approx(row["ur"])
    assert figures["unsure"] == pytest.approx(row["low_confidence"])
    assert figures["worst"] == pytest.approx(row["class_min_ratio"])


def test_a_class_that_is_hardly_drawn_says_nothing(unlearn):
    one = seen(50, 0)
    one["before"]["counts"][8] = 19
    one["counts"][8] = 0
    assert unlearn.pool([one], FORGET)["worst_class"] != 8


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, []),
        ({"forgotten": 5}, ["UR 2.00 %, and not 1 %"]),
        ({"fragile": 10}, ["of 'five' ", "% are left"]),
        ({"unsure": 100}, ["unsure of 40.0 %, before of 10.0 %"]),
    ],
)
def test_what_stood_in_the_way_is_said_in_words(unlearn, changes, words):
    figures = unlearn.pool([seen(50, **{"forgotten": 0, **changes})], FORGET)
    names = "zero one two three four five six seven eight nine".split()
    texts = unlearn.say_missed(figures, 1.0, names)
    assert len(texts) == bool(changes)
    for word in words:
        assert word in texts[0]


@pytest.mark.parametrize("fragile, num_texts", [(160, 0), (130, 1)])
def test_the_end_forgives_what_chance_can_take_of_a_class(unlearn, fragile, num_texts):
    """Of 200 samples of a class 160 are 73 % of it here, as the other classes got the 3s."""
    after = [220] * NUM_CLASSES
    after[3] = 0
    after[FRAGILE] = fragile
    result = {
        "n": 2000,
        "class_counts": {"before": [200] * NUM_CLASSES, "after": after},
        "low_confidence_before": 10.0,
        "low_confidence_after": 10.0,
    }
    args = arguments(unlearn, "--until", 1)
    assert len(unlearn.not_reached(args, make_data(unlearn), result)) == num_texts


def test_the_guess_of_the_time_follows_the_fall(unlearn):
    history = [{"step": 50, "ur": 8.0, "ur_before": 16.0}, {"step": 100, "ur": 4.0}]
    assert unlearn.steps_to_aim(history, 1.0) == pytest.approx(100)
    # From 16 % it halved in 50 steps, and 8 is halved three times.
    assert unlearn.steps_to_aim(history[:1], 1.0) == pytest.approx(150)
    assert unlearn.steps_to_aim(history[::-1], 1.0) == np.inf


# ---- the loop ------------------------------------------------------------------------------------

SHAPE = (1, 8, 8)
BRIGHT = 200


def arguments(unlearn, *flags):
    """What 03 makes of its flags."""
    argv = ["--forget", "3", "--device", "cpu", "--out", unlearn.out, *flags]
    return unlearn.arguments([str(value) for value in argv])


def make_data(unlearn):
    """90 images of D_g and 10 of D_f; one of ten in D_g is of the fragile class, and brighter."""
    images = torch.full((100, *SHAPE), 60, dtype=torch.uint8)
    images[:9] = BRIGHT
    return unlearn.Data(
        images=images,
        index_g=torch.arange(90),
        index_f=torch.arange(90, 100),
        labels_g=torch.tensor([FRAGILE] * 9 + [0] * 81),
        test_g=torch.zeros(90, *SHAPE, dtype=torch.uint8),
        forget_classes=FORGET,
        forget_names=["3"],
        class_names=[str(digit) for digit in range(NUM_CLASSES)],
        part_size=4,
        flip=False,
    )


class Watched:
    """A training whose looks are written down beforehand.

    forgotten  how many of 250 samples show the class at each look; the last one repeats
    """

    def __init__(self, unlearn, monkeypatch, forgotten, *flags, **harm):
        self.args = arguments(unlearn, "--quick", *flags)
        self.alphas = []
        self.averages = []  # the weights of the average at each look
        self.data = make_data(unlearn)
        torch.manual_seed(0)
        net = common.UNet(width=8, sd=0.6)
        self.model = unlearn.Model(
            net=net,
            base=common.UNet(width=8, sd=0.6),
            ema=common.EMA(net, 0.5),
            optimizers=[torch.optim.SGD(net.parameters(), 0.1)],
            sde=common.VP(),
            shape=SHAPE,
            course=unlearn.Course(unlearn.first_kappa(self.args)),
        )

        def record(args, net, *more):
            self.alphas.append(args.alpha)
            loss = sum((weight - 1).square().sum() for weight in net.parameters())
            return loss, loss, loss

        def look(args, data, model, judge):
            self.averages.append({k: w.clone() for k, w in model.ema.net.state_dict().items()})
            number = min(len(self.averages), len(forgotten)) - 1
            return seen(len(model.losses), forgotten[number], **harm)

        names = unlearn.train.__globals__
        monkeypatch.setitem(names, "objective", record)
        monkeypatch.setitem(names, "look", look)
        monkeypatch.setitem(names, "QUICK_CHECK", unlearn.Check(first=1, every=1, n=20, nfe=2))
        unlearn.set_alpha(self.args, self.data)
        path = unlearn.out / "x.resume.pt"
        self.losses = unlearn.train(self.args, self.data, self.model, path, common.CtrlC())


def test_the_training_ends_when_the_wish_is_reached(unlearn, monkeypatch):
    run = Watched(unlearn, monkeypatch, [20, 0], "--max-steps", 30)
    assert len(run.losses) < 10
    assert run.model.course.has_ended
    assert unlearn.saved_step(run.model) == len(run.losses)


def test_it_ends_at_max_steps_otherwise(unlearn, monkeypatch):
    run = Watched(unlearn, monkeypatch, [20], "--max-steps", 7)
    assert len(run.losses) == 7
    assert not run.model.course.has_ended


def test_what_is_saved_is_the_best_state_and_not_the_last(unlearn, monkeypatch):
    """Of the looks 4 to 7 the last has the lowest UR; then it rises for good."""
    run = Watched(unlearn, monkeypatch, [9, 9, 9, 5, 5, 5, 5, 40], "--max-steps", 10)
    assert unlearn.saved_step(run.model) == 7
    assert same_weights(run.model.ema.net.state_dict(), run.averages[6])
    assert not same_weights(run.averages[6], run.averages[-1])


def test_the_kappa_that_is_reported_is_that_of_the_saved_state(unlearn, monkeypatch):
    """UR falls little, so kappa grows at every look, the last one included."""
    run = Watched(unlearn, monkeypatch, [20], "--max-steps", 8)
    best = run.model.course.best
    assert best["step"] == 8
    assert best["kappa"] == run.model.course.history[-1]["kappa"] < run.model.course.kappa
    assert run.alphas[-1] == unlearn.alpha_of(best["kappa"], run.data)


def test_the_next_step_is_pushed_as_the_controller_says(unlearn, monkeypatch):
    """UR does not fall: kappa grows, and alpha with it."""
    run = Watched(unlearn, monkeypatch, [20], "--max-steps", 8)
    kappas = [now["kappa"] for now in run.model.course.history]
    assert kappas[0] < kappas[-1]
    assert run.alphas == [unlearn.alpha_of(kappa, run.data) for kappa in kappas]


def test_a_class_that_loses_is_seen_more_often(unlearn, monkeypatch):
    """Half of it is left: it counts twice after a look, and at most four times after more."""
    run = Watched(unlearn, monkeypatch, [20], "--max-steps", 1, fragile=12)
    shares = run.model.course.shares
    assert shares[FRAGILE] == pytest.approx(225 / 237 * 25 / 12, rel=0.1)
    assert shares[3] == 1.0, "what is to be forgotten is not kept"
    run = Watched(unlearn, monkeypatch, [20], "--max-steps", 5, fragile=12)
    assert run.model.course.shares[FRAGILE] == 4.0


@pytest.mark.parametrize("harm, expected", [({"fragile": 12}, 0.7**3), ({}, 1.0)])
def test_the_rate_falls_at_each_look_that_sees_harm(unlearn, monkeypatch, harm, expected):
    """Of six looks the first three are too few samples to tell."""
    run = Watched(unlearn, monkeypatch, [20], "--max-steps", 6, **harm)
    (group,) = run.model.optimizers[0].param_groups
    assert group["peak"] == pytest.approx(0.1 * expected)


def test_the_rate_falls_to_a_third_at_most(unlearn, monkeypatch):
    """Of twelve looks nine see harm, and 0.7^9 is far below a third."""
    run = Watched(unlearn, monkeypatch, [20], "--max-steps", 12, "--lr", 0.1, fragile=12)
    (group,) = run.model.optimizers[0].param_groups
    assert group["peak"] == pytest.approx(0.1 / 3)


def test_the_batch_of_l_g_follows_the_shares(unlearn, monkeypatch):
    run = Watched(unlearn, monkeypatch, [20], "--max-steps", 1)
    run.data.part_size = 4000
    run.model.course.shares = [1.0] * NUM_CLASSES
    run.model.course.shares[FRAGILE] = 4.0
    torch.manual_seed(0)
    batch = unlearn.draw_kept(run.data, run.model)
    is_bright = batch.flatten(1).mean(1) > BRIGHT / 128 - 1 - 0.01
    assert is_bright.double().mean() == pytest.approx(4 * 9 / (4 * 9 + 81), abs=0.03)
    run.model.course.shares = None
    is_bright = unlearn.draw_kept(run.data, run.model).flatten(1).mean(1) > BRIGHT / 128 - 1 - 0.01
    assert is_bright.double().mean() == pytest.approx(0.1, abs=0.02)


FIXED = {"--kappa 2": 2.0, "--alpha 0.7": None, "--method ort --until 1": None}


@pytest.mark.parametrize("flags", FIXED)
def test_a_strength_that_is_given_stays_and_so_does_the_stop(unlearn, monkeypatch, flags):
    run = Watched(unlearn, monkeypatch, [20], "--max-steps", 8, *flags.split())
    assert len(set(run.alphas)) == 1
    assert len(run.model.course.history) == 8
    if FIXED[flags]:
        assert run.alphas[0] == unlearn.alpha_of(FIXED[flags], run.data)
    run = Watched(unlearn, monkeypatch, [0], "--max-steps", 30, *flags.split())
    assert run.model.course.has_ended


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, until, steps, max_steps",
    [
        ("", 1.0, None, 1000),
        ("--until 0.5 --max-steps 300", 0.5, None, 300),
        ("--kappa 2", 1.0, None, 1000),
        ("--steps 260", None, 260, None),
        ("--method ort", None, 1500, None),
        ("--method unseen", None, 260, None),
        ("--method ort --until 2", 2.0, None, 1000),
        ("--method ort --from-scratch", None, 3000, None),
    ],
)
def test_a_run_has_a_wish_or_a_length(unlearn, flags, until, steps, max_steps):
    args = arguments(unlearn, *flags.split())
    assert (args.until, args.steps, args.max_steps) == (until, steps, max_steps)


def test_a_base_that_is_not_the_shipped_one_gets_a_gentle_rate(unlearn):
    assert arguments(unlearn).lr == 3e-3
    flags = ["--dataset", "cifar10", "--forget", "dog", "--out", str(unlearn.out)]
    assert unlearn.arguments(flags).lr == 1e-3


def test_a_fixed_length_has_the_usual_strength(unlearn):
    assert arguments(unlearn, "--steps", 260).kappa == 2.8
    assert arguments(unlearn, "--steps", 260, "--sde", "ve").kappa == 1.8
    assert arguments(unlearn).kappa is None
    assert unlearn.first_kappa(arguments(unlearn, "--kappa", 2)) is None


REFUSED = {
    "--until 1 --steps 5": "--max-steps",
    "--steps 5 --max-steps 9": "--max-steps has no part",
    "--method ort --max-steps 9": "--max-steps has no part",
    "--method ort --from-scratch --until 1": "leave out --from-scratch",
    "--until 0": "0 is out of range",
    "--until 101": "101 is out of range",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_makes_no_sense_is_one_line(unlearn, flags):
    argv = ("--forget", 3, *flags.split(), "--out", unlearn.out)
    check_refusal(run_script("03", *argv), REFUSED[flags])


# ---- whole runs ----------------------------------------------------------------------------------

# A network with random weights draws nothing but 8s in two evaluations.
NEVER = "--quick --forget 8 --batch-size 4 --max-steps 9 --n 20 --nfe 2".split()


@pytest.fixture(scope="module")
def never(tmp_path_factory):
    """A run that does not come to its wish: (how it ended, its --out)."""
    out = tmp_path_factory.mktemp("never")
    write_small_base(out)
    return run_script("03", *NEVER, "--out", out), out


def test_a_run_says_what_stood_in_the_way(never):
    run, out = never
    check_success(run)  # --quick shows that it runs, nobody expects it to forget
    result = read_json(only_run(out) / "result.json")
    assert result["not_reached"][0] == "UR 100.00 %, and not 1 %"
    assert "not reached: UR 100.00 %" in run.out
    assert "fresh noise" in run.out
    assert result["steps"] == 9
    assert result["seconds_of_looks"] < result["seconds_trained"] < result["seconds"]


def test_every_look_is_in_the_log_and_in_the_picture(never, monkeypatch):
    _, out = never
    lines = common.read_text(only_run(out) / "log.jsonl").splitlines()
    looks = [line for line in map(common.json.loads, lines) if "ur" in line]
    assert [line["step"] for line in looks] == [4, 8, 9]
    assert [line["ur"] for line in looks] == [100.0] * 3
    drawn = []
    monkeypatch.setattr(common, "draw_picture", lambda *_, **more: drawn.append(more))
    check_success(run_script("03", *NEVER, "--out", out, "--redraw"))
    assert drawn[-1]["history"] == looks
    assert drawn[-1]["wish"] == 1.0


@pytest.mark.parametrize("quick, status", [(True, 0), (False, 1)])
def test_the_status_says_whether_the_wish_was_reached(never, quick, status):
    _, out = never
    argv = [*NEVER, "--out", out, "--resume"]
    script = load_script("03")
    if not quick:
        finish = script["arguments"]

        def not_quick(argv):
            args = finish(argv)
            args.quick = False
            return args

        script["main"].__globals__.update(arguments=not_quick, refuse_other_run=lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        script["main"]([str(value) for value in argv])
    assert (stop.value.code or 0) == status


@pytest.mark.parametrize("step", [5, 9])
def test_a_run_that_was_stopped_ends_as_if_nothing_had_happened(never, tmp_path, monkeypatch, step):
    write_small_base(tmp_path)
    argv = [*NEVER, "--out", str(tmp_path)]
    crash_in_training(monkeypatch, step, *argv)
    check_success(run_script("03", *argv, "--resume"))
    _, whole = never
    files = [only_run(out) for out in (whole, tmp_path)]
    assert same_weights(*[load_weights(folder / "model.pt") for folder in files])
    logs = [(folder / "log.jsonl").read_bytes() for folder in files]
    assert logs[0] == logs[1]
    kappas = [read_json(folder / "result.json")["kappa"] for folder in files]
    assert kappas[0] == kappas[1]


def test_the_looks_have_noise_of_their_own(unlearn, tmp_path, monkeypatch):
    """The figures of the end must not come from noise by which the end was chosen."""
    write_small_base(tmp_path)
    noise = {}
    draw = common.randn

    def note(shape, generator, device="cpu"):
        seeds.append(generator.initial_seed())
        return draw(shape, generator, device)

    sample_images = common.sample_images

    def sample(*args, label, **more):
        seeds.clear()
        images = sample_images(*args, label=label, **more)
        noise.setdefault(label, set()).update(seeds)
        return images

    seeds = []
    monkeypatch.setattr(common, "randn", note)
    monkeypatch.setattr(common, "sample_images", sample)
    check_success(run_script("03", *NEVER, "--out", tmp_path))
    assert noise["samples before"] == noise["samples after"]
    assert len(noise[""]) == 12, "three batches of two halves, for the start and on the way"
    assert not noise[""] & noise["samples after"]
