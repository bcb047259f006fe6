"""tests/make_tables.py: it chooses by the rule it states, keeps what is done, interpolates right.

And its table: every kept command names every hyper-parameter, so that other defaults of 02 and 03
do not change what it means.
"""

import itertools
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, check_refusal, read_json, run_function

import common

RETAINS = ("dsm", "distill")
TABLE = ROOT / "assets" / "tables.json"
SCRIPT_NUMBERS = {"02_train_sde.py": "02", "03_unlearn.py": "03"}


def kept_commands():
    """The commands of 02 and 03 in assets/tables.json, {name of the run: command}."""
    commands = {name: entry["command"] for name, entry in read_json(TABLE).items()}
    # The other entries are measured by make_tables.py itself.
    return {name: commands[name] for name in commands if "make_tables" not in commands[name]}


COMMANDS = kept_commands()


def load_maker(folder):
    """The globals of make_tables.py, with its table and its runs in a folder."""
    space = runpy.run_path(str(ROOT / "tests/make_tables.py"))["run"].__globals__
    space["PLACES"].runs = folder / "runs"
    space["PLACES"].table = folder / "tables.json"
    return space


@pytest.fixture
def maker(tmp_path, monkeypatch):
    """The globals of make_tables.py; what it changes in common.py is put back afterwards."""
    monkeypatch.setattr(common, "sample_images", common.sample_images)
    monkeypatch.setattr(common, "load_net", common.load_net)
    (tmp_path / "runs").mkdir()
    return load_maker(tmp_path)


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """The same once for many tests, which only read commands."""
    return load_maker(tmp_path_factory.mktemp("speller"))


def result(ur, fd_after=1.0, fd_before=1.0):
    """What the choice of a weight reads of a run."""
    return {"ur_after": ur, "fd_after": fd_after, "fd_before": fd_before}


def value_of(argv, flag):
    """The last value that a command gives to a flag: the one that counts."""
    last = len(argv) - 1 - argv[::-1].index(flag)
    return argv[last + 1]


# ---- kept commands keep their meaning ------------------------------------------------------------


def split_command(command):
    """A command of the table -> (number of its script, its flags)."""
    _, script_name, *flags = command.split()
    return SCRIPT_NUMBERS[script_name], flags


def parse(speller, number, flags, folder):
    """The arguments that 02 or 03 makes of some flags, apart from where it writes."""
    args = vars(speller["load_script"](number)["arguments"]([*flags, "--out", str(folder)]))
    del args["out"]
    if args.get("uniform_t"):
        del args["log_sigma"]  # t is uniform: this is not read
    return args


def change_defaults_of_03(script, monkeypatch):
    """Give every method other defaults, of every flag that it has."""
    changed = {"steps": 7, "batch_size": 6, "lr": 0.5, "ema": 0.5, "n": 11, "nfe": 3}
    other_retain = {"dsm": "distill", "distill": "dsm"}
    for method, recipe in script["METHODS"].items():
        more = dict(changed)
        for weight in ("alpha", "kappa", "eta", "c"):
            if recipe.get(weight) is not None:
                more[weight] = 0.9 * recipe[weight]
        if method in script["BELONGS_TO"]["retain"]:
            more["retain"] = other_retain[recipe.get("retain", "dsm")]
        if method in script["BELONGS_TO"]["uniform_t"]:
            more["uniform_t"] = not recipe.get("uniform_t", False)
            more["log_sigma"] = (5.0, 6.0)
        monkeypatch.setitem(script["METHODS"], method, {**recipe, **more})


def change_defaults_of_02(monkeypatch):
    """Give MNIST another network, another training and other noise."""
    recipe = common.RECIPES["mnist"]
    changed = {
        "net": {**recipe["net"], "width": 8},
        "train": {"steps": 7, "batch_size": 6, "lr": 0.5, "ema": 0.5},
    }
    monkeypatch.setitem(common.RECIPES, "mnist", {**recipe, **changed})
    monkeypatch.setattr(common, "TRAINING_NOISE", {"mean": 5.0, "std": 6.0, "uniform": 0.7})


@pytest.fixture
def change_defaults(speller, monkeypatch):
    """A function that changes all defaults of 02 and 03, until the end of the test."""

    def change():
        change_defaults_of_03(speller["load_script"]("03"), monkeypatch)
        change_defaults_of_02(monkeypatch)

    return change


def test_the_table_has_the_commands_that_are_tested_here():
    assert len(COMMANDS) > 100
    assert {split_command(command)[0] for command in COMMANDS.values()} == {"02", "03"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kept_command_is_spelled_out(speller, name):
    """It names every hyper-parameter in the usual order: spelling it out changes nothing."""
    number, flags = split_command(COMMANDS[name])
    where = flags[flags.index("--out") :] if "--out" in flags else []
    assert speller["spell_out"](flags, number) + where == flags


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kept_command_means_the_same_with_other_defaults(
    speller, change_defaults, tmp_path, name
):
    number, flags = split_command(COMMANDS[name])
    before = parse(speller, number, flags, tmp_path)
    change_defaults()
    after = parse(speller, number, flags, tmp_path)
    left_open = [key for key in before if after[key] != before[key]]
    assert not left_open, f"{COMMANDS[name]} does not name {left_open}"


@pytest.mark.parametrize(
    "number, short",
    [
        ("02", "--dataset mnist"),
        ("03", "--dataset mnist --forget 3"),
        ("03", "--dataset mnist --forget 3 --method ort --from-scratch"),
        ("03", "--dataset mnist --forget 3 --method siss --seed 2"),
    ],
)
def test_the_defaults_of_these_tests_are_really_other_ones(speller, change_defaults, number, short):
    """Otherwise the test above would say nothing: a short command must not keep its meaning."""
    before = speller["spell_out"](short.split(), number)
    change_defaults()
    assert speller["spell_out"](short.split(), number) != before


@pytest.mark.parametrize(
    "method", ["obt-rel", "obt", "ort", "ascent", "erasediff", "siss", "unseen"]
)
def test_kept_runs_are_found_with_other_defaults(speller, change_defaults, monkeypatch, method):
    """make_tables.py builds the commands of a search by itself, and not from defaults of 03."""
    monkeypatch.setattr(speller["PLACES"], "table", TABLE)
    before = speller["choose"](method, dry="look")
    change_defaults()
    assert before is not None
    assert speller["choose"](method, dry="look") == before


@pytest.mark.parametrize("number, short", [("02", ""), ("03", "--forget 3")])
def test_no_argument_is_overlooked(speller, tmp_path, number, short):
    """A new flag of 02 or 03 has to be put into HYPER_PARAMETERS, or here."""
    args = parse(speller, number, short.split(), tmp_path)
    elsewhere = {
        "02": {
            "device",
            "cache_dir",
            "overwrite",
            "resume",
            "save_every",
            "sample_every",
            "judge",
            "measure",
            "n",
        },
        "03": {"device", "cache_dir", "overwrite", "redraw", "resume", "animate"},
    }
    assert set(args) == set(speller["HYPER_PARAMETERS"][number]) | elsewhere[number]


@pytest.mark.parametrize(
    "short, words",
    [
        ("", "--method obt-rel --sde vp"),
        ("", "--retain distill --no-uniform-t --log-sigma 0.0 0.7 --ema 0.98 --n 2000 --nfe 20"),
        ("--sde ddpm", "--nfe 50"),
        ("--method ort", "--ort elementwise --retain dsm"),
        ("--method obt --uniform-t", "--uniform-t --ema"),
        ("--method siss --c 0.01", "--c 0.01 --ema"),
        ("--method obt --grad-accum 2", "--seed 0 --grad-accum 2"),
    ],
)
def test_spell_out_names_what_is_left_open(speller, short, words):
    argv = ["--dataset", "mnist", "--forget", 3, *short.split()]
    assert f" {words} " in f" {' '.join(speller['spell_out'](argv))} "


def test_a_split_into_one_part_is_not_named(speller):
    argv = ["--forget", 3, "--method", "obt", "--grad-accum", 1]
    assert "--grad-accum" not in speller["spell_out"](argv)


# ---- running and keeping -------------------------------------------------------------------------


def test_a_finished_run_is_kept_and_not_repeated(maker, tmp_path, capsys):
    argv = ("--forget", 3, "--method", "unseen", "--n", 10, "--nfe", 2)
    maker["save_time"]()
    first = maker["run"]("group/one", *argv, quick=True)

    entry = read_json(tmp_path / "tables.json")["group/one"]
    assert entry["ur_after"] == first["ur_after"]
    assert "03_unlearn.py --dataset mnist --forget 3" in entry["command"]
    assert first["command"] == entry["command"]
    # The Standard model's samples are kept too.
    assert len(list((tmp_path / "runs").glob("before-*.pt"))) == 1

    maker["execute"] = None  # a second run would need it
    assert maker["run"]("group/one", *argv, dry="look") == first
    other_flags = maker["run"]("group/one", *argv, "--lr", 1e-3, dry="look")
    assert other_flags is None, "under this name, but not with these flags"
    assert maker["run"]("group/one", *argv, quick=True) == first
    assert "done    group/one" in capsys.readouterr().out


def test_a_model_whose_file_is_gone_is_made_again(maker, tmp_path):
    """It has the same weights though it drew fewer samples, and the table stays as it was."""
    argv = ("--forget", 3, "--method", "unseen", "--n", 12, "--nfe", 2)
    maker["run"]("group/one", *argv, quick=True)
    table = (tmp_path / "tables.json").read_bytes()
    net = maker["network"]("group/one")
    shutil.rmtree(tmp_path / "runs/group-one")
    again = maker["network"]("group/one")
    for weight, weight_again in zip(net.parameters(), again.parameters()):
        assert torch.equal(weight, weight_again)
    assert (tmp_path / "tables.json").read_bytes() == table

    base = maker["network"]("standard")
    pairs = zip(base.parameters(), again.parameters())
    assert any(not torch.equal(weight, weight_again) for weight, weight_again in pairs)


def test_likelihood_and_noise_measure_the_chosen_models(maker, tmp_path):
    """Of the Standard model and of the runs that were chosen, each once."""
    choice = maker["Choice"]("unseen", ("--lr", 1e-3), best=None, reached=False)

    def only_unseen(method, dry=False):
        return choice if method == "unseen" else None

    def random_images(n, forget=(3,)):
        generator = common.rng(0)
        return torch.rand(2, n, 1, 28, 28, generator=generator) * 2 - 1

    maker.update(choose=only_unseen, choose_ve=only_unseen, test_images=random_images)
    for name in ("ve/3/unseen/None", "vp/unseen/None/lr-0.001"):
        argv = ("--forget", 3, "--method", "unseen", "--n", 10, "--nfe", 2)
        maker["run"](name, *argv, quick=True)

    for _ in range(2):
        maker["group_nll"](quick=True)
        maker["group_noise"](quick=True)
        maker["network"] = None  # what is kept is not measured again
    table = maker["load"]()
    measured = {name for name in table if name.startswith("n")}
    expected = {"nll/standard", "nll/unseen/None", "noise/standard", "noise/unseen/None"}
    assert measured == expected
    assert table["nll/standard"]["bpd_g"] != table["nll/unseen/None"]["bpd_g"]

    # 02 is the authority for the losses by noise level.
    net = maker["load_standard"]()
    _, images_f = random_images(4)
    loss_by_noise = runpy.run_path(str(ROOT / "02_train_sde.py"))["loss_by_noise"]
    want = [loss for _, _, loss in loss_by_noise(net, images_f)]
    got = [loss for _, _, loss in table["noise/standard"]["f"]]
    assert got == pytest.approx(want, rel=1e-4)


def leave_a_run(folder):
    """Write what a finished run of 03 leaves, with result.json as the text "1"."""
    place = Path(folder) / "mnist/forget-3/unseen-vp"
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").write_text("1")
    (place / "model.pt").write_text("weights")


def test_a_run_that_was_stopped_goes_on(maker, tmp_path):
    """What another command has left is no beginning of this one."""
    calls = []

    def main(argv):
        calls.append("--resume" in argv)
        folder = Path(value_of(argv, "--out"))
        if len(calls) < 3:
            (folder / "unseen-vp.resume.pt").touch()
            raise KeyboardInterrupt
        leave_a_run(folder)

    def load_script(number):
        return {"main": main}

    maker["load_script"] = load_script
    for steps in (4, 5):
        with pytest.raises(KeyboardInterrupt):
            maker["execute"]("group/one", f"python 03_unlearn.py --steps {steps}")
    assert calls == [False, False]
    path = maker["execute"]("group/one", "python 03_unlearn.py --steps 5")
    assert calls == [False, False, True]
    assert maker["execute"]("group/one", "python 03_unlearn.py --steps 5") == path
    assert len(calls) == 3, "it was finished"


def test_a_run_whose_entry_is_taken_out_is_made_again(maker, tmp_path):
    argv = ("--forget", 3, "--method", "unseen", "--n", 10, "--nfe", 2)

    def figures(net):
        return {"width": net.arch["width"]}

    more = {"figures": figures, "quick": True}
    first = maker["run"]("group/one", *argv, **more)
    assert first["width"] == maker["load_standard"]().arch["width"]
    (tmp_path / "tables.json").unlink()
    again = maker["run"]("group/one", *argv, **more)
    assert again["seconds"] != first["seconds"]
    assert again["fd_after"] == pytest.approx(first["fd_after"], rel=1e-6)


# ---- the paper's losses, given their time --------------------------------------------------------

STANDARD_BITS = {"bpd_g": 1.0, "bpd_f": 1.5}


def paper_result(rise_g, rise_f, fd):
    """What the choice of alpha reads of a run."""
    return {"bpd_g": 1.0 + rise_g, "bpd_f": 1.5 + rise_f, "fd_after": fd}


@pytest.mark.parametrize(
    "found, expected",
    [
        # Two forget and keep: the one of lower FD.
        (
            {0.9: paper_result(1, 6, 3), 0.7: paper_result(1, 9, 2), 0.5: paper_result(2, 20, 1)},
            0.7,
        ),
        # None forgets enough: the one that forgets most of those that keep.
        ({0.9: paper_result(0, 1, 1), 0.7: paper_result(1, 4, 9), 0.5: paper_result(2, 9, 1)}, 0.7),
        # None keeps: the one that keeps most.
        ({0.9: paper_result(3, 9, 2), 0.5: paper_result(2, 1, 9)}, 0.5),
        # One has broken down.
        ({0.9: paper_result(math.nan, math.inf, 0), 0.5: paper_result(0, 1, 9)}, 0.5),
        ({0.9: paper_result(math.nan, math.nan, 0)}, None),
    ],
)
def test_alpha_is_chosen_by_likelihood_and_then_by_fd(maker, found, expected):
    assert maker["best_paper_alpha"](found, STANDARD_BITS) == expected


@pytest.fixture
def paper_world(maker):
    """make_tables.py in a world where alpha 0.9 is best: ({name: its flags}, the globals)."""
    asked = {}

    def run(name, *argv, figures=None, quick=False, dry=False):
        asked[name] = [str(value) for value in argv]
        alpha = float(value_of(asked[name], "--alpha")) if "--alpha" in argv else 1.0
        return paper_result(0, 6 if alpha < 0.99 else 1, abs(alpha - 0.9))

    def run_standard(name, steps, sde, more, figures, **how):
        asked[name] = ["--sde", sde, "--steps", str(steps), *more]

    maker.update(run=run, run_standard=run_standard, measure_shipped=lambda **how: None)
    maker.update(load=lambda: {"paper/standard": STANDARD_BITS})
    return asked, maker


def test_the_paper_group_runs_every_row_with_the_alpha_of_its_walk(paper_world):
    asked, maker = paper_world
    maker["group_paper"](("3",))
    rows = {name: argv for name, argv in asked.items() if not name.startswith("paper/walk/")}
    labels = [f"{method}/{retain}" for method, retain in itertools.product(("ort", "obt"), RETAINS)]
    expected = {f"paper/3/{label}/1500" for label in labels}
    expected |= {f"paper/3/{label}/5000" for label in labels}
    baselines = ("erasediff", "unseen", "obt-rel", "obt-rel/uniform-t")
    assert set(rows) == expected | {f"paper/3/{label}/1500" for label in baselines}
    for name, argv in rows.items():
        assert value_of(argv, "--steps") == name.rsplit("/", 1)[1], name
        assert value_of(argv, "--sde") == "ve", name
        assert value_of(argv, "--lr") == "0.001", name
        if name in expected:
            assert value_of(argv, "--alpha") == "0.9", name
            assert value_of(argv, "--retain") == name.split("/")[3], name
            assert "--uniform-t" in argv, name
    assert "--uniform-t" not in rows["paper/3/obt-rel/1500"]


def test_the_walk_takes_500_steps_a_point(paper_world):
    asked, maker = paper_world
    maker["group_paper"](("walk",))
    assert {value_of(argv, "--steps") for argv in asked.values()} == {"500"}


def test_the_long_runs_of_the_paper_group_and_no_others_compute_in_bfloat16(paper_world):
    asked, maker = paper_world
    maker["group_paper"](("walk", "3", "scratch", "7", "vp", "more"))
    for name, argv in asked.items():
        assert ("--bf16" in argv) == (not name.startswith("paper/walk/")), name


def test_the_walk_goes_one_point_beyond_the_first_that_forgets(paper_world):
    """In this world 0.99 does not forget and all others do; 0.7 and 0.5 would only push harder."""
    asked, maker = paper_world
    maker["group_paper"](("walk",))
    assert {value_of(argv, "--alpha") for argv in asked.values()} == {"0.99", "0.95", "0.9"}
    assert len(asked) == 3 * 2 * 2


@pytest.mark.parametrize(
    "found, is_over",
    [
        ([paper_result(0, 1, 1), paper_result(0, 2, 1)], False),
        ([paper_result(0, 6, 1)], False),
        ([paper_result(0, 6, 1), paper_result(2, 9, 1)], True),
        ([paper_result(2, 1, 1), paper_result(math.nan, math.nan, 1)], True),
    ],
)
def test_the_walk_is_over_after_two_runs_that_forget_or_have_lost_d_g(maker, found, is_over):
    assert maker["walk_is_over"](dict(enumerate(found)), STANDARD_BITS) == is_over


def test_from_scratch_has_10000_steps_and_score_matching(paper_world):
    asked, maker = paper_world
    maker["group_paper"](("scratch",))
    rows = {name.split("/")[2]: argv for name, argv in asked.items() if "/scratch/" in name}
    assert set(rows) == {"standard", "unseen", "ort", "obt"}
    for method, argv in rows.items():
        assert value_of(argv, "--steps") == "10000", method
        if method != "standard":
            assert "--from-scratch" in argv, method
            assert "distill" not in argv, method


@pytest.mark.parametrize(
    "row, sde, classes", [("7", "ve", ["7"]), ("3-7", "ve", ["3", "7"]), ("vp", "vp", ["3"])]
)
def test_other_rows_of_the_paper_group(paper_world, row, sde, classes):
    asked, maker = paper_world
    maker["group_paper"]((row,))
    rows = {name: argv for name, argv in asked.items() if name.startswith(f"paper/{row}/")}
    assert len(rows) == 4 + 4
    for name, argv in rows.items():
        assert value_of(argv, "--sde") == sde, name
        first = argv.index("--forget") + 1
        assert argv[first : argv.index("--method")] == classes, name


def test_angles_of_a_score_that_is_turned_round_and_three_times_too_long(maker):
    """Images of 0: the noisy image is sigma z, so the network knows z."""

    def z_hat(x_hat, sigma):
        return -3 * x_hat / common.expand_like(sigma, x_hat)

    net = common.ExactNet(z_hat, 0.5)
    rows = maker["angle_rows"](net, torch.zeros(3, 1, 4, 4), [0.5, 2.0])
    for row, sigma in zip(rows, (0.5, 2.0)):
        assert row == pytest.approx([sigma, -1, 3], rel=1e-4)


def test_angles_of_the_exact_score_of_one_image(maker):
    """Data that is one point: the score is exactly the data score."""
    x0 = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)

    def z_hat(x_hat, sigma):
        return (x_hat - x0) / common.expand_like(sigma, x_hat)

    ((_, cosine, ratio),) = maker["angle_rows"](common.ExactNet(z_hat, 0.5), x0, [0.3])
    assert (cosine, ratio) == pytest.approx((1, 1), abs=1e-3)


def test_the_paper_table_has_the_poster_beside_it(maker):
    run = {
        "ur_before": 10.6,
        "ur_after": 3.0,
        "ur_interval": [2.3, 3.9],
        "ur_no_noise_after": 1.25,
        "fd_before": 0.5,
        "fd_after": 4.0,
        "low_confidence_after": 22.0,
        "class_min_ratio": 0.8,
        "instead_other": 40.0,
        "instead_unsure": 30.0,
        "instead_noise": 25.0,
        "instead_forgotten": 5.0,
        "bpd_g": 1.6,
        "bpd_f": 13.7,
        "seconds": 900.2,
    }
    rows = {"standard": {"bpd_g": 1.34, "bpd_f": 1.39}, "3/ort/dsm/1500": run}
    rows |= {"walk/ort/dsm/0.9": run, "7/ort/dsm/1500": run}
    _, _, standard, ort, walk, seven = maker["paper_lines"](rows)
    assert standard.endswith("| 1.34 / 1.39 |  | 11.0, 2.82 / 2.78 |")
    assert ort == (
        "| 3/ort/dsm/1500 | 10.60 to 3.00 (2.3-3.9) | 1.25 | x8.00 | 22.0 | 0.80 "
        "| 40 / 30 / 25 / 5 | 1.60 / 13.70 | 900 | 0.4, 3.92 / 13.23 |"
    )
    assert walk.endswith("| 0.4, 3.92 / 13.23 |"), "the walk forgets the 3 too"
    assert seven.endswith("| 0.8 |"), "the poster's likelihoods are no figures of the 7"
    assert {line.count("|") for line in maker["paper_lines"](rows)} == {11}


# ---- choosing a weight ---------------------------------------------------------------------------


def test_choose_takes_the_best_rate_noise_and_weight(maker):
    """In a made-up world lr 3e-4 and the paper's noise are best, alpha 0.8 is nearest to UR 1 %."""
    asked = []

    def run(name, *argv, quick=False, dry=False):
        asked.append(name)
        fd = 1 + abs(math.log(value_of(argv, "--lr") / 3e-4))
        if "--uniform-t" not in argv:
            fd += 0.2
        if "distill" in argv:
            fd += 0.5
        ur = {0.95: 4.0, 0.9: 2.0, 0.8: 0.9}[value_of(argv, "--alpha")]
        return result(ur, fd)

    maker["run"] = run
    choice = maker["choose"]("obt")
    assert choice.best == 0.8
    assert "--uniform-t" in choice.flags
    assert "distill" not in choice.flags
    assert value_of(choice.flags, "--lr") == 3e-4
    # Learning rates, noise, retain loss, and the two other weights.
    assert len(set(asked)) == 3 + 1 + 1 + 2


@pytest.mark.parametrize("seeds_pass, order", [(2.2, [2.5, 2.0]), (2.7, [2.5, 3.0])])
def test_each_seed_walks_until_one_percent_lies_between_two(maker, seeds_pass, order):
    """Seed 0 chose kappa 2.5; the other seeds start there and go towards UR 1 %.

    In this made-up world UR falls below 1 % at the weight `seeds_pass`.
    """
    asked = []

    def run(name, *argv, **how):
        weight = value_of(argv, "--kappa")
        asked.append((weight, value_of(argv, "--seed")))
        return result(1.5 ** (4 * (seeds_pass - weight)))

    choice = maker["Choice"]("obt-rel", ("--lr", 1e-3), best=2.5, reached=True)
    maker.update(run=run, choose=lambda method, **how: choice)
    maker["group_vp"](("obt-rel",))
    assert asked == [(weight, 1) for weight in order] + [(weight, 2) for weight in order]


def test_a_method_that_does_not_come_to_one_percent_has_one_run_a_seed(maker):
    asked = []

    def run(name, *argv, **how):
        asked.append((value_of(argv, "--kappa"), value_of(argv, "--seed")))
        return result(0.5)

    choice = maker["Choice"]("obt-rel", ("--lr", 1e-3), best=2.5, reached=False)
    maker.update(run=run, choose=lambda method, **how: choice)
    maker["group_vp"](("obt-rel",))
    assert asked == [(2.5, 1), (2.5, 2)]


@pytest.mark.parametrize(
    "passes, order",
    [
        (1.8, [2.5, 2.0, 1.7]),
        (2.75, [2.5, 3.0]),
        (0.1, [2.5, 2.0, 1.7, 1.4, 1.2]),
        (9.0, [2.5, 3.0, 3.5, 4.0]),
    ],
)
def test_long_runs_stop_at_the_first_pair_around_one_percent(maker, passes, order):
    """In a made-up world UR falls below 1 % at the weight `passes`.

    The walk goes from the chosen weight towards it and no further; then come two seeds there.
    """
    asked = []

    def run(name, *argv, **how):
        weight = float(value_of(argv, "--kappa"))
        asked.append((weight, "--seed" in argv))
        return result(1.5 ** (4 * (passes - weight)))

    choice = maker["Choice"]("obt-rel", ("--lr", 1e-3), best=2.5, reached=True)
    maker.update(run=run, chosen=lambda method: choice)
    maker["group_long"](("obt-rel",))
    seeded = [weight for weight, has_seed in asked if has_seed]
    assert [weight for weight, has_seed in asked if not has_seed] == order
    assert len(set(seeded)) == 1
    assert len(seeded) == 2


def test_walk_ends_where_the_network_breaks_down(maker):
    """UR 4 %, then 7 % at the stronger weight: no further.

    Neither comes near 1 %, so the cheaper one of the two is taken.
    """
    world = {0.9: (6.0, 2.0), 0.8: (4.0, 2.2), 0.7: (7.0, 9.0), 0.5: (1.5, 80.0)}
    found = maker["walk"]("obt", 0.9, lambda weight: result(*world[weight]))
    assert list(found) == [0.9, 0.8, 0.7]
    assert maker["nearest"](found) == 0.8


# ---- FD at UR 1 %, and tables --------------------------------------------------------------------


@pytest.mark.parametrize(
    "points, expected",
    [
        ([(2.0, 1.0), (0.5, 4.0)], [2.0]),  # halfway, with both axes logarithmic
        ([(0.5, 4.0), (2.0, 1.0)], [2.0]),
        ([(4.0, 9.0), (1.0, 3.0), (0.1, 8.0)], [3.0]),  # one lies on it
        ([(2.0, 1.0), (0.5, 4.0), (5.0, 9.0)], [2.0]),  # a broken run is no neighbour of the first
        ([(4.0, 1.0), (2.0, 2.0)], []),
        ([(4.0, 1.0)], []),
    ],
)
def test_fd_at_one_percent(maker, points, expected):
    assert maker["fd_at_one_percent"](points) == pytest.approx(expected)


def test_each_seed_has_its_own_line_to_one_percent(maker):
    """Seed 0 crosses between kappa 2 and 2.5, seed 1 between 1.7 and 2, seed 2 not at all."""
    table = {
        "x/2.5": result(0.5, 8.0, fd_before=2.0),
        "x/2.0": result(2.0, 2.0, fd_before=2.0),
        "x/2.0/s1": result(0.5, 4.0, fd_before=2.0),
        "x/1.7/s1": result(2.0, 1.0, fd_before=2.0),
        "x/2.5/s2": result(0.4, 2.0, fd_before=2.0),
        "x/2.0/s2": result(0.9, 2.0, fd_before=2.0),
    }
    ratios = maker["at_one"](table, "obt-rel", lambda weight: f"x/{weight}")
    assert ratios == pytest.approx([2.0, 1.0])


def test_ve_table_shows_the_weight_found_with_standard_first(maker):
    """A method has one line, for the weight found, once it has all three sets of classes."""

    def ve_result(ur):
        return {
            "ur_before": 10.5,
            "fd_before": 0.5,
            "ur_after": ur,
            "ur_interval": [ur / 2, 2 * ur],
            "fd_after": 0.6,
            "class_min_ratio": 0.8,
            "seconds": 100,
        }

    rows = {f"{forget}/obt/0.9": ve_result(4.0) for forget in ("3", "7", "3-7")}
    rows["3/obt/0.8"] = ve_result(0.8)
    rows["7/obt/0.8"] = ve_result(1.0)
    rows["3-7/obt/0.8"] = ve_result(1.2)
    rows["3/ort/0.95"] = ve_result(1.0)  # the two other sets are missing
    choices = {
        "obt": maker["Choice"]("obt", (), best=0.8, reached=True),
        "ort": maker["Choice"]("ort", (), best=0.95, reached=True),
    }
    maker.update(choose_ve=lambda method, dry: choices.get(method))

    _, _, standard, obt = maker["ve_lines"](rows)
    assert standard.startswith("| standard | 10.50, FD 0.50 |")
    cells = [
        "0.80 [0.4, 1.6], x1.20, 0.80",  # FD is divided by the Standard model's
        "1.00 [0.5, 2.0], x1.20, 0.80",
        "1.20 [0.6, 2.4], x1.20, 0.80",
    ]
    assert obt == f"| obt/0.8 | {' | '.join(cells)} |  | 300 |"


def test_every_run_of_until_finds_length_and_strength_by_itself(speller):
    rows = speller["until_rows"]()
    assert {str(digit) for digit in range(10)} < set(rows)
    for argv in rows.values():
        flags = speller["spell_out"](["--dataset", "mnist", *argv])
        assert "--until" in flags
        assert "--max-steps" in flags
        assert not {"--steps", "--kappa", "--alpha"} & set(flags)
        tiny = speller["spell_out"](["--dataset", "mnist", *argv, *speller["tiny"](argv)])
        assert value_of(tiny, "--max-steps") == "3"


def test_no_kept_row_is_of_another_command():
    """Pages show rows by their names, and --list knows which command makes each."""
    command = [sys.executable, "tests/make_tables.py", "--list"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = listed.stdout.splitlines()
    missing = {line.split()[1] for line in lines if line.startswith("missing")}
    assert len(lines) > 200
    assert not missing & set(read_json(ROOT / "assets/tables.json"))
    assert not missing & set(read_json(ROOT / "assets/until.json"))


def test_two_processes_keep_all_their_rows(tmp_path):
    code = """
import sys
sys.path.insert(0, "tests")
import make_tables
from pathlib import Path
make_tables.PLACES.table = Path(sys.argv[1])
for i in range(30):
    make_tables.keep(f"group/{sys.argv[2]}{i}", "command", {"n": i})
"""
    path = tmp_path / "tables.json"
    commands = [[sys.executable, "-c", code, str(path), name] for name in "ab"]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(read_json(path)) == 60


def test_list_and_draw_together_are_one_line(maker):
    check_refusal(run_function(maker["main"], ["--list", "--draw"]), "--list", "--draw")


@pytest.mark.parametrize("is_quick", [False, True])
def test_a_damaged_table_names_its_remedy(maker, tmp_path, is_quick, monkeypatch):
    monkeypatch.setattr(common, "HERE", tmp_path)
    path = tmp_path / ("runs" if is_quick else "assets") / "tables.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("{")
    run = run_function(maker["load_file"], path)
    check_refusal(run, "is damaged", "delete it" if is_quick else "git checkout")


def test_until_table_says_what_was_not_reached(maker):
    run = {
        **{"ur_before": 10.0, "ur_after": 0.5, "ur_interval": [0.2, 0.9]},
        **{"fd_before": 0.5, "fd_after": 0.6, "class_min_ratio": 0.81, "worst_class": "5"},
        **{"low_confidence_before": 10.0, "low_confidence_after": 9.0, "not_reached": []},
        **{"steps": 300, "kappa": 2.5, "seconds_trained": 100.0, "seconds_of_looks": 15.0},
        **{"ur_no_noise_after": 0.4, "instead_other": 80.0, "instead_unsure": 15.0},
        **{"instead_noise": 2.0, "instead_forgotten": 3.0},
    }
    rows = {str(digit): {**run, "seconds_trained": 100.0 + digit} for digit in range(10)}
    rows["3"]["not_reached"] = ["UR 2 %", "and more"]
    lines = list(maker["until_lines"](rows))
    cells = "0.81, 5 | 10.0 to 9.0 | 80 / 15 / 2 / 3 | 300, 2.50 |"
    assert lines[2] == f"| 0 | 10.00 to 0.50 [0.2, 0.9] | 0.40 | x1.20 | {cells} 100, 15 | yes |"
    assert lines[5].endswith("| 103, 15 | UR 2 %; and more |")
    assert "| 104, 15 |" in lines[-1], "the median of 100 to 109"


def test_a_row_without_the_measure_takes_it_from_the_repeat_of_its_command(maker):
    shares = {"instead_other": 80.0, "instead_unsure": 15.0, "instead_noise": 2.0}
    maker["keep"]("instead/vp/ort", "the command", {**shares, "instead_forgotten": 3.0})
    kept = maker["keep"]("vp/ort", "the command", {"ur_after": 1.0})
    assert maker["instead_cell"](kept) == "80 / 15 / 2 / 3"
    other = maker["keep"]("vp/obt", "another command", {"ur_after": 1.0})
    assert maker["instead_cell"](other) == ""


def test_a_figure_that_is_null_in_the_table_is_nan_again(maker, tmp_path):
    """JSON has no NaN; the mean of several runs needs numbers."""
    entry = maker["keep"]("group/one", "command", {"fd_after": math.nan, "n": 3})
    for result in (entry, maker["load"]()["group/one"]):
        assert math.isnan(result["fd_after"])
        assert result["n"] == 3
    assert read_json(tmp_path / "tables.json")["group/one"]["fd_after"] is None


@pytest.mark.parametrize("text", ['{"a":', "[1]", '{"runs": 3}'])
def test_a_damaged_table_is_one_line(maker, tmp_path, text, capsys):
    (tmp_path / "tables.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        maker["load"]()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is damaged" in error
    assert "delete it" in error, "git does not know a table outside assets/"


@pytest.mark.parametrize("only", ["", "vp/", "/", "/ort", "nonsense", "vp/ort/", "nll/ort", "VP"])
def test_an_unknown_row_is_one_line_with_the_known_ones(tmp_path, only):
    program = runpy.run_path(str(ROOT / "tests/make_tables.py"))
    program["PLACES"].runs = tmp_path / "runs"
    run = run_function(program["main"], ["--only", only, "--list"])
    check_refusal(run, "--only")
    group = only.partition("/")[0]
    known = [] if only == "nll/ort" else program["GROUPS"]
    if group == "vp":
        known = program["GROUPS"]["vp"].rows
    for name in known:
        assert name in run.err
    assert not (tmp_path / "runs").exists()


def test_the_standard_model_measured_beside_itself_has_lost_nothing(maker):
    path = ROOT / "data/mnist_base.pt"
    row = maker["measure_standard"](path, "command", "ve", quick=True)
    assert row["ur_after"] == row["ur_before"]
    assert row["fd_after"] == row["fd_before"]
    assert row["class_min_ratio"] == 1
