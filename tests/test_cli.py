"""The scripts through their command line: what they write, and what they say to bad input."""

import argparse
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    Run,
    arguments,
    check_refusal,
    check_success,
    load_script,
    load_weights,
    only_run,
    quick,
    read_json,
    run_function,
    run_process,
    run_script,
    same_weights,
    write_small_base,
)

import common

QUICK = ("--dataset", "mnist", "--quick")
SHORT = ("--n", 10, "--nfe", 2)  # few samples of few evaluations, where only the weights matter
METHODS = ["obt-rel", "obt", "ort", "unseen", "ascent", "erasediff", "siss"]
RESULT_KEYS = """
    method sde forget alpha steps n sampler nfe ur_before ur_after ur_interval ur_floor
    fd_before fd_after fd_floor low_confidence_before low_confidence_after
    noise_before noise_after noise_floor ur_no_noise_after
    instead_other instead_unsure instead_noise instead_forgotten
    class_min_ratio class_counts seconds
""".split()


def tree(folder):
    """The content of all files of a folder, by path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


# ---- 03: what a run leaves -----------------------------------------------------------------------


class Unlearned(NamedTuple):
    """A finished run of 03 that forgot 3 and 7."""

    method: str
    run: Run
    base: common.UNet  # the Standard model that it began with
    folder: Path  # where its files are
    result: dict  # the content of result.json


UNLEARNED = [(method, "vp") for method in METHODS]
UNLEARNED += [("obt-rel", sde) for sde in ("ve", "subvp", "ddpm")]


@pytest.fixture(scope="module", params=UNLEARNED, ids="-".join)
def unlearned(request, tmp_path_factory):
    """One run for all tests of this section."""
    method, sde = request.param
    out = tmp_path_factory.mktemp("unlearned")
    base = common.load_net(write_small_base(out), "")
    flags = ("--method", method, "--sde", sde, "--out", out)
    run = run_script("03", *QUICK, "--forget", 3, 7, *flags)
    check_success(run)
    folder = quick(out) / f"mnist/forget-3-7/{method}-{sde}"
    result = read_json(folder / "result.json")
    return Unlearned(method, run, base, folder, result)


def test_unlearn_says_what_it_forgets(unlearned):
    assert "class 3 '3', class 7 '7': 12,396 images; keeping 47,604" in unlearned.run.out


def test_unlearn_calls_only_obt_rel_ours(unlearned):
    assert ("ours, not the paper's" in unlearned.run.out) == (unlearned.method == "obt-rel")


def test_unlearn_writes_five_files(unlearned):
    names = {path.name for path in unlearned.folder.iterdir()}
    assert names == {"model.pt", "result.json", "log.jsonl", "curves.png", "before_after.png"}


def test_unlearn_result_is_complete(unlearned):
    missing = [key for key in RESULT_KEYS if key not in unlearned.result]
    assert not missing


def test_unlearn_result_names_the_classes(unlearned):
    assert unlearned.result["forget"] == ["3", "7"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_unlearn_counts_every_sample(unlearned, moment):
    assert sum(unlearned.result["class_counts"][moment]) == unlearned.result["n"]


def test_unlearn_ratio_is_the_share_of_the_counts(unlearned):
    counts = unlearned.result["class_counts"]["before"]
    share = (counts[3] + counts[7]) / unlearned.result["n"]
    assert unlearned.result["ur_before"] == pytest.approx(100 * share)


def test_unlearn_interval_holds_the_ratio(unlearned):
    low, high = unlearned.result["ur_interval"]
    assert low <= unlearned.result["ur_after"] <= high


def test_unlearn_saves_a_network_like_the_base(unlearned):
    net = common.load_net(unlearned.folder / "model.pt", "")
    assert net.arch == unlearned.base.arch


def test_unlearn_saves_the_network_that_was_trained(unlearned):
    """The saved weights have moved away from the base."""
    net = common.load_net(unlearned.folder / "model.pt", "")
    assert not same_weights(net.state_dict(), unlearned.base.state_dict())


@pytest.mark.slow
def test_every_method_with_every_sde_gives_other_weights(tmp_path):
    """Seven methods and Ort's second reading, four SDEs: 32 runs, 32 different models."""
    flags = {method: ("--method", method) for method in METHODS}
    flags["ort-inner"] = ("--method", "ort", "--ort", "inner")
    seen = {}
    for name, method in flags.items():
        for sde in common.SDES:
            out = tmp_path / f"{name}-{sde}"
            write_small_base(out)
            argv = (*method, "--sde", sde, *SHORT, "--steps", 3, "--out", out)
            check_success(run_script("03", *QUICK, "--forget", 3, *argv))
            weights = load_weights(only_run(out) / "model.pt")
            for other, other_weights in seen.items():
                assert not same_weights(weights, other_weights), f"{name}-{sde} is {other}"
            seen[f"{name}-{sde}"] = weights
    assert len(seen) == 32


@pytest.mark.parametrize("method", ["ort", "obt", "unseen", "siss"])
def test_from_scratch_quick(tmp_path, small_base, method):
    """A small network of its own is trained; the Standard model is still what "before" means."""
    flags = ("--method", method, "--from-scratch", *SHORT, "--out", tmp_path)
    run = run_script("03", *QUICK, "--forget", 3, *flags)
    check_success(run)
    folder = quick(tmp_path) / f"mnist/forget-3/{method}-vp-scratch"
    width = common.load_net(folder / "model.pt", "").arch["width"]
    assert "from scratch" in run.out
    assert (folder / "result.json").exists(), "no result.json"
    assert width == 32, "the base has 16 channels, a network of its own 32 under --quick"


def test_ddpm_forget_loss_is_applied(tmp_path):
    """Ort on the discrete chain lowers what it minimises, on images that it never saw.

    The released code drops the loss of D_f there.
    """
    test = common.load_dataset("mnist", train=False)
    x_f = common.dequantize(test.images[test.labels == 3][:500])
    sde = common.DDPM()
    # Unseen has no noise of its own for D_f, so these flags go to Ort alone.
    own_flags = {"ort": ("--alpha", 0.5, "--uniform-t"), "unseen": ()}
    loss = {}
    for method, own in own_flags.items():
        training = ("--steps", 60, "--lr", 1e-3, "--ema", 0.9)
        out = tmp_path / method
        argv = ("--method", method, "--sde", "ddpm", *training, *SHORT, *own, "--out", out)
        check_success(run_script("03", *QUICK, "--forget", 3, *argv))
        net = common.load_net(only_run(out) / "model.pt", "")
        torch.manual_seed(0)
        with torch.no_grad():
            t = common.uniform_t(500, sde)
            loss[method] = common.ort_loss(net, sde, x_f, t).mean().item()
    assert loss["ort"] < 0.8 * loss["unseen"]


# ---- 03: what its flags do -----------------------------------------------------------------------


def test_seed_names_a_folder_and_changes_the_run(tmp_path, small_base):
    for seed in (0, 1):
        check_success(run_script("03", *QUICK, "--forget", 3, "--seed", seed, "--out", tmp_path))
    first = load_weights(quick(tmp_path) / "mnist/forget-3/obt-rel-vp/model.pt")
    second = load_weights(quick(tmp_path) / "mnist/forget-3/obt-rel-vp-s1/model.pt")
    assert not same_weights(first, second)


def short_run(out, *flags):
    """The weights after a few steps of 03 from a small base."""
    write_small_base(out)
    check_success(run_script("03", *QUICK, "--forget", 3, *SHORT, *flags, "--out", out))
    return load_weights(only_run(out) / "model.pt")


@pytest.fixture(scope="module")
def default_weights(tmp_path_factory):
    """The weights of a short run without a further flag."""
    return short_run(tmp_path_factory.mktemp("default"))


TRAINING_FLAGS = [
    ("--alpha", 0.2),
    ("--lr", 1e-2),
    ("--steps", 3),
    ("--batch-size", 8),
    ("--log-sigma", 1, 1),
    ("--uniform-t",),
    ("--ema", 0),
    ("--retain", "dsm"),
    ("--forget-every", 2),
]


@pytest.mark.parametrize("flag", TRAINING_FLAGS, ids=lambda flag: flag[0])
def test_no_flag_of_03_is_ignored(tmp_path, default_weights, flag):
    """A training flag that is changed changes the weights."""
    assert not same_weights(default_weights, short_run(tmp_path, *flag))


def unlearn_arguments(out, *flags):
    """What 03 makes of its flags."""
    argv = ("--quick", "--forget", "3", *flags, "--out", str(out))
    return load_script("03")["arguments"](list(argv))


def test_no_uniform_t_goes_with_log_sigma(tmp_path):
    args = unlearn_arguments(tmp_path, "--no-uniform-t", "--log-sigma", "0", "0.7")
    assert args.uniform_t is False
    assert args.log_sigma == [0, 0.7]


@pytest.mark.parametrize("flag, expected", [("--uniform-t", True), ("--no-uniform-t", False)])
def test_uniform_t_can_be_switched(tmp_path, flag, expected):
    assert unlearn_arguments(tmp_path, flag).uniform_t is expected


@pytest.mark.parametrize("method, expected", [("obt-rel", False), ("siss", True)])
def test_uniform_t_is_the_methods_own_by_default(tmp_path, method, expected):
    assert unlearn_arguments(tmp_path, "--method", method).uniform_t is expected


# ---- flags without effect ------------------------------------------------------------------------

UNUSED = [
    ("02", "--judge --steps 10", "--steps"),
    ("02", "--judge --batch-size 8", "--batch-size"),
    ("02", "--judge --measure", "--measure"),
    ("02", "--judge --without 3", "--without"),
    ("02", "--judge --resume", "--resume"),
    ("02", "--judge --save-every 7", "--save-every"),
    ("02", "--measure --lr 0.1", "--lr"),
    ("02", "--measure --resume", "--resume"),
    ("02", "--measure --without 3", "--without"),
    ("02", "--n 100", "--n"),
    ("02", "--sde vp --wide 0.5", "--wide"),
    ("02", "--sde ve --log-sigma 0 2", "--log-sigma"),
    ("04", "--forget 3 --steps 5", "--steps"),
    ("04", "--forget 3 --lr 0.1", "--lr"),
    ("04", "--forget 3 --nll none --nll-floor 0.01", "--nll-floor"),
]


@pytest.mark.parametrize("number, flags, word", UNUSED)
def test_a_flag_that_would_have_no_effect_is_refused(script, tmp_path, number, flags, word):
    run = script(number, "--quick", *flags.split(), "--out", tmp_path)
    check_refusal(run, f"{word} has no meaning")
    assert list(tmp_path.iterdir()) == []


# Flags of a training that a script has no use for, and therefore has not.
ABSENT = {
    "04": ("--compile", "--grad-accum 2"),
    "05": ("--compile", "--grad-accum 2", "--lr 0.1"),
    "06": ("--compile", "--dataset mnist", "--cache-dir x"),
}


@pytest.mark.parametrize("number", ABSENT)
def test_a_script_has_no_flag_that_does_nothing_there(tmp_path, number, monkeypatch):
    parser = parser_of(SCRIPTS[number], monkeypatch)
    for flag in ABSENT[number]:
        run = run_function(parser.parse_args, ["--forget", "3", *flag.split()])
        check_refusal(run, "unrecognized arguments", flag.split()[0])


# ---- 02 and its judge ----------------------------------------------------------------------------


def test_train_without_a_class(tmp_path):
    """02 --without: the Unseen model goes where 04 looks, and the base's place stays free."""
    run = run_script("02", *QUICK, "--steps", 2, "--without", 3, 7, "--out", tmp_path)
    check_success(run)
    model = quick(tmp_path) / "mnist/forget-3-7/unseen-any-scratch/model.pt"
    trained = torch.load(model, weights_only=True)["args"]
    assert "47,604 images" in run.out
    assert "--forget 3 7" in run.out
    assert not (quick(tmp_path) / "mnist/base.pt").exists(), "the base's place is taken"
    assert trained["method"] == "unseen"
    assert trained["forget"] == ["3", "7"]


def test_own_base_is_preferred_and_named(tmp_path):
    check_success(run_script("02", *QUICK, "--steps", 2, "--width", 16, "--out", tmp_path))
    run = run_script("03", *QUICK, "--forget", 3, "--out", tmp_path)
    check_success(run)
    assert str(quick(tmp_path) / "mnist/base.pt") in run.out


def test_shipped_base_is_named(tmp_path):
    run = run_script("03", *QUICK, "--forget", 3, "--out", tmp_path)
    check_success(run)
    assert "data/mnist_base.pt" in run.out


@pytest.fixture(scope="module")
def judge_run(tmp_path_factory):
    """02 --judge --quick -> (what it printed, the folder of --out)."""
    out = tmp_path_factory.mktemp("judge")
    run = run_script("02", *QUICK, "--judge", "--out", out)
    check_success(run)
    return run.out, out


@pytest.fixture
def full_judge(tmp_path, monkeypatch):
    """The function train(*flags) -> Run: 02 --judge of a full run, which trains for no time."""

    def untrained(data, **_):
        return common.Judge().eval()

    monkeypatch.setattr(common, "fit_judge", untrained)

    def train(*flags):
        return run_script("02", "--dataset", "mnist", "--judge", *flags, "--out", tmp_path)

    return train


def test_a_judge_of_another_training_is_replaced_only_by_overwrite(tmp_path, full_judge):
    check_success(full_judge())
    path = tmp_path / "mnist/judge.pt"
    before = path.read_bytes()
    check_refusal(full_judge("--seed", 1), str(path), "--seed was 0 and is now 1", "--overwrite")
    assert path.read_bytes() == before
    check_success(full_judge())
    check_success(full_judge("--seed", 1, "--overwrite"))
    assert torch.load(path, weights_only=True)["seed"] == 1


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}], ids=["a list", "another's"])
def test_a_foreign_file_in_the_place_of_the_judge_is_not_replaced(tmp_path, full_judge, content):
    path = tmp_path / "mnist/judge.pt"
    path.parent.mkdir()
    torch.save(content, path)
    before = path.read_bytes()
    check_refusal(full_judge(), str(path), "--judge --overwrite")
    assert path.read_bytes() == before


def test_judge_is_good_after_one_epoch(judge_run):
    accuracy = re.search(r"test accuracy ([\d.]+) %", judge_run[0])
    assert float(accuracy[1]) >= 90


def test_a_quick_judge_lies_where_no_full_run_looks(judge_run):
    assert common.judge_path(arguments(judge_run[1])) == common.HERE / "data/mnist_judge.pt"


def test_judge_can_be_loaded(judge_run):
    args = arguments(quick(judge_run[1]), quick=True)
    assert common.judge_path(args) == quick(judge_run[1]) / "mnist/judge.pt"
    judge = common.load_judge(args, common.load_dataset("mnist"))
    assert isinstance(judge, common.Judge)


# ---- as a process --------------------------------------------------------------------------------

# 04 and 05 need a run of 03: see their own test files.
PROCESS_FLAGS = {"01": (), "02": ("--steps", 2), "03": ("--forget", 3)}


@pytest.mark.parametrize("number", list(PROCESS_FLAGS))
def test_each_script_as_a_process(number, tmp_path):
    flags = ("--quick", "--out", tmp_path, *PROCESS_FLAGS[number])
    run = run_process(SCRIPTS[number], *flags, cwd=tmp_path)
    check_success(run)
    assert run.err == ""
    assert "next: " in run.out


def test_missing_base_names_the_command(tmp_path):
    """A copy of the project without the shipped model, as a process."""
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copy(ROOT / "03_unlearn.py", tmp_path)
    (tmp_path / "data/mnist.npz").symlink_to(ROOT / "data/mnist.npz")
    run = run_process("03_unlearn.py", "--quick", "--forget", 3, cwd=tmp_path)
    check_refusal(run, "python 02_train_sde.py --dataset mnist")


# ---- bad input -----------------------------------------------------------------------------------

# What is wrong: the flags, and a word of the message that says what is wrong or what is valid.
BAD_FLAGS = {
    "unknown class": ("--forget eleven", "0, 1, 2"),
    "no forget": ("", "the following arguments are required: --forget"),
    "forget example": ("", "(e.g. python 03_unlearn.py --dataset mnist --forget 3)"),
    "misspelt forget": ("--forgett 3", "--forgett (did you mean --forget?)"),
    "misspelt value": ("--forget 3 --stepz=5", "--stepz (did you mean --steps?)"),
    "all classes": ("--forget 0 1 2 3 4 5 6 7 8 9", "all classes"),
    "alpha": ("--forget 3 --alpha 1.5", "--alpha"),
    "steps": ("--forget 3 --steps -5", "--steps"),
    "lr": ("--forget 3 --lr 0", "--lr"),
    "batch": ("--forget 3 --batch-size many", "--batch-size"),
    "method": ("--forget 3 --method hypnosis", "obt-rel"),
    "sde": ("--forget 3 --sde xp", "subvp"),
    "scratch distill": (
        "--forget 3 --method ort --from-scratch --retain distill",
        "--retain dsm",
    ),
    "scratch obt-rel": ("--forget 3 --from-scratch", "--method ort | obt"),
    "alpha of siss": ("--forget 3 --method siss --alpha 0.5", "--alpha has no part"),
    "alpha and kappa": ("--forget 3 --alpha 0.6 --kappa 2", "give one of them"),
    "alpha and eta": ("--forget 3 --method erasediff --alpha 0.6 --eta 0.1", "give one of them"),
    "two noises": ("--forget 3 --uniform-t --log-sigma 0 1", "--uniform-t and --log-sigma"),
    "noise of siss": ("--forget 3 --method siss --log-sigma 0 1", "--log-sigma has no part"),
    "no uniform t of siss": ("--forget 3 --method siss --no-uniform-t", "uniform-t has no part"),
    "noise of unseen": ("--forget 3 --method unseen --uniform-t", "--uniform-t has no part"),
    "no uniform t of unseen": (
        "--forget 3 --method unseen --no-uniform-t",
        "uniform-t has no part",
    ),
    "distilled unseen": ("--forget 3 --method unseen --retain distill", "--retain has no part"),
    "eta of ort": ("--forget 3 --method ort --eta 0.5", "erasediff"),
    "data set": ("--forget 3 --dataset imagenet", "mnist"),
    "data dir": ("--forget 3 --data-dir nowhere", "git checkout data/mnist.npz"),
    "unknown flag": ("--forget 3 --forgive", "--forgive"),
}


@pytest.mark.parametrize("flags, word", BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_input_is_one_line_and_touches_nothing(tmp_path, flags, word):
    """A line says what is wrong or what is valid, and a finished run stays as it was."""
    folder = quick(tmp_path) / "mnist/forget-3/obt-rel-vp"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    before = tree(tmp_path)
    run = run_script("03", "--quick", *flags.split(), "--out", tmp_path)
    check_refusal(run, word)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("names", [("cat",), tuple("0123456789")])
def test_02_names_its_own_flag(tmp_path, names):
    run = run_script("02", *QUICK, "--without", *names, "--out", tmp_path)
    check_refusal(run, "--without: ")


def test_a_class_that_is_named_twice_is_one(tmp_path, small_base):
    """It is the same run: its result may be replaced without a word of --overwrite."""
    flags = ("--quick", "--method", "ort", "--steps", 2, "--n", 10, "--nfe", 2, "--out", tmp_path)
    check_success(run_script("03", *flags, "--forget", 3))
    check_success(run_script("03", *flags, "--forget", 3, 3))


def test_an_empty_word_is_one_line():
    exercise = runpy.run_path(str(ROOT / "tests/exercise.py"))
    run = run_function(exercise["arguments"], [""])
    check_refusal(run, "number: an empty value")


def test_a_rank_without_torchrun_is_one_line(tmp_path, monkeypatch):
    """A batch system may set it alone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = run_script("03", "--quick", "--forget", 3, "--out", tmp_path)
    check_refusal(run, "unset RANK", "WORLD_SIZE")


ODD_WORDS = (
    """a b|it's|-x|$HOME|`id`|*|!!|\\|a\\x41|é|日本|\u2028|\x1b[2J|\x7f|\x85|\udcff|caf\udce9'\\"""
)
ODD_WORDS = ["", "a\nb", "\r", "\t", *ODD_WORDS.split("|")]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_bash_takes_a_printed_command_as_it_is(encoding, monkeypatch):
    """Whatever the words are, the line can be shown, and bash reads the same words from it."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))
    line = common.shell_command(["printf", "%s\\0", *ODD_WORDS])
    monkeypatch.undo()
    assert line.isprintable()
    pasted = line.encode(encoding).decode(encoding)
    done = subprocess.run(["bash", "-c", pasted], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in ODD_WORDS]
    assert common.split_command(line) == ["printf", "%s\\0", *ODD_WORDS]


def test_a_path_that_looks_like_a_flag_is_a_path_in_a_command(monkeypatch):
    args = arguments("-out", data_dir="-data", cache_dir="-cache")
    words = shlex.split(common.command_line("02_train_sde.py", args))
    parsed = load_script("02")["flags"]().parse_args(words[2:])
    for name in ("out", "data_dir", "cache_dir"):
        assert Path(getattr(parsed, name)) == Path(getattr(args, name))


CONTROLS = "a\nb\rc\x1b[2Jd\x07\x85\u2028\udcff"


def test_no_message_leaves_its_line(capsys):
    for function in (common.warn, common.say):
        function(CONTROLS)
    run = run_function(common.exit_with_error, CONTROLS)
    out, err = capsys.readouterr()
    for line in (out, err, run.err.removeprefix("error: ")):
        assert line == "a\\nb\\rc\\x1b[2Jd\\x07\\x85\\u2028\\udcff\n"


def test_what_a_run_prints_does_not_move_the_cursor():
    stream = io.StringIO()
    common.Output(stream).write("\rstep 3\tof\n\x1b[2J\x9b±")
    assert stream.getvalue() == "\rstep 3\tof\n\\x1b[2J\\x9b±"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_remedy_for_an_odd_place_works_when_pasted(tmp_path, encoding):
    """A path of control characters and of bytes that are no UTF-8, on a stream of ASCII."""
    out = tmp_path / "é\n\x1b[2J \udcff"
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    argv = [sys.executable, SCRIPTS["04"], "--quick", "--forget", "3", "--out", out]
    done = subprocess.run(argv, capture_output=True, env=env, check=False)
    run = Run(done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding))
    check_refusal(run, "make one with: python")
    assert run.err[:-1].isprintable()
    command = run.err.partition("make one with: python ")[2]
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
    )
    assert os.fsencode(out) in done.stdout.split(b"\0")


def parser_of(path, monkeypatch):
    """The Parser that a program reads its command line with."""
    found = []

    def note(parser, *_):
        found.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(common.Parser, "parse_args", note)
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        run_function(runpy.run_path(str(path))["arguments"], [])
    return found[0]


PROGRAMS = [*SCRIPTS.values(), *(ROOT / f"tests/{name}.py" for name in ("benchmark", "shapes"))]
TOOLS = [ROOT / f"tests/{name}.py" for name in ("make_tables", "make_tiny_pipeline")]


def flags_with_values(path, monkeypatch):
    """The flags of a program that take a value and need not be given."""
    if path.stem == "make_tiny_pipeline":
        pytest.importorskip("diffusers")
    actions = parser_of(path, monkeypatch)._actions
    return [action for action in actions if action.nargs != 0 and not action.required]


@pytest.mark.parametrize("path", [*PROGRAMS, *TOOLS], ids=lambda path: path.stem)
def test_the_help_of_every_flag_says_what_it_is_and_its_default(path, monkeypatch):
    flags = flags_with_values(path, monkeypatch)
    assert flags
    for action in flags:
        words, _, default = (action.help or "").partition(" (default: ")
        is_without = words.endswith("(no default)")
        assert words and (default or is_without), f"{action.option_strings[-1]}: {action.help}"
    for action in parser_of(path, monkeypatch)._actions:
        assert action.help, action.option_strings


def stated_numbers(action):
    """The numbers with which the default in a flag's help begins: [0.0, 0.7] of "0 0.7; ..."."""
    _, _, default = action.help.partition("(default: ")
    numbers = []
    for word in default.split():
        try:
            numbers.append(float(word.rstrip(";,)")))
        except ValueError:
            break
        if word[-1] in ";,)":
            break
    return numbers


# 03: where the flags are that a run of its defaults does not have.
OTHER_RUNS = {
    ("--method", "erasediff"): "eta",
    ("--method", "siss"): "c",
    ("--method", "obt"): "alpha",
    ("--until", "1"): "max_steps",
}


@pytest.mark.parametrize("number", SCRIPTS)
def test_the_default_that_the_help_names_is_the_one_of_a_run(number, tmp_path, monkeypatch):
    if number == "06":
        pytest.importorskip("diffusers")
    flags = flags_with_values(SCRIPTS[number], monkeypatch)
    needed = [] if number in ("01", "02") else ["--forget", "a photo of a three"]
    argv = [*needed, "--out", str(tmp_path)]
    others = {}
    for more, flag in OTHER_RUNS.items() if number == "03" else ():
        others[flag] = getattr(load_script(number)["arguments"]([*argv, *more]), flag)
    args = argparse.Namespace(**vars(load_script(number)["arguments"](argv)) | others)
    num_checked = 0
    for action in flags:
        numbers = stated_numbers(action)
        if not numbers:
            continue
        value = getattr(args, action.dest)
        values = value if isinstance(value, (list, tuple)) else [value]
        assert [float(v) for v in values] == numbers, action.option_strings[0]
        num_checked += 1
    assert num_checked >= 4


# Numbers that become inf, nan or 0 in float32, or that fit into no memory and no lifetime.
SENSELESS = [
    "1e300",
    "-1e300",
    "1e39",
    "5e-324",
    "1e-30",
    "9" * 400,
    "9" * 5000,
    "1e999",
    "-inf",
    "nan",
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
@pytest.mark.parametrize("text", SENSELESS, ids=lambda text: text[:7])
def test_every_flag_refuses_numbers_that_make_no_sense(path, text, monkeypatch):
    parser = parser_of(path, monkeypatch)
    flags = [action for action in parser._actions if action.type is not None]
    assert flags
    for action in flags:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            action.type(text)


SENSELESS_FLAGS = {
    ("01", "--weights 1e300 1 1"): "from 0.001 to 1000",
    ("01", "--means 1e30 0 0 0 2 2"): "from -20 to 20",
    ("02", "--log-sigma 1e300 1"): "from -10 to 10",
    ("02", "--log-sigma 0 1e-9"): "from -10 to 10",
    ("02", "--log-sigma 0 0.001"): "below 0.01",
    ("03", "--forget 3 --kappa 1e300"): "from 0 to 1000",
    ("03", "--forget 3 --kappa 1e-300"): "at least 1e-08 away from 0",
    ("03", "--forget 3 --lr 5e-324"): "from 1e-08 to 1",
    ("03", "--forget 3 --batch-size 1000000000000"): "from 2 to 1000000",
}


@pytest.mark.parametrize("number, flags", SENSELESS_FLAGS)
def test_the_message_says_which_numbers_make_sense(tmp_path, number, flags):
    run = run_script(number, "--quick", *flags.split(), "--out", tmp_path)
    check_refusal(
        run, flags.split()[-2 if "--forget" in flags else 0], SENSELESS_FLAGS[number, flags]
    )


# A value that is empty, as where a variable of the shell is not set.
EMPTY_VALUES = {
    "01": ("--out", "--means", "--n"),
    "02": ("--out", "--data-dir", "--cache-dir", "--dataset", "--without", "--device", "--lr"),
    "03": ("--forget", "--method", "--sde", "--redraw", "--alpha", "--retain", "--seed"),
    "04": ("--inception-weights", "--nll", "--relearn"),
    "05": ("--runs", "--mask", "--task", "--sigmas", "--clip-weights"),
}


@pytest.mark.parametrize("number", EMPTY_VALUES)
def test_an_empty_value_is_one_line(tmp_path, number, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = ("--forget", "3") if number in ("03", "04", "05") else ()
    for flag in EMPTY_VALUES[number]:
        for value in ((flag, ""), (f"{flag}=",)):
            run = run_script(number, "--quick", *needed, *value)
            check_refusal(run, f"{flag}: an empty value")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_cuda(tmp_path):
    run = run_script("03", *QUICK, "--forget", 3, "--device", "cuda", "--out", tmp_path)
    check_refusal(run, "--device cpu")


def write_text(path):
    """Bytes that are no checkpoint."""
    path.write_bytes(b"not a checkpoint")


def write_half_a_base(path):
    """The first part of a checkpoint, as after a download that broke off."""
    shipped = common.HERE / "data/mnist_base.pt"
    path.write_bytes(shipped.read_bytes()[:100000])


def write_another_checkpoint(path):
    """A checkpoint of some other program."""
    torch.save({"weights": torch.zeros(2)}, path)


@pytest.mark.parametrize("write", [write_text, write_half_a_base, write_another_checkpoint])
def test_corrupt_base_names_the_command_that_mends_it(tmp_path, write):
    path = quick(tmp_path) / "mnist/base.pt"
    path.parent.mkdir(parents=True)
    write(path)
    before = tree(tmp_path)
    run = run_script("03", *QUICK, "--forget", 3, "--out", tmp_path)
    check_refusal(run, "python 02_train_sde.py --dataset mnist")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number, flags", [("02", ()), ("03", ("--forget", 3))])
def test_unwritable_out(tmp_path, number, flags):
    path = tmp_path / "file"
    path.write_text("x")
    run = run_script(number, *QUICK, *flags, "--out", path)
    check_refusal(run, "--out")
    assert path.read_text() == "x"


def test_resume_without_a_checkpoint(tmp_path):
    check_refusal(run_script("02", *QUICK, "--resume", "--out", tmp_path), "not found")


def test_a_failed_run_leaves_the_finished_one(tmp_path, small_base, monkeypatch):
    argv = (*QUICK, "--forget", 3, "--out", tmp_path)
    check_success(run_script("03", *argv))
    before = tree(tmp_path)
    monkeypatch.setattr(common, "guarded_step", lambda *_: common.exit_with_error("diverged"))
    check_refusal(run_script("03", *argv), "diverged")
    assert tree(tmp_path) == before
