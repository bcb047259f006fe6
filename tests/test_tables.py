"""tests/make_tables.py: it chooses by the rule it states, keeps what is done, interpolates right.

And its table: every kept command names every hyper-parameter, so that other defaults of 02 and 03
do not change what it means.
"""

import math
import runpy
import shutil

import pytest
import torch
from conftest import ROOT, check_refusal, read_json, run_function

import common

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
        "03": {"device", "cache_dir", "redraw"},
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

    def random_images(n):
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
    assert obt == f"| obt/0.8 | {' | '.join(cells)} | 300 |"


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
    assert "git checkout" in error


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
