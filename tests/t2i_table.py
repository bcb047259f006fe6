"""Group t2i of make_tables.py: every method of 06 on the shipped pipeline, kept in assets/t2i.json.

    python tests/make_tables.py --only t2i             # an hour on 2 CPU cores; it can be stopped
    python tests/make_tables.py --only t2i/obt-rel     # the rows of one method

Each run is one command of 06 that names every hyper-parameter, and the table keeps it beside the
run's result. A finished run is never repeated. Most important rows come first: each method with its
defaults, then other digits, then other weights and steps, then two more seeds.
"""

import hashlib
import importlib.util
import itertools
import json
import runpy
import shlex
import shutil
import statistics
from pathlib import Path

from benchmark import exit_as_damaged, waiting_lock

import common

FORGET = "a photo of a three"
METHODS = ("obt-rel", "esd", "erasediff", "obt", "ort", "unseen")

# What makes a run tiny; of a flag given twice the last counts.
TINY = ("--quick", "--steps", 3, "--batch-size", 4, "--n", 10, "--nfe", 2)
# The weights and losses of each method, and what is the same in all runs.
FLAGS = {
    "obt-rel": {"--alpha": 0.5, "--eta": 1.0, "--retain": "distill"},
    "esd": {"--eta": 1.0},
    "erasediff": {"--pseudo": "a photo of a eight", "--alpha": 0.5, "--retain": "dsm"},
    "obt": {"--alpha": 0.9, "--retain": "dsm"},
    "ort": {"--alpha": 0.9, "--retain": "dsm"},
    "unseen": {"--retain": "dsm"},
}
SAME = {"--batch-size": 16, "--ema": 0.95, "--n": 200, "--nfe": 15, "--guidance": 2.0}
RATES = {"full": 3e-4, "xattn": 1e-3}


def tiny(flags):
    """Return the flags of a tiny run in place of a whole one; its D_f has few pictures."""
    few = ("--relearn", 1, 10) if "--relearn" in flags else ()
    return (*flags, *TINY, *few)


def row(method, steps, *more, forget=FORGET, train="full", changes=()):
    """Return all flags of one run of 06.

    more     flags that come last
    changes  pairs (flag, value) that differ from FLAGS
    """
    flags = {"--forget": forget, "--method": method, "--train": train, "--steps": steps}
    flags |= {"--lr": RATES[train], **FLAGS[method], **SAME, **dict(changes)}
    return [*itertools.chain(*flags.items()), *more]


def runs():
    """Return all runs, {name: flags}, the most important ones first."""
    result = {
        "obt-rel/200": row("obt-rel", 200, "--relearn", 1, 10, 100),
        "esd/100": row("esd", 100),
        "erasediff/100": row("erasediff", 100),
        "obt/0.9": row("obt", 100),
        "ort/0.9": row("ort", 100),
        "unseen/100": row("unseen", 100),
        "obt-rel/seven": row("obt-rel", 200, forget="a photo of a seven"),
        "obt-rel/eight": row("obt-rel", 200, forget="a photo of a eight"),
        "obt-rel/xattn": row("obt-rel", 200, train="xattn"),
        "erasediff/distill": row("erasediff", 200, changes=[("--retain", "distill")]),
        "esd/200": row("esd", 200),
        "obt/0.5": row("obt", 100, changes=[("--alpha", 0.5)]),
        "ort/0.5": row("ort", 100, changes=[("--alpha", 0.5)]),
        "obt-rel/100": row("obt-rel", 100),
        "erasediff/200": row("erasediff", 200),
        "unseen/200": row("unseen", 200),
        "esd/xattn": row("esd", 100, train="xattn"),
    }
    for seed in (1, 2):
        for method, steps in (("obt-rel", 200), ("esd", 100), ("erasediff", 100)):
            result[f"{method}/{steps}/s{seed}"] = row(method, steps, "--seed", seed)
    return result


def command_of(flags):
    """Return the command of a run, as a shell takes it."""
    return shlex.join(["python", "06_text_to_image.py", *map(str, flags)])


def load(path):
    """Return the table so far, {name: result}; exit with one line if the file is damaged."""
    if not path.exists():
        return {}
    try:
        return {name: dict(result) for name, result in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        exit_as_damaged(path, error)


def fill(folder, path, methods=METHODS, quick=False, dry=None):
    """Make the runs that are missing, or only list them.

    folder   for the outputs of the runs
    path     of the table, t2i.json
    methods  whose runs are made
    dry      "list": run nothing
    """
    for name, flags in runs().items():
        if name.partition("/")[0] not in methods:
            continue
        command = command_of(tiny(flags) if quick else flags)
        is_done = load(path).get(name, {}).get("command") == command
        if dry:
            print(f"{'done   ' if is_done else 'missing'} t2i/{name}")
        elif not is_done:
            if importlib.util.find_spec("diffusers") is None:
                print("group t2i is left out: it needs pip install diffusers transformers")
                return
            print(f"\n=== t2i/{name}: {command}", flush=True)
            result = execute(folder / f"t2i-{name.replace('/', '-')}", shlex.split(command)[2:])
            with waiting_lock(path.parent):
                # Read again just now: another process may have added its runs.
                table = {**load(path), name: {"command": command, **result}}
                common.write_json(path, {key: table[key] for key in runs() if key in table})


def execute(folder, flags):
    """Run 06 with its outputs in a folder, and return what of its result belongs into the table."""
    main = runpy.run_path(str(common.HERE / "06_text_to_image.py"))["main"]
    draw = main.__globals__["draw_all"]

    def draw_all(args, model, counts, label):
        # The pictures before are the same in all runs with the same prompts and noise: draw once.
        if label != "before":
            return draw(args, model, counts, label)
        weights = common.fingerprint(*model.pipe.unet.parameters())
        key = f"{list(counts.items())} {args.seed} {args.nfe} {args.guidance} {weights}"
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        kept = folder.parent / f"t2i-before-{name}.pt"
        if kept.exists():
            return common.read_torch_file(kept)
        pictures = draw(args, model, counts, label)
        common.save_checkpoint(kept, **pictures)
        return pictures

    main.__globals__["draw_all"] = draw_all
    shutil.rmtree(folder, ignore_errors=True)  # what another command has left under this name
    main([*flags, "--out", str(folder)])
    # [!.]: the folder of a run that was killed begins with a dot.
    (path,) = folder.glob("**/forget-*/[!.]*/result.json")
    result = json.loads(path.read_text())
    keys = ("method", "forget", "n", "skipped_steps", "before", "after", "relearn", "seconds")
    return {key: result[key] for key in keys}


def lines(table):
    """Yield the table {name: result} as Markdown; several seeds are one line of means.

    Of the columns that are no means, "worst" is of all seeds. What is relearned and what is drawn
    instead are of the first one.
    """
    yield (
        "| run | CR % | unsure % | noise % | others % (worst) | FD | paraphrases % | empty % "
        "| relearned from 1, 10, 100 | drawn instead |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    if table:
        first = next(iter(table.values()))
        yield line("before", [first["before"]], {})
    for name, result in table.items():
        if name.count("/") > 1:  # another seed: part of its first one's line
            continue
        seeds = [key for key in table if key.startswith(f"{name}/s")]
        label = name
        if seeds:
            label += f", {1 + len(seeds)} seeds"
        measures = [table[key]["after"] for key in (name, *seeds)]
        yield line(label, measures, result["relearn"])


def line(label, measures, relearned):
    """Return one line of the table.

    measures   of the runs with each seed
    relearned  {number of images: measures}, or {}
    """

    def mean(key):
        return statistics.mean(one[key] for one in measures)

    paraphrases = []
    for prompt in measures[0]["paraphrases"]:
        paraphrases.append(statistics.mean(one["paraphrases"][prompt] for one in measures))
    paraphrase_cell = ", ".join(f"{share:.1f}" for share in paraphrases)
    relearned_cell = ", ".join(f"{one['cr']:.0f}" for one in relearned.values()) or "-"
    counts = sorted(measures[0]["class_counts"].items(), key=lambda pair: -pair[1])
    drawn = ", ".join(f"{name} {count}" for name, count in counts[:3])
    worst = min(one["worst"] for one in measures)
    return (
        f"| {label} | {mean('cr'):.1f} | {mean('unsure'):.1f} | {mean('noise'):.1f} "
        f"| {mean('others'):.1f} ({worst:.0f}) | {mean('fd'):.2f} | {paraphrase_cell} "
        f"| {mean('empty_prompt'):.1f} | {relearned_cell} | {drawn} |"
    )


def table_path(runs_folder, quick):
    """Return where the table lies: in assets/, or with --quick beside the runs."""
    return Path(runs_folder) / "t2i.json" if quick else common.HERE / "assets/t2i.json"
