"""Make every number of the method tables in docs/results.md, and their figures, by one command.

    python tests/make_tables.py                    # all groups: hours on 2 CPU cores
    python tests/make_tables.py --only vp          # one group; --help names all of them
    python tests/make_tables.py --only vp/ort      # one row of it: a method
    python tests/make_tables.py --only vp --list   # what is done and what is missing; runs nothing
    python tests/make_tables.py --draw             # only tables and figure, from assets/tables.json

It can be stopped and started again: a finished run is never repeated.

Each run is one command of 02, 03 or 06. assets/tables.json keeps the command beside the run's
result, so that any single number can be had again by hand. The command names every
hyper-parameter, so it means the same thing when the scripts get other defaults. A kept run counts
only for its own command. Only two things are made in another way. The Standard model's samples,
which are the same for every run with one seed, are drawn once and kept in out/tables/. Likelihoods,
losses by noise level, angles and the row of paper/scratch/standard are measured here, on the models
that the commands made.

How the weights of group vp are chosen, alike for every method and first with seed 0:

  1. Three learning rates at the middle weight.
  2. The paper's noise for D_f against ours; then the other retain loss.
  3. The two other weights, and from the best of the three to weaker or stronger ones, until two
     runs lie around UR 1 % or the network breaks down.
  4. Two more seeds at the weight whose UR is nearest to 1 %, each with a second weight on the other
     side of 1 %. Where no weight comes down to 1 %: two more seeds at the weight of least `cost`.

Groups long and ve take learning rate, noise and retain loss from there, and start the same walk at
the weight found there. Group ve walks on forget 3; 7 and 3 7 use the weight that it finds (obt-rel
also the next stronger one, and 1000 steps).

Group paper gives the paper's own losses the time that they need: uniform times, 1500 and 5000
steps, and 10,000 from scratch. Its rows are walk, 3, scratch, 7, 3-7, vp and more. The row walk
chooses alpha by runs of 500 steps, see choose_paper_alpha; the others use what it has chosen.

A finished model is kept in out/tables/ only. Where groups nll, noise and angles find it gone, its
command makes it again. Group instead makes whole runs again, for measures that they did not have.
A run that was stopped goes on where it was.

Two commands may run at once, on a core each:
OMP_NUM_THREADS=1 taskset -c 0 python tests/make_tables.py --only vp/ort, and so on.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import runpy
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

# Python looks for modules beside this file, where benchmark.py is; common.py is one folder higher.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import t2i_table
from benchmark import exit_as_damaged, read_kept_images, waiting_lock, write_json

import common

ROOT = common.HERE


@dataclass
class Places:
    """Where this program keeps things; --quick moves both into a folder of its own."""

    runs: Path  # a folder for each run
    table: Path  # the finished runs, {name: {"command": ..., the run's figures}}; see table_path


# Where the networks are measured; 02 and 03 train there too, unless they are told otherwise.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PLACES = Places(runs=ROOT / "out" / "tables", table=ROOT / "assets" / "tables.json")


# ---- what is run ---------------------------------------------------------------------------------


class Weight(NamedTuple):
    """How a method weighs D_f: by which flag of 03, and three values of it, the weakest first."""

    flag: str | None
    values: tuple


WEIGHTS = {
    "obt-rel": Weight("--kappa", (2.0, 2.5, 3.0)),
    "obt": Weight("--alpha", (0.95, 0.9, 0.8)),
    "ort": Weight("--alpha", (0.98, 0.95, 0.9)),
    "ascent": Weight("--alpha", (0.97, 0.95, 0.9)),
    "erasediff": Weight("--eta", (0.001, 0.003, 0.01)),
    "siss": Weight("--c", (0.001, 0.003, 0.01)),  # here the gradient of L_g is 0.01 to 0.05 long
    "unseen": Weight(None, (None,)),  # L_g alone: there is nothing to weigh
}
RATES = (1e-4, 3e-4, 1e-3)

# All weights that `walk` may come to, the weakest first.
LADDER = {
    "obt-rel": (1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 3.5, 4.0),
    "obt": (0.95, 0.9, 0.8, 0.7),
    "ort": (0.98, 0.95, 0.9, 0.8),
    "ascent": (0.997, 0.99, 0.98, 0.97, 0.96, 0.95, 0.9),
    "erasediff": (1e-5, 1e-4, 0.001, 0.003, 0.01, 0.03),
    "siss": (1e-4, 3e-4, 0.001, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1),
    "unseen": (None,),
}

# These have no noise of their own for D_f, and their L_g is given by the method.
FIXED_METHODS = ("unseen", "siss")

# The evaluations that a sample takes with each SDE. DDPM's ancestral sampling needs more.
NFE = {"vp": 20, "ve": 20, "subvp": 20, "ddpm": 50}


def tiny(argv):
    """Return the flags that make a run tiny.

    argv  its other flags, which come first: of one given twice the last counts
    """
    length = "--max-steps" if "--until" in argv else "--steps"
    return ("--quick", length, 3, "--batch-size", 8, "--n", 40, "--nfe", 4)


def weigh(method, weight):
    """Return the flags that give a method its weight; none for a method that has no weight."""
    if weight is None:
        return ()
    return (WEIGHTS[method].flag, weight)


def setting(method, *flags, forget=(3,), sde="vp", steps=200, ema=0.98):
    """Return all flags of a run of 03.

    method  one of WEIGHTS
    flags   what the search varies: the weight, learning rate, noise, retain loss and seed
    forget  the classes to forget

    The settings with which the search starts are written out here and not left to 03: new defaults
    of 03 must not change what a kept run means.
    """
    argv = ["--forget", *forget, "--method", method, "--sde", sde]
    argv += ["--steps", steps, "--batch-size", 64, "--ema", ema, "--n", 2000, "--nfe", NFE[sde]]
    if method == "ort":
        argv += ["--ort", "elementwise"]
    if method not in FIXED_METHODS:
        argv += ["--retain", first_retain(method)]
        if "--uniform-t" not in flags:  # 03 refuses it beside --log-sigma
            argv += ["--no-uniform-t", "--log-sigma", 0.0, 0.7]
    return (*argv, *flags)


def first_retain(method):
    """Return the retain loss with which the search starts: the paper's, but for obt-rel ours."""
    return "distill" if method == "obt-rel" else "dsm"


def second_retain(method):
    """Return the retain loss that the search tries in its place."""
    return "dsm" if method == "obt-rel" else "distill"


# ---- commands that name every hyper-parameter ----------------------------------------------------

# All that decides the result of a run, in the order in which a command names it. What is missing
# says where a run computes (--device) and where it writes (--out), or belongs to another job of 02.
HYPER_PARAMETERS = {
    "02": (
        *("dataset", "data_dir", "without", "sde", "steps", "batch_size", "lr", "ema"),
        *("log_sigma", "wide", "width", "seed", "grad_accum", "compile", "bf16", "quick"),
    ),
    "03": (
        *("dataset", "data_dir", "forget", "method", "sde", "from_scratch"),
        *("until", "max_steps", "steps", "batch_size", "lr"),
        *("alpha", "kappa", "eta", "c", "ort", "no_floor", "forget_every", "retain"),
        *("uniform_t", "log_sigma", "ema"),
        *("n", "nfe", "seed", "grad_accum", "compile", "bf16", "quick"),
    ),
}
SCRIPTS = {"02": "02_train_sde.py", "03": "03_unlearn.py"}


@functools.cache
def load_script(number):
    """Return the names that a numbered script defines; its name is not one that `import` takes."""
    return runpy.run_path(str(ROOT / SCRIPTS[number]))


def spell_out(argv, number="03"):
    """Return the flags of a run of 02 or 03 with all its hyper-parameters, as a list of strings.

    argv    flags, as far as they are given; the script's defaults fill in the others
    number  of the script: "02" or "03"

    The result parses to the same arguments as argv, always has the same order, and goes on to mean
    the same thing when the script's defaults change. Flags that have no part in the run are left
    out, because 03 refuses most of them. --out and --device are left out too.
    """
    script = load_script(number)
    # `arguments` makes the output folder, so it is given one that is there in any case. It also
    # seeds PyTorch, which does no harm here: every run seeds again. What it says of this machine is
    # for the one who starts the run.
    with contextlib.redirect_stdout(io.StringIO()):
        args = script["arguments"]([*map(str, argv), "--out", str(PLACES.runs)])
    # {flag: the methods that have it}; 02 has no methods.
    methods_of = script["BELONGS_TO"] if number == "03" else {}

    flags = []
    for name in HYPER_PARAMETERS[number]:
        if name in methods_of and args.method not in methods_of[name]:
            continue
        if name == "log_sigma" and getattr(args, "uniform_t", False):  # the one replaces the other
            continue
        flags += as_flags(name, getattr(args, name))
    return flags


def as_flags(name, value):
    """Return one argument as the strings of a command line."""
    flag = "--" + name.replace("_", "-")
    if name == "uniform_t":
        return [flag] if value else ["--no-uniform-t"]
    # One part is no splitting, and every step has an L_f unless --forget-every says something else.
    if name in ("grad_accum", "forget_every") and value == 1:
        return []
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, (list, tuple)):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def command_of(argv, number="03"):
    """Return the spelled-out command of a run, as one line for the table."""
    return " ".join(["python", SCRIPTS[number], *spell_out(argv, number)])


# ---- running and keeping -------------------------------------------------------------------------


def table_path(name):
    """Return the file in which a run is kept; the runs that end by themselves have their own."""
    return PLACES.table.with_name("until.json") if name.startswith("until/") else PLACES.table


def load():
    """Return the tables so far as one, {name: {"command": ..., the run's figures}}."""
    return {**load_file(table_path("")), **load_file(table_path("until/"))}


def load_file(path):
    """Return the runs of one file, none if there is no such file."""
    if not path.exists():
        return {}
    try:
        table = json.loads(common.read_text(path))
        return {name: with_nan(result) for name, result in table.items()}
    except (ValueError, AttributeError) as error:  # no JSON, or not a table of runs
        exit_as_damaged(path, error)


def with_nan(result):
    """Return a result in which null is NaN again, so that every figure is a number.

    JSON has no NaN, and common.write_json writes null in its place.
    """
    return {key: math.nan if value is None else value for key, value in result.items()}


def keep(name, command, result):
    """Add one finished run to the table, and return its entry."""
    entry = {"command": command, **with_nan(result)}
    path = table_path(name)
    with waiting_lock(path.parent):
        # Read again just now: another process may have added its runs.
        table = {**load_file(path), name: entry}
        write_json(path, dict(sorted(table.items())))
    return entry


def tell(name, is_done):
    """Print one line of --list."""
    print(f"{'done   ' if is_done else 'missing'} {name}")


def save_time():
    """Change two functions of common.py so that many runs in a row cost less.

    common.sample_images  draws the Standard model's samples once for each SDE and seed, and then
                          reads them from out/tables/
    common.load_net       returns networks in channels-last memory, as the CPU likes it and as 04
                          has it; sums then run in another order, so the figures are those of the
                          commands up to rounding
    """
    draw = common.sample_images
    load_net = common.load_net

    def sample_images(net, n, shape, sde, seed, nfe=20, **more):
        # 03 labels its samples: only those of the Standard model are the same in every run.
        if "before" not in more.get("label", ""):
            return draw(net, n, shape, sde, seed, nfe, **more)
        # All that the samples depend on: under --quick, for instance, a batch is another one.
        options = {key: value for key, value in more.items() if key != "label"}
        options["version"] = common.SAMPLER_VERSION
        settings = repr((tuple(shape), sorted(options.items()))).encode()
        digest = f"{common.weights_digest(net)}-{hashlib.sha256(settings).hexdigest()[:8]}"
        name = f"before-{digest}-{type(sde).__name__}-{n}-{seed}-{nfe}.pt"
        path = PLACES.runs / name
        images = read_kept_images(path)
        if images is None:
            images = draw(net, n, shape, sde, seed, nfe, **more)
            common.save_checkpoint(path, images=images)
        return images

    def load_net_channels_last(*args, **more):
        return load_net(*args, **more).to(memory_format=torch.channels_last)

    common.sample_images = sample_images
    common.load_net = load_net_channels_last


def run_folder(name):
    """Return the folder of a run, which is the --out of its command."""
    return PLACES.runs / name.replace("/", "-")


def execute(name, command):
    """Run one command of 03 with its outputs under a name, and return the folder that it wrote.

    It goes on with what the same command has left there: the training of a run that was stopped, or
    a finished run whose figures did not come into the table.
    """
    folder = run_folder(name)
    note = folder / "command.txt"  # for `network` too
    goes_on = find_files(folder, "result.json") or list(folder.glob("**/*.resume.pt"))
    if not goes_on or not note.exists() or note.read_text() != command:
        shutil.rmtree(folder, ignore_errors=True)  # of another command, or of an earlier whole run
        common.make_folder(folder)
        note.write_text(command)
    if not find_files(folder, "result.json"):
        flags = command.split()[2:]  # after "python 03_unlearn.py"
        if list(folder.glob("**/*.resume.pt")):
            flags.append("--resume")
        try:
            load_script("03")["main"]([*flags, "--out", str(folder)])
        except SystemExit as stop:
            if stop.code != 1:
                raise
            # 1: it made things worse. The search for a weight goes that far, and its row says so.
    (path,) = find_files(folder, "result.json")
    return path.parent


def find_files(folder, name):
    """List the files of this name that the run of 03 in a folder has left, or left once before."""
    # **: with --quick 03 writes into a folder quick/ in there. [!.]: the folder of a run that was
    # killed begins with a dot.
    return list(folder.glob(f"**/mnist/*/[!.]*/{name}"))


def run(name, *argv, figures=None, quick=False, dry=False):
    """Return the result of one run of 03: from the table if it is there, else by running it.

    name     of the run in the table
    argv     its flags without --dataset, strings and numbers
    figures  function of the run's network that returns a dict of more figures, or None
    quick    run it tiny
    dry      "list" or "look": do not run it but return None if it is missing; "look" prints nothing
    """
    argv = ("--dataset", "mnist", *argv)
    # Flags may have been chosen anew since a run was kept under this name, so the command has to be
    # the same. The table of --quick has the tiny one, also when it is only looked at.
    commands = {"full": command_of(argv), "tiny": command_of((*argv, *tiny(argv)))}
    known = load().get(name)
    if known and known["command"] not in commands.values():
        known = None
    if known or dry:
        if dry != "look":
            tell(name, known)
        return known

    command = commands["tiny" if quick else "full"]
    print(f"\n=== {name}: {command}", flush=True)
    folder = execute(name, command)
    result = json.loads((folder / "result.json").read_text())
    # The command says what the arguments say, and the looks are for a plot.
    for key in ("args", "made_from", "looks"):
        result.pop(key, None)
    if figures is not None:
        result.update(figures(common.load_net(folder / "model.pt", command, DEVICE)))
    entry = keep(name, command, result)
    # Removed, so that a run whose entry is taken out of the table is made again.
    (folder / "result.json").unlink()
    return entry


# ---- choosing a weight ---------------------------------------------------------------------------


def point(result):
    """Return (UR in %, FD / the Standard model's FD) of a run.

    A UR of 0 becomes 0.05 %, one sample in 2000, because everything here is on logarithmic scales.
    """
    return max(0.05, result["ur_after"]), result["fd_after"] / result["fd_before"]


def cost(result):
    """Return one number to choose by, the lower the better.

    It is ln of the FD ratio, plus half of ln UR where UR is above 1 %.
    """
    ur, fd_ratio = point(result)
    return math.log(fd_ratio) + 0.5 * max(0.0, math.log(ur))


def nearest(found):
    """Return the weight whose UR is nearest to 1 %, in ratios: 2 % is as near as 0.5 %.

    found  {weight: result of the run}

    Where no run comes down to 1 %, it is the weight of least cost.
    """
    if all(result["ur_after"] > 1 for result in found.values()):
        return min(found, key=lambda weight: cost(found[weight]))
    return min(found, key=lambda weight: abs(math.log(point(found[weight])[0])))


def walk(method, start, attempt):
    """Go from one weight to weaker or stronger ones, until two of them lie around UR 1 %.

    method   whose LADDER is walked
    start    weight to begin with
    attempt  function of a weight that returns the result of its run, or None

    It also ends where UR rises by a fifth although the push is stronger: the network has broken
    down. Returns {weight: result} in the order of the walk, or None while runs are missing.
    """
    weights = LADDER[method]
    found = {}
    ur_before = math.inf  # UR of the weaker neighbour, while the walk goes to stronger ones
    i = weights.index(start)
    while 0 <= i < len(weights):
        weight = weights[i]
        if weight in found:  # it has turned round: UR 1 % lies between the last two
            break
        result = attempt(weight)
        if not result:
            return None
        found[weight] = result

        ur = result["ur_after"]
        if ur > max(1, 1.2 * ur_before):
            break
        if ur > 1:
            ur_before = ur
            i += 1
        else:
            ur_before = math.inf
            i -= 1
    return found


class Choice(NamedTuple):
    """What the search has chosen for a method."""

    method: str
    flags: tuple  # learning rate, and noise and retain loss where they differ from `setting`
    best: float | None  # the weight
    reached: bool  # whether any run came down to UR 1 %

    def name(self, weight):
        """The name of the run of group vp with these flags, another weight and seed 0."""
        return vp_name(self.method, weight, self.flags)


def vp_name(method, weight, flags):
    """Return the name of a run in group vp, e.g. vp/obt/0.9/lr-0.0003-retain-distill."""
    tail = "-".join(str(flag).lstrip("-") for flag in flags)
    return f"vp/{method}/{weight}/{tail}"


def choose(method, **how):
    """Do the search that the top of this file describes, with seed 0.

    how  quick and dry, as in `run`

    Returns a Choice, or None while runs are missing.
    """
    weights = WEIGHTS[method].values
    middle = weights[len(weights) // 2]

    def attempt(weight, flags):
        argv = setting(method, *weigh(method, weight), *flags)
        return run(vp_name(method, weight, flags), *argv, **how)

    tried = {}  # flags -> result, all at the middle weight

    def try_flags(*flags):
        """Whether there is a result."""
        tried[flags] = attempt(middle, flags)
        return tried[flags] is not None

    def best_flags():
        return min(tried, key=lambda flags: cost(tried[flags]))

    # All three before the first `return`: --list shall show them although one is missing.
    has_result = [try_flags("--lr", lr) for lr in RATES]
    if not all(has_result):
        return None
    if method not in FIXED_METHODS:
        # One after the other: the second starts from what has been best so far.
        if not try_flags(*best_flags(), "--uniform-t"):
            return None
        if not try_flags(*best_flags(), "--retain", second_retain(method)):
            return None
    flags = best_flags()

    found = {weight: attempt(weight, flags) for weight in weights}
    if None in found.values():
        return None
    walked = walk(method, nearest(found), partial(attempt, flags=flags))
    if walked is None:
        return None
    reached = any(result["ur_after"] <= 1 for result in walked.values())
    return Choice(method, flags, nearest(found | walked), reached)


def chosen(method):
    """Return the Choice of group vp; while it is not done say so, and return None."""
    choice = choose(method, dry="look")
    if choice is None:
        print(f"missing vp/{method}: run --only vp first")
    return choice


# ---- the groups ----------------------------------------------------------------------------------
# Each is a function(methods, quick, dry) that runs what is missing, or lists it.


def group_vp(methods=tuple(WEIGHTS), **how):
    """Run every method on VP: the search with seed 0, then two more seeds."""
    for method in methods:
        choice = choose(method, **how)
        if choice is None:
            continue
        for seed in (1, 2):
            attempt = partial(run_seed, choice, seed=seed, **how)
            if choice.reached:
                walk(method, choice.best, attempt)
            else:
                attempt(choice.best)


def run_seed(choice, weight, seed, **how):
    """Run what was chosen with another weight and seed."""
    weight_flags = weigh(choice.method, weight)
    argv = setting(choice.method, *weight_flags, *choice.flags, "--seed", seed)
    return run(f"{choice.name(weight)}/s{seed}", *argv, **how)


def best_baseline():
    """Return the published baseline that is best in group vp, or None while one is missing.

    That is the one with the lowest FD at UR 1 %, of those that come there. If none does, it is the
    one of least cost at its chosen weight.
    """
    table = load()
    rank = {}
    for method in ("erasediff", "siss"):
        choice = chosen(method)
        if choice is None:
            return None
        fd_ratios = at_one(table, method, choice.name)
        if fd_ratios:
            rank[method] = (0, statistics.mean(fd_ratios))
        else:
            rank[method] = (1, cost(table[choice.name(choice.best)]))
    return min(rank, key=rank.get)


def long_name(method, weight):
    """Return the name of a run in group long with seed 0."""
    return f"long/{method}/{weight}"


def run_long(choice, weight, seed=0, **how):
    """Run what was chosen with another weight for 1000 steps."""
    method = choice.method
    name = long_name(method, weight)
    flags = (*weigh(method, weight), *choice.flags)
    if seed:
        name += f"/s{seed}"
        flags += ("--seed", seed)
    return run(name, *setting(method, *flags, steps=1000), **how)


def group_long(methods=(), **how):
    """Run the best methods for five times the steps: obt-rel, ascent and the best baseline."""
    for method in methods or ("obt-rel", "ascent", best_baseline()):
        choice = None if method is None else chosen(method)
        if choice is None:
            continue
        found = walk(method, choice.best, partial(run_long, choice, **how))
        if found:
            for seed in (1, 2):
                run_long(choice, nearest(found), seed, **how)


def ve_label(method, weight, steps):
    """Return the part of a run's name in group ve that comes after the classes."""
    label = f"{method}/{weight}"
    return label if steps == 200 else f"{label}/{steps}"


def run_ve(choice, weight, forget=(3,), steps=200, **how):
    """Run what was chosen in group vp on VE, with another weight, forget set and steps."""
    method = choice.method
    classes = "-".join(map(str, forget))
    flags = (*weigh(method, weight), *choice.flags)
    argv = setting(method, *flags, forget=forget, sde="ve", steps=steps)
    return run(f"ve/{classes}/{ve_label(method, weight, steps)}", *argv, **how)


def choose_ve(method, **how):
    """Walk on VE and forget 3: the Choice of group vp with the weight that is best here.

    Returns None while runs are missing.
    """
    choice = chosen(method)
    if choice is None:
        return None
    found = walk(method, choice.best, partial(run_ve, choice, **how))
    return choice._replace(best=nearest(found)) if found else None


def ve_rows(choice):
    """Return what group ve runs on all sets of classes: a list of (weight, steps).

    The poster's best rows lie below 1 %. So of obt-rel there is also the next stronger weight, and
    the weight found with more steps.
    """
    rows = [(choice.best, 200)]
    if choice.method == "obt-rel":
        weights = LADDER[choice.method]
        i = weights.index(choice.best)
        rows += [(weight, 200) for weight in weights[i + 1 : i + 2]]  # none after the strongest
        rows += [(choice.best, 1000)]
    return rows


def group_ve(methods=tuple(WEIGHTS), **how):
    """Run the poster's MNIST rows: VE, each method on three sets of classes."""
    for method in methods:
        choice = choose_ve(method, **how)
        if choice is None:
            continue
        for weight, steps in ve_rows(choice):
            for forget in ((3,), (7,), (3, 7)):
                run_ve(choice, weight, forget, steps, **how)


def group_ddpm(methods=("obt-rel", "obt", "ort", "unseen", "erasediff"), **how):
    """Run what group vp chose on the discrete chain."""
    for method in methods:
        choice = chosen(method)
        if choice is None:
            continue
        flags = (*weigh(method, choice.best), *choice.flags)
        run(f"ddpm/{method}", *setting(method, *flags, sde="ddpm"), **how)


def run_standard(name, steps, sde, more, figures, quick=False, dry=False):
    """Train a Standard model of 02 with so few steps, and keep the measures that 03 would give it.

    Its learning rate and average are those of 03 --from-scratch, so that the two compare.

    sde      from which its samples are drawn
    more     flags of 02 that this row has besides
    figures  function of its network that returns a dict of more figures
    """
    out = run_folder(name) / "quick" if quick else run_folder(name)  # 02 adds the folder itself
    path = out / "mnist" / "base.pt"
    steps = 3 if quick else steps
    argv = ["--dataset", "mnist", "--sde", "any", "--steps", steps, "--batch-size", 64]
    argv += ["--lr", 8e-3, "--ema", 0.999, "--log-sigma", -1.0, 1.4, "--wide", 0.1]
    argv += ["--width", 32, "--quick"] if quick else ["--width", 48]
    argv += more
    # 02 writes where --out says, so here it is a part of the command.
    command = f"{command_of(argv, '02')} --out {os.path.relpath(run_folder(name), ROOT)}"

    known = load().get(name)
    is_done = bool(known) and known["command"] == command
    if is_done or dry:
        tell(name, is_done)
        return

    # A process of its own: on Ctrl-C 02 saves and ends well, and its handler of the signal would
    # stay installed in this process.
    resume = ["--resume"] if path.exists() else []
    with subprocess.Popen([sys.executable, *command.split()[1:], *resume], cwd=ROOT) as training:
        try:
            status = training.wait()
        except KeyboardInterrupt:
            training.wait()  # Ctrl-C has reached it too: it saves now
            raise
    if status:
        raise SystemExit(status)  # it has said why
    if common.load_checkpoint(path, command, ("step",))["step"] < steps:
        common.exit_with_error("stopped; go on with the same command")
    result = measure_standard(path, command, sde, quick)
    keep(name, command, {**result, **figures(common.load_net(path, command, DEVICE))})


def measure_standard(path, command, sde, quick):
    """Measure a Standard model beside the shipped one, as 03 measures before and after."""
    script = load_script("03")
    argv = ["--dataset", "mnist", "--forget", "3", "--sde", sde, "--device", DEVICE]
    argv += ["--n", 20, "--nfe", 2, "--quick"] if quick else ["--n", 2000, "--nfe", NFE[sde]]
    args = script["arguments"]([*map(str, argv), "--out", str(PLACES.runs)])
    data = common.load_dataset("mnist")
    judge = common.load_judge(args, data)

    def draw(net, label):
        """The judge's verdict on args.n samples, drawn as 03 draws them."""
        shape = data.images.shape[1:]
        draw_samples = script["draw_samples"]
        return draw_samples(args, net, common.SDES[sde](), judge, shape, label).verdict

    standard = load_standard()
    verdict_before = draw(standard, "samples before")
    verdict_after = draw(common.load_net(path, command, DEVICE), "samples")
    images_g = data.images[data.labels != 3]
    real = common.judge_images(judge, common.reference_images(images_g, quick))
    before = common.measure(verdict_before, [3], real, 10)
    after = common.measure(verdict_after, [3], real, 10, verdict_before)
    return {
        "device": common.device_name(DEVICE),
        "n": args.n,
        "ur_before": before["ur"],
        "fd_before": before["fd"],
        "ur_after": after["ur"],
        "ur_interval": after["ur_interval"],
        "fd_after": after["fd"],
        "low_confidence_after": after["low_confidence"],
        "noise_after": after["noise"],
        "ur_no_noise_after": after["ur_no_noise"],
        **{key: after[key] for key in common.COMPARED},
    }


# ---- groups that measure finished models ---------------------------------------------------------


def network(name):
    """Return the model of a finished run, or with the name "standard" the Standard model.

    Where its file is gone, its command makes it again, with fewer samples, because training does
    not depend on them. On the same machine the weights are the same. On another machine they are
    the same up to what rounding does to 200 steps.
    """
    if name == "standard":
        return load_standard()
    command = load()[name]["command"]
    found = find_files(run_folder(name), "model.pt")
    # A run that was killed before it came into the table may have left another model here.
    note = run_folder(name) / "command.txt"
    if note.exists() and note.read_text() not in (command, f"{command} --n 10"):
        found = []
    if not found:
        shutil.rmtree(run_folder(name), ignore_errors=True)
        found = [execute(name, f"{command} --n 10") / "model.pt"]
    return common.load_net(found[0], command, DEVICE)


def load_standard():
    """Load the Standard model with which all runs of 03 begin."""
    # The arguments by which common.find_base finds it.
    args = argparse.Namespace(
        dataset="mnist", data_dir=None, out=PLACES.runs, device=DEVICE, quick=False
    )
    return common.load_net(*common.find_base(args), DEVICE)


def measured_model(name):
    """Return what says which model has a name: the command of its run, or Standard's digest."""
    if name == "standard":
        return common.weights_digest(load_standard())
    return load().get(name, {}).get("command")


def measure_models(group, runs, figures, dry):
    """Measure the Standard model and finished runs, and keep the results as group/label.

    runs     {label: name of the run}
    figures  function of a network that returns a dict
    """
    for label, name in {"standard": "standard", **runs}.items():
        key = f"{group}/{label}"
        measured = measured_model(name)
        is_done = key in load() and load()[key].get("model") == measured
        if is_done or dry:
            tell(key, is_done)
            continue
        command = f"python tests/make_tables.py --only {group}"
        result = {**figures(network(name)), "model": measured}
        print(key, keep(key, command, result), flush=True)


def test_images(n, forget=(3,)):
    """Return n dequantised test images of D_g, and n of D_f: two of (n, 1, 28, 28)."""
    test = common.load_dataset("mnist", train=False)
    is_forgotten = torch.isin(test.labels, torch.tensor(forget))
    # One generator for both, so common.random_subset, which makes one for each, does not fit here.
    generator = common.rng(0)
    torch.manual_seed(0)  # for the noise of dequantize
    chosen_images = []
    for images in (test.images[~is_forgotten], test.images[is_forgotten]):
        order = torch.randperm(len(images), generator=generator)
        chosen_images.append(common.dequantize(images[order[:n]]).to(DEVICE))
    return chosen_images


def bits_figures(net, n, steps, sde="ve", forget=(3,)):
    """Return bits/dim of n test images of D_g and of D_f, with the standard errors of the means."""
    result = {}
    for key, images in zip("gf", test_images(n, forget)):
        nats = []
        for x in images.split(64):
            probes = common.rademacher_probes(x, 1, common.rng(1))
            nats.append(
                common.ode_log_likelihood(net, common.SDES[sde](), x, probes, steps, focus=-3.0)
            )
        bits = common.bits_per_dim(torch.cat(nats), images[0].numel())
        result[f"bpd_{key}"] = bits.mean().item()
        result[f"error_{key}"] = (bits.std() / math.sqrt(len(bits))).item()
    return result


def group_nll(quick=False, dry=False):
    """Measure the likelihood of test images under the VE models that forget 3."""
    figures = (
        partial(bits_figures, n=2, steps=2) if quick else partial(bits_figures, n=128, steps=16)
    )
    runs = {}
    for method in WEIGHTS:
        choice = choose_ve(method, dry="look")
        if choice:
            runs[f"{method}/{choice.best}"] = f"ve/3/{ve_label(method, choice.best, 200)}"
    measure_models("nll", runs, figures, dry)


def noise_figures(net, n):
    """Return the v-loss by noise level of n test images of D_g and of D_f, each as 02 prints it."""
    loss_by_noise = load_script("02")["loss_by_noise"]
    images_g, images_f = test_images(n)
    return {"g": loss_by_noise(net, images_g), "f": loss_by_noise(net, images_f)}


def group_noise(quick=False, dry=False):
    """Measure at which noise levels the models of group vp have forgotten."""
    runs = {}
    for method in WEIGHTS:
        choice = choose(method, dry="look")
        if choice:
            runs[f"{method}/{choice.best}"] = choice.name(choice.best)
    measure_models("noise", runs, partial(noise_figures, n=4 if quick else 500), dry)


# ---- the paper's losses, given their time --------------------------------------------------------
# VE and learning rate 1e-3 for all, and uniform times for most. Samples and likelihoods are as in
# the other groups. All runs but those of the walk compute in bfloat16, which takes a third off
# their hours.

WALK_STEPS = 500
PAPER_ALPHAS = (0.99, 0.95, 0.9, 0.7, 0.5)
RETAINS = ("dsm", "distill")
# The weights of the other methods, found in groups vp and ve.
PAPER_BASELINES = {
    "erasediff": ("--eta", 0.001, "--uniform-t", "--retain", "distill"),
    "unseen": (),
    "obt-rel": ("--kappa", 1.7),
    "obt-rel/uniform-t": ("--kappa", 1.7, "--uniform-t"),
}


def paper_bits(quick, sde="ve", forget=(3,)):
    """Return the function of a network that measures the likelihoods of group paper."""
    # Networks that have been pushed far are less smooth, so they get twice the steps of group nll.
    size = {"n": 2, "steps": 2} if quick else {"n": 128, "steps": 32}
    return partial(bits_figures, sde=sde, forget=forget, **size)


def run_paper(name, method, *flags, forget=(3,), sde="ve", steps=1500, quick=False, dry=False):
    """Run one row of group paper, likelihoods included.

    name   of the run behind "paper/"
    flags  its weight, and what differs from `setting`
    """
    if steps > WALK_STEPS:
        flags = (*flags, "--bf16")
    argv = setting(method, "--lr", 1e-3, *flags, forget=forget, sde=sde, steps=steps)
    figures = paper_bits(quick, sde, forget)
    return run(f"paper/{name}", *argv, figures=figures, quick=quick, dry=dry)


def paper_flags(method, alpha, retain):
    """Return the flags of the paper's method `method` with this alpha and L_g."""
    return ("--alpha", alpha, "--uniform-t", "--retain", retain)


def choose_paper_alpha(method, retain, **how):
    """Walk down PAPER_ALPHAS with WALK_STEPS each, and return the best alpha, or None.

    A run keeps D_g if the NLL of D_g rises by at most 1.1 bits/dim over the Standard model's. It
    also forgets, in the paper's sense, if the NLL of D_f rises by at least 5. Of the runs that do
    both, the best one has the least FD. If none does both, it is the one that raises the NLL of D_f
    most among those that keep D_g. If none keeps D_g, it is the one that raises the NLL of D_g
    least. None is returned while runs are missing.

    The walk ends after the second run that does both, or that has lost D_g: a smaller alpha only
    pushes harder.
    """
    standard = load().get("paper/standard")
    found = {}
    for alpha in PAPER_ALPHAS:
        flags = paper_flags(method, alpha, retain)
        name = f"walk/{method}/{retain}/{alpha}"
        found[alpha] = run_paper(name, method, *flags, steps=WALK_STEPS, **how)
        if standard and None not in found.values() and walk_is_over(found, standard):
            break
    if standard is None or None in found.values():
        return None
    return best_paper_alpha(found, standard)


# By how much the NLL may rise on D_g, and by how much it has to rise on D_f, bits/dim.
KEEPING = 1.1
FORGETTING = 5


def rises(result, standard):
    """Return by how much the NLL of D_g and that of D_f have risen, bits/dim."""
    return [result[key] - standard[key] for key in ("bpd_g", "bpd_f")]


def walk_is_over(found, standard):
    """Tell whether two runs of {alpha: result} did both, or lost D_g, as choose_paper_alpha says.

    A training that broke down, without a number, has lost D_g.
    """
    rise = [rises(result, standard) for result in found.values()]
    ends = [not (g <= KEEPING and f < FORGETTING) for g, f in rise]
    return sum(ends) >= 2


def best_paper_alpha(found, standard):
    """Choose from {alpha: result} as choose_paper_alpha says; `standard` has the bits/dim before.

    Results without a number, after a training that broke down, are not chosen.
    """
    rise = {alpha: rises(result, standard) for alpha, result in found.items()}
    sound = [alpha for alpha in found if all(map(math.isfinite, rise[alpha]))]
    keeping = [alpha for alpha in sound if rise[alpha][0] <= KEEPING]
    forgetting = [alpha for alpha in keeping if rise[alpha][1] >= FORGETTING]
    if forgetting:
        return min(forgetting, key=lambda alpha: found[alpha]["fd_after"])
    if keeping:
        return max(keeping, key=lambda alpha: rise[alpha][1])
    return min(sound, key=lambda alpha: rise[alpha][0], default=None)


def measure_shipped(quick=False, dry=False):
    """Keep the likelihoods of the shipped Standard model as paper/standard."""
    figures = paper_bits(quick)
    measure_models("paper", {}, figures, dry)


def paper_walk(**how):
    """Choose alpha for both of the paper's losses with both retain losses."""
    measure_shipped(**how)
    for method in ("ort", "obt"):
        for retain in RETAINS:
            choose_paper_alpha(method, retain, **how)


def chosen_paper_runs(dry):
    """Yield (method, retain, flags with the alpha of the walk), as far as the walk is done."""
    for method in ("ort", "obt"):
        for retain in RETAINS:
            alpha = choose_paper_alpha(method, retain, dry="look")
            if alpha is not None:
                yield method, retain, paper_flags(method, alpha, retain)
            elif dry != "look":
                print(f"missing paper/walk/{method}/{retain}: run --only paper/walk first")


def paper_three(**how):
    """Run forget 3 on VE: the paper's losses with 1500 and 5000 steps, and the others with 1500."""
    for method, retain, flags in chosen_paper_runs(how.get("dry")):
        run_paper(f"3/{method}/{retain}/1500", method, *flags, **how)
    for label, flags in PAPER_BASELINES.items():
        run_paper(f"3/{label}/1500", label.split("/")[0], *flags, **how)
    for method, retain, flags in chosen_paper_runs("look"):
        run_paper(f"3/{method}/{retain}/5000", method, *flags, steps=5000, **how)


def paper_scratch(**how):
    """Run the poster's Table 1: 10,000 steps from random weights, L_g is score matching."""
    figures = paper_bits(how.get("quick", False))
    run_standard("paper/scratch/standard", 10_000, "ve", ["--bf16"], figures, **how)
    scratch = ("--from-scratch", "--lr", 8e-3, "--bf16")
    runs = [("unseen", scratch)]
    for method, retain, flags in chosen_paper_runs(how.get("dry")):
        if retain == "dsm":
            runs.append((method, (*scratch, *flags)))
    for method, flags in runs:
        argv = setting(method, *flags, sde="ve", steps=10_000, ema=0.999)
        run(f"paper/scratch/{method}", *argv, figures=figures, **how)


def paper_others(forget=(3,), sde="ve", **how):
    """Run other classes or another SDE with 1500 steps."""
    place = "-".join(map(str, forget)) if sde == "ve" else sde
    setup = {"forget": forget, "sde": sde, **how}
    for method, retain, flags in chosen_paper_runs(how.get("dry")):
        run_paper(f"{place}/{method}/{retain}/1500", method, *flags, **setup)
    for label, flags in PAPER_BASELINES.items():
        run_paper(f"{place}/{label}/1500", label.split("/")[0], *flags, **setup)


def paper_more(**how):
    """Run what is left of obt-rel: 5000 steps."""
    for label in ("obt-rel", "obt-rel/uniform-t"):
        run_paper(f"3/{label}/5000", "obt-rel", *PAPER_BASELINES[label], steps=5000, **how)


PAPER_ROWS = {
    "walk": paper_walk,
    "3": paper_three,
    "scratch": paper_scratch,
    "7": partial(paper_others, (7,)),
    "3-7": partial(paper_others, (3, 7)),
    "vp": partial(paper_others, sde="vp"),
    "more": paper_more,
}


def group_paper(methods=tuple(PAPER_ROWS), **how):
    """Run the paper's losses with the time that they need, row by row."""
    for row in methods:
        PAPER_ROWS[row](**how)


# ---- until it has forgotten ----------------------------------------------------------------------


def until_row(*forget, wish=1.0, sde="vp", more=()):
    """Return all flags of a run of 03 that ends by itself.

    forget  the classes to forget
    wish    the UR to come to, in percent
    more    flags that come last
    """
    argv = ["--forget", *forget, "--method", "obt-rel", "--sde", sde, "--until", wish]
    argv += ["--max-steps", 1000, "--batch-size", 64, "--lr", 3e-3, "--retain", "distill"]
    argv += ["--no-uniform-t", "--log-sigma", 0.0, 0.7, "--ema", 0.98]
    return (*argv, "--n", 2000, "--nfe", NFE[sde], *more)


def until_rows():
    """Return the runs of group until, {name: flags}, the most important ones first."""
    rows = {str(digit): until_row(digit) for digit in range(10)}
    # The more is to be forgotten, the more of it the judge's mistakes alone leave over.
    for forget in ((3, 7), (4, 9), (0, 1), (1, 5, 8)):
        rows["-".join(map(str, forget))] = until_row(*forget, wish=1.5)
    rows["0-1-2-3-4"] = until_row(*range(5), wish=2.0)
    for sde in ("ve", "subvp", "ddpm"):
        for digit in (3, 7):
            rows[f"{sde}/{digit}"] = until_row(digit, sde=sde)
    for seed in (1, 2):
        rows[f"3/s{seed}"] = until_row(3, more=("--seed", seed))
    for seed in (0, 1, 2):
        rows[f"bf16/s{seed}"] = until_row(3, more=("--seed", seed, "--bf16"))
    return rows


def group_until(methods=(), **how):
    """Run obt-rel until it has forgotten, without a strength and a length that somebody chose."""
    for name, argv in until_rows().items():
        if not methods or name in methods:
            run(f"until/{name}", *argv, **how)


def until_lines(rows):
    """Yield the table of runs that end by themselves."""
    named = {name: rows[name] for name in until_rows() if name in rows}
    yield from ending_lines(named)
    digits = [named[str(digit)] for digit in range(10) if str(digit) in named]
    if len(digits) == 10:
        medians = [
            statistics.median(result[key] for result in digits)
            for key in ("steps", "kappa", "seconds_trained", "seconds_of_looks")
        ]
        cells = "{:.0f}, {:.2f} | {:.0f}, {:.0f}".format(*medians)
        yield f"| median of the ten digits | | | | | | | {cells} | |"


def ending_lines(rows):
    """Yield a row for each run that ends by itself; seconds are those of training and looks.

    rows  {name: result}
    """
    yield (
        "| forget | UR % (95 %) | without noise | FD / Standard's | class_min_ratio, of | unsure % "
        f"| {INSTEAD} | steps, kappa | s, of looks | reached |"
    )
    yield "|---" * 10 + "|"
    for name, result in rows.items():
        low, high = result["ur_interval"]
        cells = [
            f"{result['ur_before']:.2f} to {result['ur_after']:.2f} [{low:.1f}, {high:.1f}]",
            f"{result['ur_no_noise_after']:.2f}",
            f"x{result['fd_after'] / result['fd_before']:.2f}",
            f"{result['class_min_ratio']:.2f}, {result['worst_class']}",
            f"{result['low_confidence_before']:.1f} to {result['low_confidence_after']:.1f}",
            instead_cell(result),
            f"{result['steps']}, {result['kappa']:.2f}",
            f"{result['seconds_trained']:.0f}, {result['seconds_of_looks']:.0f}",
            "; ".join(result["not_reached"]) or "yes",
        ]
        yield f"| {name} | {' | '.join(cells)} |"


# ---- measures that kept runs did not have --------------------------------------------------------


def chosen_runs():
    """Yield the names of the runs in the tables above that can tell what stands instead."""
    table = load()
    for method in WEIGHTS:
        choice = choose(method, dry="look")
        if choice is None:
            continue
        yield choice.name(choice.best)
        longer = {weight: table.get(long_name(method, weight)) for weight in LADDER[method]}
        longer = {weight: result for weight, result in longer.items() if result}
        if longer:
            yield long_name(method, nearest(longer))
    for label in ve_labels():
        yield f"ve/3/{label}"
    yield from (name for name in table if name.startswith("ddpm/"))


def group_instead(quick=False, dry=False):
    """Make the runs of the tables above again: what stands where the Standard model drew a 3."""
    for name in chosen_runs():
        known = load().get(name)
        if known:
            run(f"instead/{name}", *known["command"].split()[4:], quick=quick, dry=dry)


ANGLE_SIGMAS = [10 ** (i / 4) for i in range(-8, 9)]  # from 0.01 to 100


def angle_figures(net, n, sigmas=ANGLE_SIGMAS):
    """Compare the network's score with the data score -z on test images, by noise level.

    Returns {"g": rows, "f": rows} for n images of D_g and of D_f; a row is [sigma, cosine of the
    two, ratio of their lengths |z_hat|/|z|], means over the images.
    """
    return {key: angle_rows(net, images, sigmas) for key, images in zip("gf", test_images(n))}


@torch.no_grad()
def angle_rows(net, x, sigmas):
    """Return the rows of angle_figures for the images x (n, C, H, W)."""
    rows = []
    for sigma in sigmas:
        # The same noise at every level and for every network: two rows differ by these alone.
        z = common.randn(x.shape, common.rng(2), x.device)
        levels = torch.full((len(x),), sigma, device=x.device)
        _, z_hat = common.predict(net, x + sigma * z, levels)
        lengths = [part.flatten(1).norm(dim=1) for part in (z, z_hat)]
        cosine = (z * z_hat).flatten(1).sum(1) / (lengths[0] * lengths[1])
        ratio = lengths[1] / lengths[0]
        rows.append([sigma, cosine.mean().item(), ratio.mean().item()])
    return rows


def angle_runs():
    """Return {label: name of the run} of the models whose angles are shown, as far as there are."""
    table = load()
    names = {
        "unseen": "paper/3/unseen/1500",
        "ort": "paper/3/ort/dsm/1500",
        "obt": "paper/3/obt/dsm/1500",
        "obt-rel": "paper/3/obt-rel/1500",
    }
    return {label: name for label, name in names.items() if name in table}


def group_angles(quick=False, dry=False):
    """Measure the angle that the paper speaks of, between the network's score and the data's."""
    measure_models("angles", angle_runs(), partial(angle_figures, n=4 if quick else 200), dry)


# ---- tables --------------------------------------------------------------------------------------
# Each is a function that yields the lines of a Markdown table.


def run_lines(rows):
    """Yield the table of a group of runs, {name without the group: result}."""
    header = "| run | UR % (95 %) | FD | FD / Standard's | class_min_ratio | unsure %"
    yield f"{header} | {INSTEAD} | s |"
    yield "|---" * 8 + "|"
    for name, result in rows.items():
        low, high = result["ur_interval"]
        ur = f"{result['ur_before']:.2f} to {result['ur_after']:.2f} ({low:.1f}-{high:.1f})"
        fd = f"{result['fd_before']:.2f} to {result['fd_after']:.2f}"
        ratio = result["fd_after"] / result["fd_before"]
        kept = f"{result['class_min_ratio']:.2f} | {result['low_confidence_after']:.1f}"
        kept += f" | {instead_cell(result)} | {result['seconds']:.0f}"
        yield f"| {name} | {ur} | {fd} | x{ratio:.2f} | {kept} |"


def ve_lines(rows):
    """Yield the table of group ve: the weights found on forget 3, a column for each forget set."""
    forget_sets = ("3", "7", "3-7")
    header = "| run | 3: UR % (95 %), FD / Standard's, class_min_ratio | 7 | 3 and 7"
    yield f"{header} | 3, {INSTEAD} | s, together |"
    yield "|---" * 6 + "|"
    is_first = True
    for label in ve_labels():
        names = [f"{forget}/{label}" for forget in forget_sets]
        if not all(name in rows for name in names):
            continue
        runs = [rows[name] for name in names]
        if is_first:  # the Standard model is the same in all rows, so once is enough
            cells = [f"{result['ur_before']:.2f}, FD {result['fd_before']:.2f}" for result in runs]
            yield f"| standard | {' | '.join(cells)} | | |"
            is_first = False
        cells = [ve_cell(result) for result in runs]
        seconds = sum(result["seconds"] for result in runs)
        yield f"| {label} | {' | '.join(cells)} | {instead_cell(runs[0])} | {seconds:.0f} |"


def ve_labels():
    """Return the labels of all rows of group ve, as far as their weights have been found."""
    labels = []
    for method in WEIGHTS:
        choice = choose_ve(method, dry="look")
        if choice:
            labels += [ve_label(method, weight, steps) for weight, steps in ve_rows(choice)]
    return labels


def ve_cell(result):
    """Return the measures of one run of group ve in one cell."""
    low, high = result["ur_interval"]
    _, fd_ratio = point(result)
    ur = f"{result['ur_after']:.2f} [{low:.1f}, {high:.1f}]"
    return f"{ur}, x{fd_ratio:.2f}, {result['class_min_ratio']:.2f}"


def nll_lines(rows):
    """Yield the table of likelihoods."""
    yield "| model | D_g | D_f |"
    yield "|---|---|---|"
    for name, result in rows.items():
        cells = [f"{result[f'bpd_{k}']:.3f} +- {result[f'error_{k}']:.3f}" for k in "gf"]
        yield f"| {name} | {' | '.join(cells)} |"


def noise_lines(rows):
    """Yield the table of losses by noise level, D_g / D_f."""
    bins = next(iter(rows.values()))["g"]
    header = [f"sigma {low:g}-{high:g}" for low, high, _ in bins]
    yield f"| model | {' | '.join(header)} |"
    yield "|---" * (len(bins) + 1) + "|"
    for name, result in rows.items():
        pairs = zip(result["g"], result["f"])
        cells = [f"{loss_g:.3f} / {loss_f:.3f}" for (_, _, loss_g), (_, _, loss_f) in pairs]
        yield f"| {name} | {' | '.join(cells)} |"


# The poster's UR in %, by the forgotten classes and the method, Table 1 (MNIST, VE). Its bits/dim
# are those of CIFAR-10, of D_g and of D_f; they stand beside the runs that forget the 3 with VE.
POSTER_UR = {
    ("3", "standard"): 11.0,
    ("7", "standard"): 15.8,
    ("3-7", "standard"): 26.8,
    ("3", "ort"): 0.4,
    ("3", "obt"): 1.5,
    ("3", "unseen"): 1.8,
    ("3", "erasediff"): 1.4,
    ("7", "ort"): 0.8,
    ("7", "obt"): 3.6,
    ("7", "unseen"): 2.3,
    ("7", "erasediff"): 1.1,
    ("3-7", "ort"): 1.2,
    ("3-7", "obt"): 5.1,
    ("3-7", "unseen"): 4.1,
    ("3-7", "erasediff"): 2.5,
}
POSTER_BITS = {
    "standard": "2.82 / 2.78",
    "ort": "3.92 / 13.23",
    "obt": "3.70 / 12.08",
    "unseen": "3.07 / 3.01",
    "erasediff": "3.30 / 3.74",
}


def paper_lines(rows):
    """Yield the table of group paper, with the poster's figures beside ours."""
    yield (
        "| run | UR % (95 %) | without noise | FD / Standard's | unsure % | class_min_ratio "
        f"| {INSTEAD} | NLL of D_g / D_f | s | poster: UR, NLL (CIFAR-10) |"
    )
    yield "|---" * 10 + "|"
    for name, result in rows.items():
        yield f"| {name} | {' | '.join(paper_cells(name, result))} |"


def paper_cells(name, result):
    """Return the cells of one row of group paper behind its name."""
    bits = f"{result['bpd_g']:.2f} / {result['bpd_f']:.2f}"
    if "ur_after" not in result:  # the shipped Standard model: its likelihoods alone
        return [
            "",
            "",
            "",
            "",
            "",
            "",
            bits,
            "",
            f"{POSTER_UR['3', 'standard']}, {POSTER_BITS['standard']}",
        ]
    low, high = result["ur_interval"]
    ratio = result["fd_after"] / result["fd_before"]
    seconds = f"{result['seconds']:.0f}" if "seconds" in result else ""
    if result.get("device", "cpu") != "cpu":
        seconds += " on a GPU"
    place, method = name.split("/")[:2]
    forget = "3" if place in ("walk", "scratch") else place
    poster = [POSTER_UR.get((forget, method)), POSTER_BITS.get(method) if forget == "3" else None]
    return [
        f"{result['ur_before']:.2f} to {result['ur_after']:.2f} ({low:.1f}-{high:.1f})",
        f"{result['ur_no_noise_after']:.2f}",
        f"x{ratio:.2f}",
        f"{result['low_confidence_after']:.1f}",
        f"{result['class_min_ratio']:.2f}",
        instead_cell(result),
        bits,
        seconds,
        ", ".join(str(value) for value in poster if value is not None),
    ]


# The title of the cells that instead_cell writes.
INSTEAD = "instead, %: other / unsure / noise / still"


def instead_cell(result):
    """Write what stands where the Standard model drew a forget class, four shares in percent.

    Runs that did not measure it have been made again in group instead, by the same command. The
    cell is empty where that is missing.
    """
    names = ("other", "unsure", "noise", "forgotten")
    for run in (result, *repeats_of(result)):
        if "instead_other" in run:
            return " / ".join(f"{run[f'instead_{name}']:.0f}" for name in names)
    return ""


def repeats_of(result):
    """Return the runs of group instead that have the command of this run: one, or none."""
    table = load()
    repeats = [table[name] for name in table if name.startswith("instead/")]
    return [run for run in repeats if run["command"] == result.get("command")]


def instead_lines(rows):
    """Yield the table of what stands where the Standard model drew a 3."""
    yield f"| run | UR % | without noise | {INSTEAD} |"
    yield "|---|---|---|---|"
    for name, result in rows.items():
        ur = f"{result['ur_after']:.2f} | {result['ur_no_noise_after']:.2f}"
        yield f"| {name} | {ur} | {instead_cell(result)} |"


def angle_lines(rows):
    """Yield the table of angles: cosine and ratio of lengths on D_g, then on D_f."""
    shown = [0, 4, 8, 10, 12, 16]  # of ANGLE_SIGMAS: 0.01, 0.1, 1, 3.2, 10, 100
    header = [f"sigma {ANGLE_SIGMAS[i]:.2g}" for i in shown]
    yield f"| model | {' | '.join(header)} |"
    yield "|---" * (len(shown) + 1) + "|"
    for name, result in rows.items():
        for key in "gf":
            cells = [f"{result[key][i][1]:.3f}, x{result[key][i][2]:.2f}" for i in shown]
            yield f"| {name}, D_{key} | {' | '.join(cells)} |"


def tables(table):
    """Print all finished runs as Markdown, one table for each group."""
    for name, group in GROUPS.items():
        prefix = f"{name}/"
        rows = {key.removeprefix(prefix): table[key] for key in table if key.startswith(prefix)}
        if rows:
            print(f"\n### {name}: {group.title}\n")
            print(*group.lines(rows), sep="\n")


# ---- FD at UR 1 %, and the figure ----------------------------------------------------------------


def fd_at_one_percent(points):
    """Return [FD ratio at UR 1 %] of the runs of one seed, or [] where none can be had.

    points  (UR, FD ratio) for each weight, in the order of the weights

    It lies on the straight line between the first two neighbours around UR 1 %, with both axes
    logarithmic. Neighbours only: a network that broke down comes back above 1 % further on.
    """
    logs = [(math.log(ur), math.log(fd_ratio)) for ur, fd_ratio in points]
    for (ur_a, fd_a), (ur_b, fd_b) in zip(logs[:-1], logs[1:]):
        is_around = min(ur_a, ur_b) <= 0 <= max(ur_a, ur_b)  # ln 1 = 0
        if is_around and ur_a != ur_b:
            slope = (fd_b - fd_a) / (ur_b - ur_a)
            return [math.exp(fd_a - slope * ur_a)]
    return []


def points_of(table, method, name, seed=""):
    """Return (UR, FD ratio) of the runs that are there, the weakest weight first.

    name  function of a weight that returns the name of its run with seed 0
    seed  what the name has behind that: "", "/s1" or "/s2"
    """
    names = [name(weight) + seed for weight in LADDER[method]]
    return [point(table[key]) for key in names if key in table]


def at_one(table, method, name):
    """Return FD ratios at UR 1 %, one for each seed that has runs on both sides of it."""
    ratios = []
    for seed in ("", "/s1", "/s2"):
        ratios += fd_at_one_percent(points_of(table, method, name, seed))
    return ratios


def seed_names(table, name):
    """Return the names of the runs with other seeds that belong to a run with seed 0."""
    return [key for key in table if key.startswith(f"{name}/s")]


class Curve(NamedTuple):
    """One curve of the figure, and one line of the table under it."""

    method: str
    steps: int
    name: Callable  # function of a weight that returns the name of its run with seed 0
    best: float | None  # the weight chosen
    flags: tuple  # what the search has chosen besides


def curves(table):
    """Yield what the figure and the table under it show, as far as it is there."""
    for method in WEIGHTS:
        choice = choose(method, dry="look")
        if choice is None:
            continue
        yield Curve(method, 200, choice.name, choice.best, choice.flags)

        name = partial(long_name, method)
        longer = {weight: table[name(weight)] for weight in LADDER[method] if name(weight) in table}
        if longer:
            yield Curve(method, 1000, name, nearest(longer), (*choice.flags, "--steps", 1000))


def mean_and_range(values, mark=""):
    """Write the mean, e.g. "x0.99 (0.86 to 1.14)"; the range only of more than one value."""
    text = f"{mark}{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ({min(values):.2f} to {max(values):.2f})"
    return text


def summary_lines(table):
    """Yield the table under the figure: what the chosen weights give, and FD at UR 1 %.

    Means over the seeds, of UR and FD with the least and the largest. What stands instead is of
    seed 0.
    """
    header = "| method | chosen | seeds | UR % | FD | class_min_ratio | unsure % | FD at UR 1 %"
    yield f"{header} | {INSTEAD} (seed 0) |"
    yield "|---" * 9 + "|"
    for curve in curves(table):
        name = curve.name(curve.best)
        runs = [table[key] for key in (name, *seed_names(table, name))]
        chosen_flags = " ".join(map(str, (*weigh(curve.method, curve.best), *curve.flags)))
        ur = mean_and_range([result["ur_after"] for result in runs])
        fd = mean_and_range([point(result)[1] for result in runs], "x")
        least = statistics.mean(result["class_min_ratio"] for result in runs)
        unsure = statistics.mean(result["low_confidence_after"] for result in runs)
        yield (
            f"| {curve.method} | `{chosen_flags}` | {len(runs)} | {ur} | {fd} "
            f"| {least:.2f} | {unsure:.1f} | {one_percent_cell(table, curve)} "
            f"| {instead_cell(runs[0])} |"
        )


def one_percent_cell(table, curve):
    """Write FD at UR 1 %, or why there is none."""
    ratios = at_one(table, curve.method, curve.name)
    if ratios:
        cell = mean_and_range(ratios, "x")
        num_seeds = 1 + len(seed_names(table, curve.name(curve.best)))
        return cell if len(ratios) == num_seeds else f"{cell} ({len(ratios)} of {num_seeds} seeds)"
    if all(ur < 1 for ur, _ in points_of(table, curve.method, curve.name)):
        return "below it at every weight"
    return "does not come there"


def figure(table, path):
    """Draw UR against FD: a curve for each method over its weights, from seed 0.

    Small markers are other seeds at the chosen weight, dashed curves have 1000 steps. Where no
    sample was judged a 3, UR is drawn as 0.05 %.
    """
    plt = common.pyplot()
    fig, ax = plt.subplots(figsize=(8, 4.4))
    styles = common.method_styles(WEIGHTS)
    small = {"ls": "", "ms": 4}
    for curve in curves(table):
        style = {**styles[curve.method], "ms": 7, "label": curve.method}
        if curve.steps != 200:
            style |= {"linestyle": "--", "mfc": "white", "label": None}
        ur, fd_ratio = zip(*points_of(table, curve.method, curve.name))
        ax.plot(ur, fd_ratio, **style)
        color, marker = common.METHOD_STYLES[curve.method]
        for key in seed_names(table, curve.name(curve.best)):
            ax.plot(*point(table[key]), marker, color=color, **small)

    # Empty curves, for the legend alone.
    ax.plot([], [], "o--", color="0.4", ms=7, mfc="white", label="1000 steps")
    ax.plot([], [], "o", color="0.4", **small, label="small: other seeds")
    ax.axvline(1, color="0.6", lw=1)
    ax.axhline(1, color="0.6", lw=1)
    ax.set(
        xscale="log",
        yscale="log",
        xticks=(0.05, 0.2, 0.5, 1, 2, 5, 10),
        yticks=(1, 2, 5, 10),
        xlabel="unlearning ratio, % of samples judged a 3 (left: forgotten)",
        ylabel="FD / Standard's FD (low: kept)",
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")  # 0.2, where a log axis would have 2 x 10^-1
        axis.set_minor_formatter("")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    fig.tight_layout()
    common.save_figure(fig, path, dpi=90)


def angle_figure(table, path):
    """Draw group angles: cosine and ratio of lengths over sigma, on D_g and on D_f."""
    plt = common.pyplot()
    fig, axes = plt.subplots(2, 2, figsize=(8, 5.2), sharex=True, sharey="row")
    keys = [key for key in ("standard", *WEIGHTS) if f"angles/{key}" in table]
    for label, style in common.method_styles(keys).items():
        result = table[f"angles/{label}"]
        for column, key in enumerate("gf"):
            sigma, cosine, ratio = zip(*result[key])
            axes[0, column].plot(sigma, cosine, **style, ms=4, label=label)
            axes[1, column].plot(sigma, ratio, **style, ms=4)
    for ax, title in zip(axes[0], ("D_g, kept", "D_f, forgotten")):
        ax.set(title=title, xscale="log")
        ax.axhline(0, color="0.7", lw=1)
    for ax in axes[1]:
        ax.set(xlabel="noise level sigma (data in [-1, 1])", xscale="log")
        ax.axhline(1, color="0.7", lw=1)
    axes[0, 0].set_ylabel("cosine of z_hat and z")
    axes[1, 0].set_ylabel("|z_hat| / |z|")
    axes[0, 0].legend(fontsize=8)
    fig.tight_layout()
    common.save_figure(fig, path, dpi=90)


# ---- text to image: the runs of 06 ---------------------------------------------------------------


def group_t2i(methods=t2i_table.METHODS, quick=False, dry=False):
    """Run 06 with every method; the table is a file of its own, t2i.json."""
    path = t2i_table.table_path(PLACES.runs, quick)
    t2i_table.fill(PLACES.runs, path, methods, quick, dry)


# ---- the story -----------------------------------------------------------------------------------


class Group(NamedTuple):
    """One group of runs: what it is, what runs it, and how its table is written."""

    title: str
    fill: Callable  # function(methods, quick, dry); without methods where `rows` is empty
    lines: Callable = run_lines
    rows: tuple = tuple(WEIGHTS)  # what can be named after a slash in --only


GROUPS = {
    "vp": Group("Every method, VP, forget 3, 200 steps of 64 + 64 images.", group_vp),
    "long": Group(
        "Does quality hold at five times the steps? Obt-rel, ascent, the best published baseline.",
        group_long,
    ),
    "ve": Group("The poster's MNIST rows: VE, forget 3, 7, and 3 and 7.", group_ve, ve_lines),
    "ddpm": Group("The 1000-step chain, ancestral sampling in 50.", group_ddpm),
    "nll": Group(
        "Bits/dim of test images of D_g and D_f under the VE models that forget 3, "
        "mean and standard error.",
        group_nll,
        nll_lines,
        rows=(),
    ),
    "noise": Group(
        "Where forgetting happens: v-loss of D_g and D_f by noise level, "
        "the weights chosen in group vp.",
        group_noise,
        noise_lines,
        rows=(),
    ),
    "paper": Group(
        "The paper's losses, given their time: VE unless said, 64 + 64 images a step.",
        group_paper,
        paper_lines,
        rows=tuple(PAPER_ROWS),
    ),
    "until": Group(
        "Until it has forgotten: obt-rel finds its length and its strength by itself.",
        group_until,
        until_lines,
        rows=tuple(until_rows()),
    ),
    "instead": Group(
        "What stands where the Standard model drew a 3: the runs of the tables above, made again.",
        group_instead,
        instead_lines,
        rows=(),
    ),
    "angles": Group(
        "The angle itself: cosine of z_hat and z, and |z_hat|/|z|, on test images; "
        "runs of group paper with 1500 steps.",
        group_angles,
        angle_lines,
        rows=(),
    ),
    "t2i": Group(
        "Text to image: 06 on the shipped pipeline, 16 + 16 images a step.",
        group_t2i,
        rows=t2i_table.METHODS,
    ),
}


def arguments(argv):
    """Read the command line."""
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--only",
        metavar="GROUP[/METHOD]",
        help=f"one of: {', '.join(GROUPS)}; of a group of runs also one method, e.g. vp/ort "
        "(default: all)",
    )
    p.add_argument("--list", action="store_true", help="show what is done and what is missing")
    p.add_argument("--draw", action="store_true", help="tables and figure of what is done")
    p.add_argument(
        "--quick", action="store_true", help="the same path with tiny runs, into a table of its own"
    )
    args = p.parse_args(argv)
    if args.list and args.draw:
        common.exit_with_error("--list says what is missing and --draw shows the rest: give one")
    return args


def check_row(only):
    """Split --only into (group, method), either may be ""; exit with one line if unknown."""
    if only is None:
        return "", ""
    name, slash, method = only.partition("/")
    if name not in GROUPS:
        common.exit_with_error(f"--only {only}: choose a group from: {', '.join(GROUPS)}")
    rows = GROUPS[name].rows
    if slash and method not in rows:
        what = f"the rows {', '.join(rows)}" if rows else "no rows of its own"
        common.exit_with_error(f"--only {only}: {name} has {what}")
    return name, method


def main(argv=None):
    """Run or list what is asked for, then write the tables and the figure."""
    args = arguments(argv)
    only, method = check_row(args.only)
    if args.quick:  # its models must not lie where nll and noise look for real ones
        PLACES.runs = PLACES.runs / "quick"
        PLACES.table = PLACES.runs / "tables.json"
    common.remove_leftovers(common.make_folder(PLACES.runs))
    if not (args.draw or args.list):
        common.refuse_unwritable(PLACES.table)
    save_time()

    if not args.draw:
        methods = {"methods": (method,)} if method else {}
        dry = "list" if args.list else None
        for name in [only] if only else GROUPS:
            GROUPS[name].fill(**methods, quick=args.quick, dry=dry)

    if not args.list:
        table = load()
        tables(table)
        t2i = t2i_table.load(t2i_table.table_path(PLACES.runs, args.quick))
        print(f"\n### t2i: {GROUPS['t2i'].title}\n", *t2i_table.lines(t2i), sep="\n")
        folder = PLACES.runs if args.quick else ROOT / "assets"
        figure(table, folder / "tradeoff.png")
        if "angles/standard" in table:
            angle_figure(table, folder / "angles.png")
        print("\n### FD at UR 1 %\n", *summary_lines(table), sep="\n")


if __name__ == "__main__":
    common.run(main)
