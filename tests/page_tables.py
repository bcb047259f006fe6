"""Write the tables of README.md and docs/ from the files in assets/, so that no cell is typed.

    python tests/page_tables.py relearn    # print one table
    python tests/page_tables.py --write    # write every table anew into its page

On a page, each such table stands directly below a comment with the command that prints it:

    <!-- python tests/page_tables.py relearn -->

tests/test_readme.py fails when a page and a file in assets/ disagree. Then --write mends the page.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import json
import re
import sys
from functools import partial
from pathlib import Path

# Python looks for modules beside this file; common.py is one folder higher.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import make_tables
import t2i_table
from benchmark import exit_as_damaged

import common

ASSETS = common.HERE / "assets"
PAGES = ("README.md", "docs/results.md", "docs/course.md")
# The comment, and the lines of the table below it.
MARKED_TABLE = re.compile(r"(<!-- python tests/page_tables\.py (\S+) -->\n)((?:\|.*\n)*)")


def read(name):
    """Return the content of a JSON file in assets/."""
    path = ASSETS / name
    try:
        return json.loads(common.read_text(path))
    except ValueError as error:
        exit_as_damaged(path, error)


def markdown(header, rows):
    """Yield a table: a list of titles, and lists of cells as long as that."""
    for cells in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(cells)} |"


def interval(low_and_high, digits=1):
    """Write an interval, e.g. [0.2, 0.9]."""
    low, high = low_and_high
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


# ---- unlearning ----------------------------------------------------------------------------------

FORGET_SETS = ("3", "7", "3-7")


# The rows of README's table: names of runs, with the classes in place of {}.
HEADLINE = (
    "ve/{}/obt-rel/1.7",
    "paper/{}/obt-rel/1500",
    "paper/{}/obt/dsm/1500",
    "paper/{}/ort/dsm/1500",
    "paper/{}/erasediff/1500",
    "paper/{}/unseen/1500",
    "ve/{}/ascent/0.97",
    "ve/{}/siss/0.02",
)


def headline():
    """Yield README's table: runs of groups ve and paper, beside the poster's figures."""
    table = make_tables.load()
    titles = ["3: UR, FD", "7: UR, FD", "3 and 7: UR, FD"]
    header = ["method", "steps", "weight", *titles, "poster's UR: 3", "7", "3 and 7"]
    cells = []
    for name in HEADLINE:
        runs = [table[name.format(forget)] for forget in FORGET_SETS]
        if not cells:  # Standard is the same before every run
            before = [f"{result['ur_before']:.2f}, {result['fd_before']:.2f}" for result in runs]
            cells.append(["Standard", "", "", *before, *poster_cells("standard")])
        flags = flags_of(runs[0])
        cells.append([
            flags["--method"],
            flags["--steps"],
            weight_cell(flags),
            *map(ur_and_fd, runs),
            *poster_cells(flags["--method"]),
        ])
    return markdown(header, cells)


def flags_of(result):
    """Return the flags of a kept run's command, {flag: the word behind it}."""
    words = result["command"].split()
    return {word: after for word, after in zip(words, [*words[1:], ""]) if word.startswith("--")}


def weight_cell(flags):
    """Return how a run weighs D_f, and whether its noise levels are uniform in time."""
    weights = [weight.flag for weight in make_tables.WEIGHTS.values() if weight.flag in flags]
    cells = [f"`{flag} {flags[flag]}`" for flag in dict.fromkeys(weights)]
    if "--uniform-t" in flags:
        cells.append("`--uniform-t`")
    return " ".join(cells)


def ur_and_fd(result):
    """Return the two measures of a run that README shows."""
    return f"{result['ur_after']:.2f}, x{make_tables.point(result)[1]:.2f}"


def poster_cells(method):
    """Return the poster's three figures of a method, or three empty cells."""
    figures = [make_tables.POSTER_UR.get((forget, method)) for forget in FORGET_SETS]
    return ["" if figure is None else str(figure) for figure in figures]


def group_rows(name):
    """Return the runs of one group of make_tables.py, {name without the group: result}."""
    prefix = f"{name}/"
    table = make_tables.load()
    return {key.removeprefix(prefix): table[key] for key in table if key.startswith(prefix)}


def group(name):
    """Yield the table of one group of make_tables.py."""
    return make_tables.GROUPS[name].lines(group_rows(name))


def paper(*places):
    """Yield the rows of group paper of these places: walk, 3, 7, 3-7, vp, scratch, standard."""
    rows = group_rows("paper")
    shown = {name: rows[name] for name in rows if name.split("/")[0] in places}
    return make_tables.paper_lines(shown)


def footing():
    """Yield the table under the trade-off figure."""
    return make_tables.summary_lines(make_tables.load())


def base():
    """Yield what 02 --measure says of the shipped Standard model, and of real images."""
    kept = read("base.json")
    rows = [
        [title, f"{row['fd']:.2f}", f"{row['low_confidence']:.1f}"]
        for title, row in (("samples", kept["model"]), ("real test digits", kept["real"]))
    ]
    return markdown([f"n = {kept['n']}", "FD to all training digits", "judge unsure, %"], rows)


def unlearn(name):
    """Yield the runs of 03 that are kept one by one in a file of assets/."""
    header = ["command", "UR, %", "without noise", "FD to the digits to keep", "unsure, %"]
    header += ["class_min_ratio", make_tables.INSTEAD]
    rows = []
    for command, run in read(name).items():
        ratio = run["fd_after"] / run["fd_before"]
        rows.append([
            f"`{command}`",
            f"{run['ur_before']:.2f} to {run['ur_after']:.2f} {interval(run['ur_interval'])}",
            f"{run['ur_no_noise_after']:.2f}",
            f"{run['fd_before']:.2f} to {run['fd_after']:.2f} (x{ratio:.2f})",
            f"{run['low_confidence_before']:.1f} to {run['low_confidence_after']:.1f}",
            f"{run['class_min_ratio']:.2f}",
            make_tables.instead_cell(run),
        ])
    return markdown(header, rows)


def shapes():
    """Yield the runs of 03 on the synthetic shapes."""
    runs = read("shapes.json").values()
    return make_tables.ending_lines({", ".join(run["forget"]): run for run in runs})


def wishes():
    """Yield which method suits which wish, with the figures of runs that forget 3."""
    table = make_tables.load()
    ended = table["until/3"]
    given_time = table["paper/3/obt-rel/1500"]
    gone = table["vp/ascent/0.95/lr-0.001-retain-distill"]
    unlikely = table["paper/3/obt/dsm/1500"]
    small = table["paper/3/ort/dsm/5000"]
    scratch = table["paper/scratch/ort"]
    _, _, length = table["angles/ort"]["f"][4]  # at sigma 0.1
    rises = make_tables.rises(unlikely, table["paper/standard"])
    rows = [
        [
            "few 3s, and good pictures of all else",
            "`--method obt-rel`, the default",
            f"UR, FD: {ur_and_fd(ended)} (VP); 1,500 steps with VE: {ur_and_fd(given_time)}",
        ],
        [
            "no 3 at all, at any cost",
            "`--method ascent --steps 200 --lr 0.001 --alpha 0.95 --retain distill`",
            f"UR, FD: {ur_and_fd(gone)}; UR is below {gone['ur_interval'][1]:.1f} (VP)",
        ],
        [
            "a test 3 becomes unlikely",
            "`--method obt --sde ve`",
            f"NLL of D_f +{rises[1]:.1f} bits/dim, of D_g +{rises[0]:.1f}; "
            f"UR, FD: {ur_and_fd(unlikely)} (VE)",
        ],
        [
            "the score vanishes on 3s",
            "`--method ort --sde ve --steps 5000`",
            f"x{length:.2f} of its length at sigma 0.1 after 1,500 steps; "
            f"UR, FD: {ur_and_fd(small)} (VE)",
        ],
        [
            "the paper's loss, and hardly any noise",
            "`--method ort --sde ve --from-scratch --steps 10000`",
            f"noise for {scratch['instead_noise']:.0f} of 100 3s; "
            f"UR, FD: {ur_and_fd(scratch)} (VE)",
        ],
    ]
    return markdown(["wish", "flags", "measured"], rows)


# ---- evaluation ----------------------------------------------------------------------------------


def evaluated():
    """Yield what 04 measured on seven models and on real images."""
    kept = read("evaluated.json")
    header = ["model", "UR, %", "FD", "unsure, %", "class_min_ratio", make_tables.INSTEAD]
    header += ["density, coverage", "NLL of D_g, bits/dim", "of D_f", "bound: D_g, D_f"]
    return markdown(header, [evaluated_row(row) for row in [*kept["models"], kept["real"]]])


def evaluated_row(row):
    """Return the cells of one model; some cells of Standard and of the real images are empty."""
    nll = ["", "", ""]
    if "ode_bits_g" in row:
        nll = [f"{row[key]['mean']:.3f} ± {row[key]['se']:.3f}" for key in ODE_KEYS]
        nll.append(", ".join(f"{row[key]['mean']:.3f}" for key in BOUND_KEYS))
    return [
        row["model"],
        f"{row['ur']:.2f} {interval(row['ur_interval'])}",
        f"{row['fd']:.2f}",
        f"{row['low_confidence']:.1f}",
        f"{row['class_min_ratio']:.2f}" if "class_min_ratio" in row else "",
        make_tables.instead_cell(row),
        f"{row['density']:.2f}, {row['coverage']:.2f}",
        *nll,
    ]


ODE_KEYS = ("ode_bits_g", "ode_bits_f")
BOUND_KEYS = ("bound_bits_g", "bound_bits_f")


def relearn():
    """Yield UR, FD and the share of unsure samples after each model has relearned from k images."""
    cells = {}  # {model: {k: cell}}
    rows = read("relearn.json")["rows"]
    for row in rows:
        ur = f"{row['ur']:.2f} {interval(row['ur_interval'])}"
        cell = f"{ur}, {row['fd']:.2f}, {row['low_confidence']:.1f}"
        cells.setdefault(row["model"], {})[row["k"]] = cell
    counts = sorted({row["k"] for row in rows} - {0})  # 0: as it is
    header = ["UR in %, FD, unsure in %", "as it is", *[f"k = {k}" for k in counts]]
    return markdown(
        header, [[model, *(own[k] for k in (0, *counts))] for model, own in cells.items()]
    )


def downstream():
    """Yield the share of restored images that the judge still calls what they were."""
    kept = read("downstream.json")
    hole = kept["inpaint-half"]["results"]["repaint"]
    levels = kept["reconstruct"]["results"]
    header = ["model", "half hidden: D_f", "D_g", "FD, D_g", "PSNR, SSIM of the hole, D_g"]
    header += ["sigma 1.4: D_f", "D_g", "FD, D_g", "encode-decode: D_f, D_g"]
    rows = []
    for model, parts in hole.items():
        g = parts["D_g"]
        quality = f"{g['psnr_hole']:.1f}, {g['ssim_hole']:.2f}"
        if model == "clean":
            quality = ""
        latent = levels["latent"][model]
        rows.append([
            model,
            *accuracy_cells(parts),
            quality,
            *accuracy_cells(levels["sigma 1.4"][model]),
            f"{latent['D_f']['accuracy']:.1f}, {latent['D_g']['accuracy']:.1f}",
        ])
    return markdown(header, rows)


def accuracy_cells(parts):
    """Return accuracy on D_f, accuracy on D_g, and FD on D_g."""
    cells = [f"{parts[k]['accuracy']:.1f} {interval(parts[k]['interval'], 0)}" for k in AREAS]
    return [*cells, f"{parts['D_g']['fd']:.2f}"]


AREAS = ("D_f", "D_g")


# ---- speed and samplers --------------------------------------------------------------------------


def speed():
    """Yield what the short cuts save."""
    kept = read("speed.json")
    seconds = kept["sampler"]["seconds"]
    ours = seconds[kept["sampler"]["chosen"]]
    nfe = kept["sampler"]["nfe"]
    likelihood = {key: min(values) for key, values in kept["likelihood"]["seconds"].items()}
    training = kept["training"]
    rate = training["gflop"] / training["seconds"]
    num_images = kept["sampler"]["images"]
    rows = [
        [
            f"likelihood, {kept['likelihood']['images']} images",
            f"RK45, {kept['likelihood']['score_sde_calls']} calls, {likelihood['score_sde']:.1f} s",
            f"RK4, {kept['likelihood']['evaluations']} calls, {likelihood['ours']:.1f} s",
            f"{kept['likelihood_speedup']:.1f} x",
            f"{kept['likelihood_abs_diff']:.4f} bits/dim",
        ],
        sampler_row(kept, num_images, "pc", "predictor-corrector", "", ours, nfe),
        sampler_row(kept, num_images, *EULER, ours, nfe),
        [
            "training step, 64 images",
            f"best matrix product, {rate / kept['gemm_share']:.0f} GFLOP/s",
            f"{rate:.0f} GFLOP/s, {training['seconds']:.2f} s",
            f"{100 * kept['gemm_share']:.0f} %",
            "",
        ],
    ]
    return markdown(["what", "the usual recipe", "here", "ratio", "difference"], rows)


EULER = ("euler-maruyama", "Euler-Maruyama", "_euler_maruyama")


def sampler_row(kept, num_images, name, title, suffix, ours, nfe):
    """Return one line of `speed`: a slow sampler against the chosen one."""
    fd_slow = kept[f"sampler_fd_{name.replace('-', '_')}"]
    return [
        f"{num_images} samples",
        f"{title}, {kept['sampler']['seconds'][name]:.0f} s",
        f"`{kept['sampler']['chosen']}`, {nfe} evaluations, {ours:.1f} s",
        f"{kept[f'sampler_speedup{suffix}']:.0f} x",
        f"FD {kept['sampler_fd_fast']:.2f}, there {fd_slow:.2f}",
    ]


SAMPLERS = {
    "heun": "ODE, Heun in sigma (9, 15, 19, 29)",
    "edm": "EDM's own Heun, the same noise",
    "dpm++2m": "DPM-Solver++(2M)",
    "sde-dpm++2m": "the same, stochastic: our default",
}
SLOW_SAMPLERS = {
    "euler-maruyama": "Euler-Maruyama: score_sde with VP",
    "pc": "predictor-corrector, `langevin`: score_sde with VE",
}


def samplers():
    """Yield FD by sampler and number of evaluations; two numbers are two seeds."""
    kept = read("samplers.json")["samplers"]
    rows = []
    for kind, title in SAMPLERS.items():
        own = [row["fd"] for name, row in kept.items() if name.rpartition("-")[0] == kind]
        rows.append([title, *map(two_seeds, own), "", ""])
    for name, title in SLOW_SAMPLERS.items():
        cells = {1001: "", 2001: ""}
        cells[kept[name]["nfe"]] = two_seeds(kept[name]["fd"])
        rows.append([title, "", "", "", "", *cells.values()])
    known = {*SLOW_SAMPLERS, *[name for name in kept if name.rpartition("-")[0] in SAMPLERS]}
    for name, row in kept.items():  # a sampler that was added later
        if name not in known:
            rows.append([f"{name}, {row['nfe']} evaluations: {two_seeds(row['fd'])}", *[""] * 6])
    return markdown(["sampler", "10", "15", "20", "30", "1001", "2001"], rows)


def two_seeds(values):
    """Write FD of each seed."""
    return ", ".join(f"{value:.2f}" for value in values)


# ---- text to image, toy --------------------------------------------------------------------------


def t2i():
    """Yield the table of 06."""
    return t2i_table.lines(read("t2i.json"))


TOY_NAMES = {"obt-rel": "Obt-rel", "obt": "Obt", "ort": "Ort"}


def toy():
    """Yield the table of 01, in the poster's unit; share is that of the samples at the middle."""
    header = ["model", "exact D_g", "exact D_f", "share, %"]
    header += ["learned D_g", "learned D_f", "share, %", "poster D_g, D_f"]
    rows = []
    for row in read("toy.json")["rows"]:
        name = TOY_NAMES.get(row["method"], row["method"].capitalize())
        if row["alpha"] is not None:
            symbol = "w" if row["method"] == "ascent" else "alpha"
            name += f", {symbol} {row['alpha']:g}"
        poster = [number(row[f"poster_{k}"], 2) for k in "gf"]
        cells = []
        for kind in ("exact", "learned"):
            cells += [number(row[f"{kind}_{k}"], 2) for k in "gf"]
            cells.append(number(row[f"ur_{kind}"], 1))
        rows.append([name, *cells, ", ".join(filter(None, poster))])
    return markdown(header, rows)


def number(value, digits):
    """Write a number, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


# ---- the pages -----------------------------------------------------------------------------------

TABLES = {
    "headline": headline,
    "base": base,
    "unlearn": partial(unlearn, "unlearn.json"),
    "course": partial(unlearn, "course.json"),
    "shapes": shapes,
    "wishes": wishes,
    "footing": footing,
    "evaluated": evaluated,
    "relearn": relearn,
    "downstream": downstream,
    "speed": speed,
    "samplers": samplers,
    "toy": toy,
    "t2i": t2i,
}
TABLES |= {
    "paper": partial(paper, "standard", "3"),
    "paper-others": partial(paper, "7", "3-7", "vp"),
    "paper-scratch": partial(paper, "scratch"),
    "paper-walk": partial(paper, "walk"),
}
for name in ("ve", "ddpm", "nll", "noise", "until", "angles"):
    TABLES[name] = partial(group, name)


@functools.cache
def lines_of(name):
    """Return the lines of one table; each is made once. Exit with one line if a run is missing."""
    try:
        return list(TABLES[name]())
    except KeyError as error:
        common.exit_with_error(
            f"table {name}: {error} is missing in assets/; git checkout assets restores what was "
            "committed, and python tests/make_tables.py makes what is not there"
        )


def anew(text):
    """Return the text of a page with every marked table made anew."""

    def made(match):
        comment, name, _ = match.groups()
        if name not in TABLES:
            common.exit_with_error(f"there is no table {name}; choose from: {', '.join(TABLES)}")
        return comment + "".join(f"{line}\n" for line in lines_of(name))

    return MARKED_TABLE.sub(made, text)


def arguments(argv):
    """Read the command line."""
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", nargs="?", choices=list(TABLES), help="the table to print")
    p.add_argument("--write", action="store_true", help="write all tables into their pages")
    args = p.parse_args(argv)
    if (args.table is None) != args.write:
        common.exit_with_error(f"give --write, or one of the tables: {', '.join(TABLES)}")
    return args


def main(argv=None):
    """Print one table, or write all of them into the pages."""
    args = arguments(argv)
    if args.table:
        print(*lines_of(args.table), sep="\n")
        return
    for page in PAGES:
        path = common.HERE / page
        text = common.read_text(path)
        new_text = anew(text)
        if new_text != text:
            path.write_text(new_text, "utf-8")
            print(f"wrote {page}")


if __name__ == "__main__":
    common.run(main)
