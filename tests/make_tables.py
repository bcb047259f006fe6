"""Every number of README's method tables, and the trade-off figure, from one command that can be stopped and started again.

    python tests/make_tables.py                    # all groups: hours on 2 CPU cores; a finished run is never repeated
    python tests/make_tables.py --only vp          # one group: vp, long, ve, ddpm, scratch, nll, noise
    python tests/make_tables.py --only vp/ort      # one row of it: a method
    python tests/make_tables.py --only vp --list   # what is done and what is missing; runs nothing
    python tests/make_tables.py --draw             # only the tables and the figure, from assets/tables.json

Each run is one command of 02 or 03; assets/tables.json keeps it beside its result.json, so that any single number can be had
again by hand.  Only the Standard model's samples, which are the same for every run with one seed, are drawn once and kept in
out/tables/; and likelihoods, losses by noise level and the row of scratch/standard are measured here, on the models made so.

How the weights are chosen (group vp), alike for every method: three learning rates at the middle weight, then the paper's noise
for D_f against ours, then the other retain loss, then the two other weights, and from the best of the three to weaker or stronger
ones until two runs lie around UR 1 % or the network breaks down, all with seed 0; then two more seeds at the weight whose UR is
nearest to 1 %, each with a second weight on the other side of 1 %, or at the weight of least cost (see there) where none comes
down to it.  Groups long and ve take rate, noise and retain loss from there, and start the same walk at that weight; in ve on
forget 3, and 7 and 3 7 use the weight found (Obt-rel also the next stronger, and 1000 steps).

A finished model is kept in out/tables/ only; where nll and noise find it gone, its command makes it again.

Two commands may run at once, on a core each: OMP_NUM_THREADS=1 taskset -c 0 python tests/make_tables.py --only vp/ort, and so on.
"""
import argparse
import json
import math
import os
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common as c
from benchmark import weights_digest, write_json  # beside this file

OUT, TABLE = ROOT / "out" / "tables", ROOT / "assets" / "tables.json"
# method: flag that weighs D_f, and three values of it, the weakest first
WEIGHTS = {
    "obt-rel": ("--kappa", (2.0, 2.5, 3.0)),
    "obt": ("--alpha", (0.95, 0.9, 0.8)),
    "ort": ("--alpha", (0.98, 0.95, 0.9)),
    "ascent": ("--alpha", (0.97, 0.95, 0.9)),
    "erasediff": ("--eta", (0.001, 0.003, 0.01)),
    "siss": ("--c", (0.001, 0.003, 0.01)),  # the gradient of L_g is 0.01 to 0.05 long here
    "unseen": (None, (None,)),
}
TINY = "--quick --steps 3 --batch-size 8"  # after all other flags: of one given twice the last counts
RATES = (1e-4, 3e-4, 1e-3)
# All weights that the walk of the docstring may come to, the weakest first.
LADDER = {
    "obt-rel": (1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 3.5, 4.0),
    "obt": (0.95, 0.9, 0.8, 0.7),
    "ort": (0.98, 0.95, 0.9, 0.8),
    "ascent": (0.997, 0.99, 0.98, 0.97, 0.96, 0.95, 0.9),
    "erasediff": (1e-5, 1e-4, 0.001, 0.003, 0.01, 0.03),
    "siss": (1e-4, 3e-4, 0.001, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1),
    "unseen": (None,),
}


# ---- running and keeping -----------------------------------------------------------------------------


def load():
    """The table so far: {name: dict(command, the run's figures)}."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def keep(name, command, result):
    """Add one finished run to the table -> its entry."""
    entry = dict(command=command, **result)
    write_json(TABLE, dict(sorted({**load(), name: entry}.items())))
    return entry


def save_time():
    """What all runs share is made once, and networks lie in memory as the CPU likes it.

    common.sample_images: the Standard model's samples are drawn once per SDE and seed, then read from out/tables/.
    common.load_net: channels last, as in 04; other sums, so figures are those of the commands up to rounding."""
    draw, load_net = c.sample_images, c.load_net

    def sample_images(net, n, shape, sde, seed, nfe=20, **more):
        if "before" not in more.get("label", ""):
            return draw(net, n, shape, sde, seed, nfe, **more)
        path = OUT / f"before-{weights_digest(net)}-{type(sde).__name__}-{n}-{seed}-{nfe}.pt"
        if not path.exists():
            c.save_checkpoint(path, images=draw(net, n, shape, sde, seed, nfe, **more))
        return torch.load(path, weights_only=True)["images"]

    c.sample_images, c.load_net = sample_images, lambda *given: load_net(*given).to(memory_format=torch.channels_last)


def execute(name, command):
    """One command of 03, "python 03_unlearn.py ...", with its outputs under a name -> the folder that it wrote."""
    shutil.rmtree(folder := OUT / name.replace("/", "-"), ignore_errors=True)  # what a killed run has left
    runpy.run_path(str(ROOT / "03_unlearn.py"))["main"]([*command.split()[2:], "--out", str(folder)])
    (path,) = folder.glob("mnist/*/*/result.json")
    return path.parent


def run(name, *argv, quick=False, dry=False):
    """One command of 03 under a name -> its result, from the table if it is there; with dry ("list" or "look", which is silent)
    None if it is not."""
    full = " ".join(["python 03_unlearn.py --dataset mnist", *map(str, argv)])
    known = load().get(name)
    if known and known["command"] not in (full, f"{full} {TINY}"):  # the flags were chosen anew since
        known = None
    if known or dry:
        if dry != "look":
            print(f"{'done   ' if known else 'missing'} {name}")
        return known
    command = f"{full} {TINY}" if quick else full
    print(f"\n=== {name}: {command}", flush=True)
    result = json.loads((execute(name, command) / "result.json").read_text())
    result.pop("args")
    return keep(name, command, result)


# ---- the groups --------------------------------------------------------------------------------------


def point(r):
    """A run -> (UR in %, FD / Standard's); no sample judged a 3 counts as 0.05 %, one in 2000, for logarithms."""
    return max(0.05, r["ur_after"]), r["fd_after"] / r["fd_before"]


def cost(r):
    """One number to choose by: ln of the FD ratio, plus a share of how far UR is above 1 %, on the same scale."""
    ur, fd = point(r)
    return math.log(fd) + 0.5 * max(0.0, math.log(ur))


def nearest(found):
    """{weight: result} -> the weight whose UR is nearest to 1 %, on a scale of ratios; where none comes down to it, that of least cost."""
    if all(r["ur_after"] > 1 for r in found.values()):
        return min(found, key=lambda v: cost(found[v]))
    return min(found, key=lambda v: abs(math.log(point(found[v])[0])))


def weigh(method, value):
    """The flags that give a method its weight."""
    return () if value is None else (WEIGHTS[method][0], value)


def setting(method, forget=(3,), steps=200):
    """The flags that say what is forgotten, and for how long."""
    return ("--forget", *forget, "--method", method, "--steps", steps, "--batch-size", 64)


def walk(method, start, attempt):
    """From one weight to weaker or stronger ones, until UR 1 % lies between two or UR rises by a fifth with the push: the network has
    broken down -> {weight: attempt(weight)}; None while runs are missing."""
    values, found, before = LADDER[method], {}, math.inf
    k = values.index(start)
    while 0 <= k < len(values) and values[k] not in found:  # back where it has been: then it lies between the two
        if not (r := attempt(values[k])):
            return None
        found[values[k]] = r
        if r["ur_after"] > max(1, 1.2 * before):
            break
        before = r["ur_after"] if r["ur_after"] > 1 else math.inf
        k += 1 if r["ur_after"] > 1 else -1
    return found


def choose(method, **how):
    """The search of the docstring -> dict(flags that were chosen, best: the weight, reached: whether it comes to UR 1 %, tail: of the
    names, name: of its run with seed 0), or None while runs are missing."""
    values, base = WEIGHTS[method][1], setting(method)
    middle = values[len(values) // 2]
    tried = {}  # flags -> result, at the middle weight

    def attempt(*more):
        name = f"vp/{method}/{middle}/" + "-".join(str(m).lstrip("-") for m in more)
        tried[more] = run(name, *base, *weigh(method, middle), *more, **how)
        return tried[more] is not None

    best_of = lambda: min(tried, key=lambda k: cost(tried[k]))
    if not all([attempt("--lr", lr) for lr in RATES]):
        return None
    if method not in ("unseen", "siss"):  # these have no noise of their own for D_f, and L_g is given by the method
        if not attempt(*best_of(), "--uniform-t") or not attempt(*best_of(), "--retain", "dsm" if method == "obt-rel" else "distill"):
            return None
    flags = best_of()
    tail = "-".join(str(m).lstrip("-") for m in flags)
    at = lambda v: run(f"vp/{method}/{v}/{tail}", *base, *weigh(method, v), *flags, **how)
    found = {v: at(v) for v in values}
    if None in found.values() or (more := walk(method, nearest(found), at)) is None:
        return None
    best = nearest(found | more)
    reached = any(r["ur_after"] <= 1 for r in more.values())
    return dict(flags=flags, best=best, tail=tail, reached=reached, name=f"vp/{method}/{best}/{tail}")


def group_vp(methods=tuple(WEIGHTS), **how):
    """Every method, VP, forget 3, 200 steps of 64 + 64 images."""
    for method in methods:
        picked = choose(method, **how)
        for seed in (1, 2) if picked else ():
            attempt = lambda v: run(f"vp/{method}/{v}/{picked['tail']}/s{seed}", *setting(method), *weigh(method, v), *picked["flags"], "--seed", seed, **how)
            walk(method, picked["best"], attempt) if picked["reached"] else attempt(picked["best"])


def chosen(method):
    """What group vp chose for a method, as choose returns it; None while that is not done."""
    picked = choose(method, dry="look")
    if picked is None:
        print(f"missing vp/{method}: run --only vp first")
    return picked


def best_rival():
    """The published rival with the lowest FD at UR 1 % in group vp, of those that come there; else by cost at the chosen weight.
    None while a rival is missing."""
    table, rank = load(), {}
    for method in ("erasediff", "siss"):
        if not (picked := chosen(method)):
            return None
        fd = at_one(table, method, vp_name(method, picked))
        rank[method] = (0, statistics.mean(fd)) if fd else (1, cost(table[picked["name"]]))
    return min(rank, key=rank.get)


def long_name(method):
    """weight -> name of a run in group long."""
    return lambda v: f"long/{method}/{v}"


def group_long(methods=(), **how):
    """Does quality hold at five times the steps?  Obt-rel, ascent and the best published rival."""
    for method in methods or ("obt-rel", "ascent", best_rival()):
        if method is None or not (picked := chosen(method)):
            continue
        attempt = lambda v, name="", *more: run(long_name(method)(v) + name, *setting(method, steps=1000), *weigh(method, v), *picked["flags"], *more, **how)
        if found := walk(method, picked["best"], attempt):
            for seed in (1, 2):
                attempt(nearest(found), f"/s{seed}", "--seed", seed)


def ve_label(method, v, steps):
    """A run's name in group ve, after the classes."""
    return f"{method}/{v}" + (f"/{steps}" if steps != 200 else "")


def ve_weight(method, **how):
    """The weight that group ve finds on forget 3 -> (weight, attempt(weight, *forget, steps) that runs one), or None while runs are missing."""
    if not (picked := chosen(method)):
        return None
    attempt = lambda v, *forget, steps=200: run(
        f"ve/{'-'.join(map(str, forget))}/{ve_label(method, v, steps)}", *setting(method, forget, steps), *weigh(method, v), *picked["flags"], "--sde", "ve", **how)
    found = walk(method, picked["best"], lambda v: attempt(v, 3))
    return (nearest(found), attempt) if found else None


def ve_rows(method, best):
    """What group ve runs of a method on all sets of classes -> [(weight, steps)].  The poster's best rows lie below 1 %, so of Obt-rel
    also the next stronger weight, and more steps."""
    k = LADDER[method].index(best)
    return [(best, 200), *((v, 200) for v in LADDER[method][k + 1 : k + 2]), (best, 1000)] if method == "obt-rel" else [(best, 200)]


def group_ve(methods=tuple(WEIGHTS), **how):
    """The poster's MNIST rows: VE, forget 3, 7, and 3 and 7."""
    for method in methods:
        if found := ve_weight(method, **how):
            best, attempt = found
            for v, steps in ve_rows(method, best):
                for forget in ((3,), (7,), (3, 7)):
                    attempt(v, *forget, steps=steps)


def group_ddpm(methods=("obt-rel", "obt", "ort", "unseen", "erasediff"), **how):
    """The 1000-step chain, ancestral sampling in 50."""
    for method in methods:
        if picked := chosen(method):
            run(f"ddpm/{method}", *setting(method), *weigh(method, picked["best"]), *picked["flags"], "--sde", "ddpm", **how)


def run_standard(name, steps=3000, quick=False, dry=False):
    """A Standard model of 02 with so few steps, with the rate and the average of 03 --from-scratch, measured as 03 measures one."""
    if name in load() or dry:
        return print(f"{'done   ' if name in load() else 'missing'} {name}")
    path, steps = (folder := OUT / name.replace("/", "-")) / "mnist/base.pt", 3 if quick else steps
    argv = f"02_train_sde.py --dataset mnist --steps {steps} --lr 8e-3 --ema 0.999 --out {os.path.relpath(folder, ROOT)}" + " --quick" * quick
    # A process of its own: after Ctrl-C 02 saves and ends well, and its handler would stay installed here.
    subprocess.run([sys.executable, *argv.split(), *(["--resume"] if path.exists() else [])], cwd=ROOT, check=True)
    if c.load_checkpoint(path, argv, ("step",))["step"] < steps:
        c.die("stopped; go on with the same command")
    data, n, nfe = c.load_dataset("mnist"), 20 if quick else 2000, 2 if quick else c.VP.nfe
    judge = c.load_judge(argparse.Namespace(dataset="mnist", data_dir=None, quick=quick, out=OUT, device="cpu"), data)
    draw = lambda net, label: c.judge_images(judge, c.sample_images(net, n, data.images.shape[1:], c.VP(), 0, nfe, batch=20 if quick else 250, label=label))
    before, after = draw(c.load_net(*c.find_base(OUT, "mnist")), "samples before"), draw(c.load_net(path, argv), "samples")
    real = c.judge_images(judge, data.images[data.labels != 3][: 1000 if quick else None]).features
    b, m = c.measure(before, [3], real, 10), c.measure(after, [3], real, 10, before)
    keep(name, f"python {argv}", dict(
        n=n, ur_before=b["ur"], fd_before=b["fd"], ur_after=m["ur"], ur_interval=m["ur_interval"], fd_after=m["fd"],
        class_min_ratio=m["class_min_ratio"], low_confidence_after=m["low_confidence"]))


def group_scratch(methods=("standard", "unseen", "ort", "obt"), **how):
    """The paper's Table 1 setting: random weights, 3000 steps, both losses from the first on.  Obt-rel compares with a Standard model,
    so it cannot be had from scratch.  Ratios are to the shipped Standard model, which had ten times the steps."""
    for method in methods:
        if method == "standard":
            run_standard("scratch/standard", **how)
        else:
            value = WEIGHTS[method][1][len(WEIGHTS[method][1]) // 2]
            run(f"scratch/{method}" + (f"/{value}" if value else ""), "--forget", 3, "--method", method, "--from-scratch", *weigh(method, value), **how)


def network(name):
    """The model of a finished run.  Where its file is gone its command makes it again, with fewer samples, on which training does not
    depend: the same weights on the same machine, on another the same up to what rounding does to 200 steps."""
    if name == "standard":
        return c.load_net(*c.find_base(OUT, "mnist"))
    found = list((OUT / name.replace("/", "-")).glob("mnist/*/[!.]*/model.pt"))  # [!.]: a run that was killed has a dot
    command = load()[name]["command"]
    return c.load_net(found[0] if found else execute(name, f"{command} --n 10") / "model.pt", command)


def measure_models(group, runs, figures, dry):
    """figures(network) of the Standard model and of finished runs {label: name}, kept as group/label."""
    for label, name in {"standard": "standard", **runs}.items():
        key = f"{group}/{label}"
        if key in load() or dry:
            print(f"{'done   ' if key in load() else 'missing'} {key}")
        else:
            print(key, keep(key, f"python tests/make_tables.py --only {group}", figures(network(name))), flush=True)


def test_images(n):
    """n dequantised test images of each: those that are no 3, and 3s."""
    test, generator = c.load_dataset("mnist", train=False), c.rng(0)
    torch.manual_seed(0)
    is_f = test.labels == 3
    return [c.dequantize(x[torch.randperm(len(x), generator=generator)[:n]]) for x in (test.images[~is_f], test.images[is_f])]


def group_nll(quick=False, dry=False):
    """Bits/dim of test images of D_g and D_f under the VE models that forget 3, mean and standard error."""
    n, steps = (2, 2) if quick else (128, 16)

    def figures(net):
        result = {}
        nats = lambda x: c.ode_log_likelihood(net, c.VE(), x, c.rademacher_probes(x, 1, c.rng(1)), steps, focus=-3.0)
        for key, x in zip("gf", test_images(n)):
            v = c.bits_per_dim(torch.cat([nats(part) for part in x.split(64)]), x[0].numel())
            result.update({f"bpd_{key}": v.mean().item(), f"error_{key}": (v.std() / math.sqrt(len(v))).item()})
        return result

    found = {method: ve_weight(method, dry="look") for method in WEIGHTS}
    measure_models("nll", {f"{method}/{f[0]}": f"ve/3/{method}/{f[0]}" for method, f in found.items() if f}, figures, dry)


def group_noise(quick=False, dry=False):
    """Where forgetting happens: v-loss of D_g and D_f by noise level, the weights chosen in group vp."""
    loss_by_noise = runpy.run_path(str(ROOT / "02_train_sde.py"))["loss_by_noise"]
    figures = lambda net: dict(zip("gf", (loss_by_noise(net, x) for x in test_images(4 if quick else 500))))
    measure_models("noise", {f"{m}/{p['best']}": p["name"] for m in WEIGHTS if (p := choose(m, dry="look"))}, figures, dry)


GROUPS = dict(vp=group_vp, long=group_long, ve=group_ve, ddpm=group_ddpm, scratch=group_scratch, nll=group_nll, noise=group_noise)
# The methods that can be named after a slash.
ROWS = {group: tuple(WEIGHTS) for group in GROUPS} | dict(scratch=("standard", *(m for m in WEIGHTS if m != "obt-rel")), nll=(), noise=())

# ---- tables and figure -------------------------------------------------------------------------------


def run_lines(rows):
    """A group of runs of 03 -> lines of Markdown."""
    yield "| run | UR % (95 %) | FD | FD / Standard's | class_min_ratio | unsure % | s |\n|---|---|---|---|---|---|---|"
    for name, r in rows.items():
        low, high = r["ur_interval"]
        yield (
            f"| {name} | {r['ur_before']:.2f} > {r['ur_after']:.2f} ({low:.1f}-{high:.1f}) | {r['fd_before']:.2f} > {r['fd_after']:.2f} | x{r['fd_after'] / r['fd_before']:.2f} "
            f"| {r['class_min_ratio']:.2f} | {r['low_confidence_after']:.1f} | {round(r['seconds']) if 'seconds' in r else ''} |"
        )


def ve_lines(rows):
    """Group ve at the weights found on forget 3, a column for each set of classes -> lines of Markdown."""
    sets = ("3", "7", "3-7")
    wanted = [ve_label(m, v, steps) for m in WEIGHTS if (f := ve_weight(m, dry="look")) for v, steps in ve_rows(m, f[0])]
    found = [name for name in wanted if all(f"{forget}/{name}" in rows for forget in sets)]
    cell = lambda r: f"{r['ur_after']:.2f} [{r['ur_interval'][0]:.1f}, {r['ur_interval'][1]:.1f}], x{point(r)[1]:.2f}, {r['class_min_ratio']:.2f}"
    yield "| run | 3: UR % (95 %), FD / Standard's, class_min_ratio | 7 | 3 and 7 | s, together |\n|---|---|---|---|---|"
    for name in found:
        runs = [rows[f"{forget}/{name}"] for forget in sets]
        if name == found[0]:
            yield "| standard | " + " | ".join(f"{r['ur_before']:.2f}, FD {r['fd_before']:.2f}" for r in runs) + " | |"
        yield f"| {name} | " + " | ".join(map(cell, runs)) + f" | {sum(r['seconds'] for r in runs):.0f} |"


def nll_lines(rows):
    """Likelihoods -> lines of Markdown."""
    yield "| model | D_g | D_f |\n|---|---|---|"
    for name, r in rows.items():
        yield f"| {name} | {r['bpd_g']:.3f} +- {r['error_g']:.3f} | {r['bpd_f']:.3f} +- {r['error_f']:.3f} |"


def noise_lines(rows):
    """Losses by noise level, D_g / D_f -> lines of Markdown."""
    bins = next(iter(rows.values()))["g"]
    yield "| model | " + " | ".join(f"sigma {a:g}-{b:g}" for a, b, _ in bins) + " |\n" + "|---" * (len(bins) + 1) + "|"
    for name, r in rows.items():
        yield f"| {name} | " + " | ".join(f"{g[2]:.3f} / {f[2]:.3f}" for g, f in zip(r["g"], r["f"])) + " |"


def tables(table):
    """All finished runs as Markdown, one table a group."""
    for group, fill in GROUPS.items():
        rows = {k[len(group) + 1 :]: r for k, r in table.items() if k.startswith(group + "/")}
        if rows:
            print(f"\n### {group}: {' '.join(fill.__doc__.split())}\n")
            print(*dict(ve=ve_lines, nll=nll_lines, noise=noise_lines).get(group, run_lines)(rows), sep="\n")


def fd_at_one_percent(points):
    """(UR, FD ratio) of one seed, a point a weight in their order -> [FD ratio where UR is 1 %], on the straight line, both axes
    logarithmic, between the first two neighbours that lie around it; [] where there are none."""
    points = [(math.log(ur), math.log(fd)) for ur, fd in points]
    for (u0, f0), (u1, f1) in zip(points[:-1], points[1:]):
        if min(u0, u1) <= 0 <= max(u0, u1) and u0 != u1:
            return [math.exp(f0 - (f1 - f0) / (u1 - u0) * u0)]
    return []


def vp_name(method, picked):
    """weight -> name of a run in group vp at the chosen flags."""
    return lambda v: f"vp/{method}/{v}/{picked['tail']}"


def curve(table, method, name, seed=""):
    """(UR, FD ratio) of the runs name(weight) + seed that are there, the weakest weight first."""
    return [point(table[name(v) + seed]) for v in LADDER[method] if name(v) + seed in table]


def at_one(table, method, name):
    """FD ratios at UR 1 %, one for each seed that has runs on both sides of it."""
    return [fd for seed in ("", "/s1", "/s2") for fd in fd_at_one_percent(curve(table, method, name, seed))]


def seed_names(table, name):
    """The runs with other seeds of a run with seed 0."""
    return [n for n in table if n.startswith(name + "/s")]


def shown(table):
    """What the figure and the table under it show -> (method, steps, name: weight -> run, the weight chosen, flags chosen)."""
    for method in WEIGHTS:
        if picked := choose(method, dry="look"):
            yield method, 200, vp_name(method, picked), picked["best"], picked["flags"]
            name = long_name(method)
            if later := {v: table[name(v)] for v in LADDER[method] if name(v) in table}:
                yield method, 1000, name, nearest(later), (*picked["flags"], "--steps", 1000)


def summary_lines(table):
    """The number under the figure, FD at UR = 1 %, and what the chosen weights give: means over the seeds, with the least and the largest."""
    yield "| method | chosen | seeds | UR % | FD | class_min_ratio | unsure % | FD at UR 1 % |\n|---|---|---|---|---|---|---|---|"
    spread = lambda x, mark="": f"{mark}{statistics.mean(x):.2f}" + (f" ({min(x):.2f} to {max(x):.2f})" if len(x) > 1 else "")

    for method, _, name, best, flags in shown(table):
        runs = [table[n] for n in (name(best), *seed_names(table, name(best)))]
        fd, passed = at_one(table, method, name), all(ur < 1 for ur, _ in curve(table, method, name))
        yield (f"| {method} | `{' '.join(map(str, (*weigh(method, best), *flags)))}` | {len(runs)} | {spread([r['ur_after'] for r in runs])} | {spread([point(r)[1] for r in runs], 'x')} "
               f"| {statistics.mean(r['class_min_ratio'] for r in runs):.2f} | {statistics.mean(r['low_confidence_after'] for r in runs):.1f} "
               f"| {spread(fd, 'x') if fd else 'below it at every weight' if passed else 'does not come there'} |")


def figure(table, path):
    """UR against FD, a curve per method over its weights, other seeds as crosses, 1000 steps dashed; no sample judged a 3 is drawn as 0.05 %."""
    plt = c.pyplot()
    fig, ax = plt.subplots(figsize=(8, 4.4))
    for method, steps, name, best, _ in shown(table):
        color, style = f"C{list(WEIGHTS).index(method)}", dict(ls="-", label=method) if steps == 200 else dict(ls="--", mfc="white")
        ax.plot(*zip(*curve(table, method, name)), marker="o", color=color, ms=5, **style)
        for seed in seed_names(table, name(best)):
            ax.plot(*point(table[seed]), "x", color=color, ms=6)
    ax.plot([], [], "o--", color="0.4", ms=5, mfc="white", label="1000 steps"), ax.plot([], [], "x", color="0.4", ms=6, label="other seeds")
    ax.axvline(1, color="0.7", lw=1), ax.axhline(1, color="0.7", lw=1)
    ax.set(xscale="log", yscale="log", xticks=(0.05, 0.2, 0.5, 1, 2, 5, 10), yticks=(1, 2, 5, 10),
           xlabel="unlearning ratio, % of samples judged a 3 (left: forgotten)", ylabel="FD / Standard's FD (low: kept)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}"), axis.set_minor_formatter("")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)), fig.tight_layout(), fig.savefig(path, dpi=90), plt.close(fig)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", metavar="GROUP[/METHOD]", default="", help=f"one of: {', '.join(GROUPS)}; of a group of runs also one method, e.g. vp/ort")
    p.add_argument("--list", action="store_true", help="show what is done and what is missing")
    p.add_argument("--draw", action="store_true", help="tables and figure of what is done")
    p.add_argument("--quick", action="store_true", help="the same path with tiny runs, into a table of its own")
    args = p.parse_args(argv)
    if args.quick:  # its models must not lie where nll and noise look for real ones
        global OUT, TABLE
        OUT, TABLE = OUT / "quick", OUT / "quick/tables.json"
    OUT.mkdir(parents=True, exist_ok=True)
    save_time()
    group, _, method = args.only.partition("/")
    if group not in ("", *GROUPS):
        c.die(f"--only {args.only}: choose a group from: {', '.join(GROUPS)}")
    if method and method not in ROWS.get(group, ()):
        c.die(f"--only {args.only}: {group or 'no group'} has " + (f"the rows {', '.join(ROWS[group])}" if ROWS.get(group) else "no rows of its own"))
    for name in [group] if group else GROUPS:
        if not args.draw:
            GROUPS[name](**(dict(methods=(method,)) if method else {}), quick=args.quick, dry="list" if args.list else None)
    if not args.list:
        tables(load())
        figure(load(), OUT / "tradeoff.png" if args.quick else ROOT / "assets" / "tradeoff.png")
        print("\n### FD at UR 1 %\n", *summary_lines(load()), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
