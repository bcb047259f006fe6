"""The exercises of docs/course.md: write a function yourself, and let the project's test check it.

    python tests/exercise.py 3                  # the exercise of the third sitting
    python tests/exercise.py 3 --out my_folder  # the copy goes there, not to out/exercises/3

The first call copies the scripts and their tests into a folder, and takes the body of one function
away. Its signature and its docstring stay. Then the test of that function runs on the copy, and
fails. Write the function in the copy and type the same command again, until the test passes.

A copy that is there is never replaced. To begin again, delete its folder. It says in exercise.txt
which exercise it is for. A solution stands in the file that was copied.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # The imports take seconds. Until common.run listens, Ctrl-C ends the program without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Python looks for modules beside this file; common.py is one folder higher.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


class Exercise(NamedTuple):
    """A function to write, and what checks it."""

    file: str  # the file that holds the function
    function: str  # its name
    test_file: str  # in the folder tests
    tests: str  # which tests of that file, as pytest's -k takes it


EXERCISES = {
    1: Exercise("01_gaussian_toy.py", "ascent_optimum", "test_toy.py", "ascent_equals"),
    2: Exercise("common.py", "dsm_loss", "test_losses.py", "recovers and -vp or weight_v"),
    3: Exercise("common.py", "obt_rel_loss", "test_losses.py", "obt-rel and 2.0 or obt_rel_loss"),
    4: Exercise("common.py", "frechet_distance", "test_measures.py", "test_frechet"),
    5: Exercise("05_downstream.py", "noise_and_denoise", "test_downstream.py", "posterior"),
    6: Exercise(
        "06_text_to_image.py", "obt_rel_loss", "test_text_to_image.py", "esd_wants or by_the_noise"
    ),
}


NOTE = "exercise.txt"  # in a copy: the number of its exercise


def arguments(argv):
    """Read the command line."""
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.example = "python tests/exercise.py 3"
    p.add_argument("number", type=int, choices=list(EXERCISES), help="of the sitting")
    p.add_argument(
        "--out", metavar="FOLDER", help="where the copy goes (default: out/exercises/<number>)"
    )
    args = p.parse_args(argv)
    args.out = Path(args.out or f"out/exercises/{args.number}")
    return args


def without_body(source, name):
    """Return the text of a Python file in which one function has lost its body.

    What is left of it are the signature, the docstring and a line that raises NotImplementedError.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            docstring = node.body[0]
            break
    else:
        raise ValueError(f"there is no function {name}")
    lines = source.splitlines(keepends=True)
    # A comment above the first statement says how it is done, so it goes too.
    return "".join([
        *lines[: docstring.end_lineno],
        "    raise NotImplementedError\n",
        *lines[node.end_lineno :],
    ])


def copy_blanked(number, folder):
    """Copy the scripts and the tests into a new folder, and blank the function of an exercise."""
    exercise = EXERCISES[number]
    with common.fresh_folder(folder) as new:
        (new / "tests").mkdir()
        for part in (".", "tests"):
            for path in (common.HERE / part).glob("*.py"):
                shutil.copy(path, new / part / path.name)
        path = new / exercise.file
        path.write_text(without_body(path.read_text("utf-8"), exercise.function), "utf-8")
        (new / NOTE).write_text(f"{number}\n")


def is_blank(path, name):
    """Tell whether a function in a Python file still is as `without_body` has left it."""
    source = path.read_text("utf-8")
    try:
        return without_body(source, name) == source
    except (SyntaxError, ValueError):  # it is being written
        return False


def check(exercise, folder):
    """Run the tests of the exercise on the copy in `folder` -> the exit status of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"tests/{exercise.test_file}", "-k", exercise.tests]
    return subprocess.run(command, cwd=folder, check=False).returncode


def main(argv=None):
    """Make the copy if there is none yet, and run the tests on it."""
    args = arguments(argv)
    exercise = EXERCISES[args.number]
    path = args.out / exercise.file
    if importlib.util.find_spec("pytest") is None:
        common.exit_with_error("pytest is missing; run: pip install -r tests/requirements.txt")
    if not args.out.exists():
        copy_blanked(args.number, args.out)
    note = args.out / NOTE
    is_own = note.is_file() and note.read_text().strip() == str(args.number)
    if not is_own or not path.is_file():
        common.exit_with_error(
            f"{args.out} is no copy for exercise {args.number}; "
            f"take another folder: python tests/exercise.py {args.number} --out FOLDER"
        )

    status = check(exercise, args.out)
    if status == 0:
        print(f"{exercise.function} in {path} passes its test; a solution: {exercise.file}")
        return
    if is_blank(path, exercise.function):
        print(f"now write {exercise.function} in {path}, then run the same command again")
    else:
        print(f"not yet: {exercise.function} in {path} does not pass; the course has a solution")
    raise SystemExit(1)


if __name__ == "__main__":
    common.run(main)
