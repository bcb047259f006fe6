"""How programs end: Ctrl-C, SIGTERM, a full disk, a closed pipe, a picture that fails."""

import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    check_refusal,
    check_success,
    load_script,
    load_weights,
    read_animation,
    run_function,
    run_process,
    run_script,
    same_weights,
)
from PIL import Image

import common

OTHER_PROGRAMS = ("benchmark", "make_tables", "shapes")

TINY = "--dataset mnist --quick --forget 3 --steps 2 --n 10 --nfe 2".split()
AWKWARD = [
    "dog_",
    "_x",
    "a__b",
    "_",
    "",
    "$$",
    "Ba$$in",
    "$x",
    r"\$a$",
    "a^b_{",
    "\udcff",
    "狗",
    "%s",
]

# ---- names in pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("airplane", "airp"),
        ("ankle_boot", "ab"),
        ("3", "3"),
        ("dog_", "dog"),
        ("_x", "x"),
        ("a__b", "ab"),
        ("_", "_"),
        ("", ""),
        ("Ba$$in", "Ba$$"),
    ],
)
def test_short_name_takes_every_name(name, expected):
    assert common.short_name(name) == expected


@pytest.fixture
def axes():
    """Axes to draw into."""
    plt = common.pyplot()
    fig, ax = plt.subplots(figsize=(1, 1))
    yield ax
    plt.close(fig)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.filterwarnings("ignore:Glyph")  # the font of matplotlib has no Chinese
def test_no_name_breaks_a_figure(axes, tmp_path, name):
    common.label_corner(axes, 0, 0, name, True)
    axes.bar([common.plain_text(name)], [1])
    axes.set_title(common.plain_text(f"forget {name}"))
    common.save_figure(axes.figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["$$", "Ba$$in", "$x", r"\$a$", "a_b", "$a$ and $b$"])
def test_plain_text_is_shown_as_it_is(name):
    """What matplotlib makes of the text: no formula, and the same characters."""
    from matplotlib.text import Text

    text = Text(0, 0, common.plain_text(name))
    shown, is_formula = text._preprocess_math(text.get_text())
    assert (shown, is_formula) == (name, False)


AWKWARD_CLASSES = AWKWARD[:10]


def awkward_verdict():
    """A judge's verdict with each of the awkward classes."""
    count = len(AWKWARD_CLASSES)
    return common.Verdict(
        torch.arange(count), torch.ones(count), torch.zeros(count, 2), torch.zeros(count)
    )


@pytest.fixture
def noise():
    """Images, one for each awkward class."""
    return torch.zeros(len(AWKWARD_CLASSES), 1, 28, 28, dtype=torch.uint8)


def check_pictures(folder, *names):
    """Fail unless these pictures are there, and nothing else."""
    assert {path.name for path in folder.iterdir()} == set(names)


def test_03_draws_any_class_name(tmp_path, noise):
    script = load_script("03")
    samples = script["Samples"](noise, awkward_verdict(), [(1.0, noise)])
    data = script["Data"].__new__(script["Data"])
    data.class_names = AWKWARD_CLASSES
    data.forget_classes = [0, 5]
    data.forget_names = [AWKWARD_CLASSES[0], AWKWARD_CLASSES[5]]
    data.images = noise
    argv = ["--animate", "--forget", *AWKWARD_CLASSES[:4], "$$"]
    args = load_script("03")["flags"]().parse_args(argv)
    losses = torch.rand(5, 2)
    script["draw_pictures"](args, data, tmp_path, samples, samples, losses, "again")
    check_pictures(tmp_path, "before_after.png", "curves.png", "flow.gif")


def test_04_draws_any_class_name(tmp_path, noise):
    script = load_script("04")
    drawn = {"images": noise, "verdict": awkward_verdict()}
    argv = (["standard", "ort"], [drawn, drawn], [0], AWKWARD_CLASSES)
    script["plot_samples"](tmp_path / "samples.png", *argv)
    script["plot_classes"](tmp_path / "classes.png", *argv)
    check_pictures(tmp_path, "samples.png", "classes.png")


# ---- the backend of a notebook -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no-such-thing"])
def test_an_inherited_backend_does_not_matter(tmp_path, backend):
    code = (
        "import common; plt = common.pyplot(); fig, _ = plt.subplots(); "
        f"common.save_figure(fig, {str(tmp_path / 'a.png')!r})"
    )
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0
    assert (tmp_path / "a.png").exists()


# ---- a picture that fails ------------------------------------------------------------------------


def fail(*_, **__):
    """What matplotlib does when it cannot draw."""
    raise ValueError("no font\nat all")


def test_a_failed_picture_is_one_line_with_the_command(tmp_path, capsys):
    common.draw_picture(tmp_path / "a.png", fail, 1, again="python 03_unlearn.py --redraw")
    err = capsys.readouterr().err
    assert err == (
        "picture a.png could not be drawn (no font at all); "
        "draw it again with: python 03_unlearn.py --redraw\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_picture_is_no_failed_picture(tmp_path):
    def interrupt(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.draw_picture(tmp_path / "a.png", interrupt)


def test_a_failed_picture_leaves_the_older_one(tmp_path, axes, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("older")
    monkeypatch.setattr(axes.figure, "savefig", fail)
    with pytest.raises(ValueError, match="no font"):
        common.save_figure(axes.figure, path)
    assert path.read_text() == "older"
    check_pictures(tmp_path, "a.png")


def seen_when_drawing(monkeypatch, folder):
    """Let every picture fail; the list that is returned has the files that are there by then."""
    seen = []

    def look_and_fail():
        paths = [path for path in folder.rglob("*") if "/." not in str(path)]
        names = {path.name for path in paths}
        seen.append(names | {f"{path.parent.name}/{path.name}" for path in paths})
        raise ValueError("no pictures today")

    monkeypatch.setattr(common, "pyplot", look_and_fail)
    return seen


def test_02_has_saved_before_its_first_picture(tmp_path, monkeypatch):
    seen = seen_when_drawing(monkeypatch, tmp_path)
    flags = ("--steps", 2, "--batch-size", 8, "--width", 8, "--sample-every", 1)
    run = run_script("02", "--quick", *flags, "--out", tmp_path)
    check_success(run)
    assert len(seen) == 2
    assert all({"base.pt", "log.jsonl"} <= names for names in seen)
    assert "samples_000002.png could not be drawn" in run.err


@pytest.fixture
def undrawn(tmp_path, small_base, monkeypatch):
    """A finished run of 03 whose pictures have failed -> (its Run, what was there before them)."""
    with monkeypatch.context() as patch:
        seen = seen_when_drawing(patch, tmp_path)
        run = run_script("03", *TINY, "--out", tmp_path)
    check_success(run)
    return run, seen


def test_03_is_safe_before_its_first_picture_and_draws_it_again(tmp_path, undrawn):
    run, seen = undrawn
    assert {"model.pt", "result.json", "log.jsonl"} <= seen[0]
    lines = run.err.splitlines()
    assert [line.split()[1] for line in lines[-2:]] == ["before_after.png", "curves.png"]

    # The command that it prints, word for word.
    _, command = lines[-1].split("draw it again with: python 03_unlearn.py ")
    check_success(run_script("03", *command.split()))
    (folder,) = [path.parent for path in tmp_path.rglob("result.json")]
    assert {"before_after.png", "curves.png"} < {path.name for path in folder.iterdir()}


def test_redraw_makes_the_same_picture_and_trains_nothing(tmp_path, small_base, monkeypatch):
    check_success(run_script("03", *TINY, "--out", tmp_path))
    (picture,) = tmp_path.rglob("before_after.png")
    before = {path.name: path.read_bytes() for path in picture.parent.iterdir()}
    picture.unlink()
    monkeypatch.setattr(common, "guarded_step", None)
    check_success(run_script("03", *TINY, "--redraw", "--out", tmp_path))
    assert {path.name: path.read_bytes() for path in picture.parent.iterdir()} == before


def test_animate_changes_nothing_but_adds_the_animation(tmp_path, small_base):
    """The same samples and weights with it and without it; --redraw makes the same animation."""
    check_success(run_script("03", *TINY, "--out", tmp_path))
    (picture,) = tmp_path.rglob("before_after.png")
    folder = picture.parent
    names = {path.name for path in folder.iterdir()}
    assert "flow.gif" not in names
    before = [picture.read_bytes(), load_weights(folder / "model.pt")]

    check_success(run_script("03", *TINY, "--animate", "--out", tmp_path))
    assert {path.name for path in folder.iterdir()} == names | {"flow.gif"}
    assert picture.read_bytes() == before[0]
    assert same_weights(load_weights(folder / "model.pt"), before[1])
    animation = folder / "flow.gif"
    made = animation.read_bytes()

    animation.unlink()
    check_success(run_script("03", *TINY, "--redraw", "--animate", "--out", tmp_path))
    assert animation.read_bytes() == made


def draw_small_flow(path, images, trajectory, labels):
    """Draw the animation of 8 images with their trajectory; those of the label 3 were of D_f."""
    unlearn = load_script("03")

    def samples(labels):
        verdict = common.Verdict(labels, torch.ones(8), torch.zeros(8, 2), torch.ones(8))
        return unlearn["Samples"](images, verdict, trajectory)

    data = argparse.Namespace(
        forget_classes=[3], forget_names=["3"], class_names=list("0123456789"), images=images
    )
    both = (samples(labels), samples(torch.zeros(8, dtype=torch.int64)))
    unlearn["draw_flow"](path, data, *both, columns=4)


def test_the_animation_shows_only_images_whose_way_is_known(tmp_path):
    """The trajectory is that of the first batch, which may hold fewer images than were drawn."""
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)
    trajectory = [(5.0, images[:4])]
    draw_small_flow(
        tmp_path / "flow.gif", images, trajectory, torch.tensor([0, 1, 3, 0, 0, 3, 0, 3])
    )
    pictures, _ = read_animation(tmp_path / "flow.gif")
    assert len(pictures) == 2


def test_the_animation_ends_with_the_samples(tmp_path):
    """Its last picture is of the images themselves. Those that the left side makes D_f come first.

    Image i is a plane of the brightness 16 i, so that a pixel of the picture tells which it is.
    """
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 1, 28, 28) * 17
    noise = torch.zeros_like(images)
    labels = torch.tensor([0, 1, 0, 0, 0, 3, 0, 3])  # the images 5 and 7 are of D_f

    path = tmp_path / "flow.gif"
    trajectory = [(80.0, images), (5.0, noise), (0.1, noise + 255)]
    draw_small_flow(path, images, trajectory, labels)
    pictures, seconds = read_animation(path)
    assert len(pictures) == 3, "80 is only noise; 5, 0.1 and the samples are shown"
    assert seconds[-1] >= 2

    with Image.open(path) as animation:
        width, height = animation.size
        animation.seek(2)
        last = np.asarray(animation.convert("RGB"))
    # Along the middle of the upper row of the left side: each image has a shade of its own.
    row = last[int(0.35 * height), : width // 2, 0].astype(int)
    shades = [row[int((k + 0.5) * len(row) / 4)] for k in range(4)]
    assert shades == pytest.approx([5 * 17, 7 * 17, 0, 17], abs=4)


# ---- colours and markers -------------------------------------------------------------------------


def test_each_method_has_its_colour_and_its_marker_everywhere():
    methods = {"standard", *load_script("03")["METHODS"]}
    assert methods == set(common.METHOD_STYLES)
    for column in zip(*common.METHOD_STYLES.values()):
        assert len(set(column)) == len(methods)


def test_runs_have_the_style_of_their_method_and_lines_of_their_own():
    names = ["Standard", "obt-rel-vp", "obt-vp", "obt-rel-vp-kappa2.0", "Obt", "real D_g"]
    styles = common.method_styles(names)
    found = [(style["color"], style["marker"]) for style in styles.values()]
    of = common.METHOD_STYLES
    assert found[:5] == [of["standard"], of["obt-rel"], of["obt"], of["obt-rel"], of["obt"]]
    assert styles["real D_g"]["marker"] == ""
    assert styles["obt-rel-vp"]["linestyle"] != styles["obt-rel-vp-kappa2.0"]["linestyle"]
    assert styles["obt-vp"]["linestyle"] != styles["Obt"]["linestyle"]


def test_a_class_to_forget_can_be_told_without_colours(axes):
    """It alone stands in a box."""
    for is_forgotten in (True, False):
        common.label_corner(axes, 0, 0, "3", is_forgotten)
    boxes = [text.get_bbox_patch() for text in axes.texts]
    assert boxes[0] is not None
    assert boxes[1] is None


def texts_outside(fig):
    """The texts of a figure that its edges cut."""
    fig.canvas.draw()
    edges = fig.bbox
    texts = [artist for artist in fig.findobj(common.pyplot().Text) if artist.get_text()]
    outside = []
    for text in texts:
        box = text.get_window_extent()
        is_inside = edges.x0 <= box.x0 and box.x1 <= edges.x1
        is_inside &= edges.y0 <= box.y0 and box.y1 <= edges.y1
        if text.get_visible() and not is_inside:
            outside.append(text.get_text())
    return outside


@pytest.mark.parametrize("num_runs", [1, 4])
def test_the_title_of_restored_images_is_not_cut(num_runs, tmp_path, monkeypatch):
    """With one run the picture is narrow, and with a run of many flags its name is long."""
    script = load_script("05")
    names = ["Standard", *[f"Obt-rel-vp-kappa2.{i}-steps1000" for i in range(num_runs)]]
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)
    labels = torch.tensor([3] * 4 + [1] * 4)
    verdict = common.Verdict(labels, torch.ones(8), torch.zeros(8, 2), torch.ones(8))
    setup = argparse.Namespace(
        args=argparse.Namespace(n=4),
        images=images,
        labels=labels,
        hidden=torch.ones(1, 28, 28, dtype=torch.bool),
        has_hole=True,
        classes=list("0123456789"),
        forget=[3],
    )
    restored = dict.fromkeys(names, images)
    attempt = script["Attempt"]("repaint", restored, dict.fromkeys(names, verdict))
    found = []
    monkeypatch.setattr(common, "save_figure", lambda fig, *_, **__: found.append(fig))
    script["draw_pictures"](tmp_path / "pictures.png", setup, attempt)
    assert texts_outside(found[0]) == []
    common.pyplot().close(found[0])


def test_redraw_without_a_run_names_the_command(tmp_path):
    check_refusal(run_script("03", *TINY, "--redraw", "--out", tmp_path), "not found", "--forget 3")


def test_04_and_05_are_safe_before_their_first_picture(tmp_path, small_base, monkeypatch):
    """An older picture does not stand beside the new table. Drawn again, all is there."""
    check_success(run_script("03", *TINY, "--out", tmp_path))
    (folder,) = tmp_path.rglob("forget-3")
    (folder / "samples.png").write_text("older")
    evaluate = ("04", *TINY[:5], "--n", 20, "--nfe", 2, "--nll", "none", "--out", tmp_path)
    restore = ("05", *TINY[:5], "--n", 3, "--steps", 2, "--out", tmp_path)
    with monkeypatch.context() as patch:
        seen = seen_when_drawing(patch, folder)
        for command in (evaluate, restore):
            run = run_script(*command)
            check_success(run)
            assert "could not be drawn" in run.err
            assert f"{command[0]}_" in run.err, "the command is not named"
            assert run.err.count("\n") == run.err.count("could not be drawn")
    assert {"table.md", "table.json"} <= seen[0]
    assert "samples.png" not in seen[0]
    assert "inpaint-half/table.json" in seen[-1]
    check_success(run_script(*evaluate))
    check_success(run_script(*restore))
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("downstream/*/pictures.png"))


def test_01_is_safe_before_its_first_picture(tmp_path, monkeypatch):
    seen = seen_when_drawing(monkeypatch, tmp_path)
    run = run_script("01", "--quick", "--steps", 2, "--n", 100, "--out", tmp_path)
    check_success(run)
    assert "table.json" in seen[0]
    assert run.err.count("could not be drawn") == 3, "panels.png, frontier.png, flow.gif"


# ---- run: how a program ends ---------------------------------------------------------------------


@pytest.fixture
def run_main(monkeypatch):
    """The function run_main(main) -> Run; common.run calls main in this process."""
    handlers = {signum: signal.getsignal(signum) for signum in common.ending_signals()}
    monkeypatch.setattr(sys, "argv", ["x.py"])

    def run(main):
        return run_function(common.run, main)

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def raise_error(error):
    """A main that ends with this exception."""

    def main(argv):
        raise error

    return main


def check_one_line(run, status, *words):
    """The status, and one line on stderr that holds all words."""
    assert run.status == status, run.err
    assert run.err.count("\n") == 1, run.err
    for word in words:
        assert word in run.err


def test_ctrl_c_is_one_line_and_130(run_main):
    check_one_line(run_main(raise_error(KeyboardInterrupt())), 130, "Ctrl-C")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_cleans_up_and_gives_its_status(run_main, tmp_path, name):
    signum = getattr(signal, name)
    signal.signal(signum, signal.SIG_DFL)

    def main(argv):
        with common.fresh_folder(tmp_path / "run"):
            signal.raise_signal(signum)

    check_one_line(run_main(main), 128 + signum, name)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_nohup_ignores_stays_ignored(run_main):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = run_main(lambda argv: signal.raise_signal(signal.SIGHUP))
    assert run.status == 0


NO_SPACE = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]


@pytest.mark.parametrize("number", NO_SPACE, ids=errno.errorcode.get)
@pytest.mark.parametrize("write", ["save_checkpoint", "write_json", "fresh_folder"])
def test_no_space_is_one_line_that_names_the_path(run_main, tmp_path, monkeypatch, number, write):
    """A failed write leaves the old file, and nothing else."""
    path = tmp_path / "a"

    def no_space(*_, **__):
        raise OSError(number, os.strerror(number))  # a write to an open file names no path

    monkeypatch.setattr(torch, "save", no_space)
    monkeypatch.setattr(Path, "write_text", no_space)

    def main(argv):
        if write == "save_checkpoint":
            common.save_checkpoint(path, arch=1)
        elif write == "write_json":
            common.write_json(path, {"a": 1})
        else:
            with common.fresh_folder(path) as new:
                (new / "table.md").write_text("a")

    check_one_line(run_main(main), 2, str(path), "make room")
    assert list(tmp_path.iterdir()) == []


def test_torch_save_on_a_full_disk_is_one_line(run_main, tmp_path):
    """torch.save itself raises a RuntimeError without a reason. A limit stands for the disk."""
    code = (
        "import resource, sys, torch, common; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        f"common.run(lambda argv: common.save_checkpoint({str(tmp_path / 'a.pt')!r}, "
        "x=torch.zeros(100000)))"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(tmp_path / "a.pt") in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_torch_save_are_shown(tmp_path, monkeypatch):
    def diverge(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", diverge)
    with pytest.raises(RuntimeError, match="something else"):
        common.save_checkpoint(tmp_path / "a.pt", arch=1)


OS_ERRORS = {
    "path": (PermissionError(13, "Permission denied", "base.pt"), "base.pt"),
    "target": (OSError(21, "Is a directory", "base.pt.tmp1", None, "base.pt"), "base.pt cannot"),
    "no path": (OSError("Name or service not known"), "not known"),
}


@pytest.mark.parametrize("error, word", OS_ERRORS.values(), ids=OS_ERRORS.keys())
def test_an_error_of_the_system_is_one_line(run_main, error, word):
    check_one_line(run_main(raise_error(error)), 2, word)


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("mat1 and mat2 shapes")])
def test_a_fault_of_ours_keeps_its_traceback(run_main, error):
    with pytest.raises(type(error)):
        run_main(raise_error(error))


# ---- Ctrl-C before the first line ----------------------------------------------------------------

PROGRAMS = [*SCRIPTS.values(), *(ROOT / "tests" / f"{name}.py" for name in OTHER_PROGRAMS)]


@pytest.mark.parametrize("module", ["argparse", "numpy"])
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_ctrl_c_while_modules_are_imported_is_no_traceback(tmp_path, path, module):
    """A module of this name says that it is being imported, and takes its time."""
    (tmp_path / f"{module}.py").write_text("print(flush=True)\n__import__('time').sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, path], env=environment, **pipes) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    # A shell shows this as 130.
    assert process.returncode == -signal.SIGINT
    assert err == b""


def test_ctrl_c_that_the_shell_ignores_stays_ignored(tmp_path):
    """A shell without a terminal starts `python 02_train_sde.py &` in this way."""
    code = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    code += "sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "numpy.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(7)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert run_process("-c", code, SCRIPTS["03"], env=environment).status == 7


def test_run_listens_to_ctrl_c_again(run_main):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run = run_main(lambda argv: signal.raise_signal(signal.SIGINT))
    check_one_line(run, 130, "Ctrl-C")


# ---- too little memory ---------------------------------------------------------------------------


def allocate_too_much(argv):
    """Ask PyTorch for more bytes than any machine can address; it fails at once."""
    torch.zeros(10**17)


def allocate_beyond_numbers(argv):
    """Ask for so many bytes that their number overflows."""
    torch.zeros(2**62, 4)


def allocate_array(argv):
    """Ask numpy."""
    np.zeros(10**17)


TOO_MUCH = {
    "CPU": allocate_too_much,
    "overflow": allocate_beyond_numbers,
    "numpy": allocate_array,
    "GPU": raise_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")),
    "mps": raise_error(RuntimeError("MPS backend out of memory (MPS allocated: 20 GB)")),
    "Windows": raise_error(RuntimeError("DefaultCPUAllocator: not enough memory: you tried")),
}


@pytest.mark.parametrize("main", TOO_MUCH.values(), ids=TOO_MUCH)
def test_too_little_memory_is_one_line_that_names_the_flags(run_main, main):
    flags = ("--batch-size", "--grad-accum", "--n ", "--width")
    check_one_line(run_main(main), 2, "out of memory", *flags)


@pytest.mark.parametrize("width", [80_000_000, 8_000_000_000])
def test_a_network_larger_than_the_memory_is_refused_before_it_is_built(run_main, width):
    """The second has more weights than PyTorch can count."""
    refuse_too_large = load_script("02")["refuse_too_large"]
    check_one_line(run_main(lambda argv: refuse_too_large({"width": width})), 2, "--width")
    refuse_too_large({"width": 64})


def test_02_looks_whether_its_network_fits_into_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "physical_memory", lambda: 10**6)
    with pytest.raises(MemoryError):
        run_script("02", "--quick", "--width", 64, "--out", tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


def test_the_machine_has_memory():
    assert 2**28 < common.physical_memory() < 2**50


# ---- output that nobody reads --------------------------------------------------------------------

PRINTING = """
import pathlib, sys, common
def main(argv):
    for i in range(3000):
        print("line", i, flush=True)
    pathlib.Path(sys.argv[1]).write_text("finished")
    print("x" * 100000)
common.run(main)
"""


def run_printing(path, redirection):
    """Run the program above in a shell with its output redirected -> (status, stderr)."""
    command = f'"$0" -c "$1" "$2" {redirection}'
    argv = ["bash", "-c", command, sys.executable, PRINTING, path]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "redirection, status, num_lines",
    [
        ("| head -1 > /dev/null; exit ${PIPESTATUS[0]}", 141, 0),
        ("2>&1 | head -1 > /dev/null; exit ${PIPESTATUS[0]}", 141, 0),
        ("> /dev/full", 2, 1),
        (">&-", 0, 0),
    ],
    ids=["closed pipe", "closed pipe for both", "full disk", "closed stdout"],
)
def test_output_that_cannot_be_written_stops_no_run(tmp_path, redirection, status, num_lines):
    path = tmp_path / "result"
    ended, err = run_printing(path, redirection)
    assert path.read_text() == "finished"
    assert ended == status
    assert err.count("\n") == num_lines, err


def test_03_into_a_closed_pipe_leaves_a_finished_run(tmp_path, small_base):
    command = f'"$@" --out {tmp_path} | head -1; exit ${{PIPESTATUS[0]}}'
    argv = ["bash", "-c", command, "bash", sys.executable, SCRIPTS["03"], *TINY]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 141
    (folder,) = [path.parent for path in tmp_path.rglob("result.json")]
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.pt", "result.json", "log.jsonl", "curves.png", "before_after.png"}


# ---- 02: a stopped training ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_02_saves_a_whole_step_when_it_is_stopped(tmp_path, monkeypatch, name):
    signum = getattr(signal, name)
    monkeypatch.setattr(common, "ending_signals", lambda: [signum])
    old_handler = signal.signal(signum, signal.SIG_DFL)
    guarded_step = common.guarded_step
    calls = []

    def stopped_step(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signum)
        return guarded_step(*args)

    monkeypatch.setattr(common, "guarded_step", stopped_step)
    flags = ("--steps", 6, "--batch-size", 8, "--width", 8)
    run = run_script("02", "--quick", *flags, "--out", tmp_path)
    assert signal.signal(signum, old_handler) == signal.SIG_DFL, "02 still listens after its end"
    assert run.status == 128 + signum
    assert "--resume" in run.out
    (path,) = tmp_path.rglob("base.pt")
    assert torch.load(path, weights_only=True)["step"] == 2


# ---- files that cannot be read or written --------------------------------------------------------


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05"])
def test_a_seed_beyond_63_bits_is_refused(tmp_path, number):
    forget = [] if number in ("01", "02") else ["--forget", "3"]
    run = run_script(number, "--quick", *forget, "--seed", 2**63, "--out", tmp_path)
    if number == "01":
        forget = ["--forget", "1"]
    check_refusal(run, "--seed", str(2**63 - 1))


@pytest.fixture
def no_training(monkeypatch):
    """Training is not reached: a refusal has to come before it."""

    def reached(*_):
        raise AssertionError("training has begun")

    monkeypatch.setattr(common, "guarded_step", reached)


def make_folder_there(path):
    """A folder where a file should be."""
    path.mkdir(parents=True)


def make_read_only(path):
    """A file that nobody may write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    path.chmod(0o444)


SPOILS = pytest.mark.parametrize(
    "spoil, word", [(make_folder_there, "is a folder"), (make_read_only, "read-only")]
)


@SPOILS
@pytest.mark.parametrize("name", ["base.pt", "log.jsonl"])
def test_02_refuses_files_that_it_could_not_write(tmp_path, no_training, spoil, word, name):
    path = tmp_path / "quick/mnist" / name
    spoil(path)
    flags = ("--steps", 2, "--batch-size", 8, "--width", 8, "--overwrite")
    run = run_script("02", "--quick", *flags, "--out", tmp_path)
    check_refusal(run, str(path), word)
    assert path.is_dir() or path.read_text() == "precious"


def test_02_refuses_a_judge_that_it_could_not_write(tmp_path):
    path = tmp_path / "quick/mnist/judge.pt"
    make_folder_there(path)
    check_refusal(run_script("02", "--quick", "--judge", "--out", tmp_path), str(path))


def test_03_refuses_to_replace_a_protected_run(tmp_path, small_base, no_training):
    folder = Path(load_script("03")["output_folder"](tiny_arguments(tmp_path), ["3"]))
    make_read_only(folder / "model.pt")
    check_refusal(run_script("03", *TINY, "--out", tmp_path), "model.pt", "read-only")


def tiny_arguments(out):
    """What 03 makes of the tiny flags."""
    return load_script("03")["arguments"]([*TINY, "--out", str(out)])


@pytest.mark.parametrize("number", ["03", "04", "05"])
def test_a_folder_in_the_place_of_the_base_is_named(tmp_path, number):
    path = tmp_path / "quick/mnist/base.pt"
    make_folder_there(path)
    folder = tmp_path / "quick/mnist/forget-3/ort-vp"
    folder.mkdir(parents=True)
    args = {"method": "ort", "sde": "vp", "seed": 0}
    arch = torch.load(ROOT / "data/mnist_base.pt", weights_only=True)["arch"]
    common.save_checkpoint(folder / "model.pt", arch=arch, ema={}, args=args)
    run = run_script(number, "--quick", "--forget", 3, "--out", tmp_path)
    check_refusal(run, str(path), "is a folder")


@pytest.mark.parametrize("number", ["04", "05"])
def test_a_folder_in_the_place_of_a_model_is_named(tmp_path, number):
    path = tmp_path / "quick/mnist/forget-3/ort-vp/model.pt"
    make_folder_there(path)
    run = run_script(number, "--quick", "--forget", 3, "--out", tmp_path)
    check_refusal(run, str(path), "is a folder")


def test_a_folder_in_the_place_of_a_mask_is_named(tmp_path):
    check_refusal(run_function(load_script("05")["read_grey"], tmp_path), f"--mask {tmp_path}")


@SPOILS
def test_04_refuses_files_that_it_could_not_write(tmp_path, spoil, word, monkeypatch):
    script = load_script("04")
    path = tmp_path / "table.json"
    spoil(path)
    names = script["main"].__globals__
    monkeypatch.setattr(common, "forget_folder", lambda *_: tmp_path)
    for name in ("find_models", "check_attack", "draw_nll_images", "evaluate"):
        monkeypatch.setitem(names, name, lambda *_: None)
    images = common.Dataset(torch.zeros(1, 1, 28, 28), torch.zeros(1), list("0123456789"))
    monkeypatch.setattr(common, "load_train_and_test", lambda *_: (images, images))
    monkeypatch.setitem(names, "split_images", lambda *_: (argparse.Namespace(train_f=[]), [3]))
    run = run_function(script["main"], ["--quick", "--forget", "3", "--out", str(tmp_path / "o")])
    check_refusal(run, str(path), word)


@SPOILS
def test_01_refuses_files_that_it_could_not_write(tmp_path, spoil, word):
    path = tmp_path / "quick/toy/table.json"
    spoil(path)
    check_refusal(run_script("01", "--quick", "--out", tmp_path), str(path), word)


def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "base.pt"
    path.write_text("x")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(common, "read_torch_file", denied)
    check_refusal(run_function(common.load_checkpoint, path, "command"), str(path), "denied")


def test_a_folder_in_the_place_of_the_data_is_named(tmp_path):
    make_folder_there(tmp_path / "mnist.npz")
    run = run_script("03", *TINY, "--data-dir", tmp_path, "--out", tmp_path / "out")
    check_refusal(run, str(tmp_path))
