"""README.md and docs/: tables against their files, commands that run, functions that can be pasted.

The long part is marked slow: it runs the commands of docs/, with --quick and tiny numbers.
"""

import ast
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import page_tables
import pytest
from conftest import ROOT, SCRIPTS, check_refusal, load_script, run_function, run_script

import common

PAGES = {page: (ROOT / page).read_text() for page in page_tables.PAGES}
README = PAGES["README.md"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The current folder of a test: reading the flags of a script makes the folder out/ there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page_tables.make_tables.PLACES, "runs", tmp_path / "tables")


# ---- the size of README --------------------------------------------------------------------------


def test_readme_fits_its_budget():
    assert len(README.split()) <= 2200, "words"
    lines = README.splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120


# ---- tables --------------------------------------------------------------------------------------

# Tables that no file in assets/ stands behind: the first cells of their header -> why.
OTHER_TABLES = {
    "symbol": "words",
    "`--method`": "formulas",
    "file": "minutes, of the docstrings",
    "take": "names; pasted below",
    "you see": "words",
    "column": "words",
    "poster": "the poster's own figures",
    "`--dataset`": "sizes of downloads",
    "what": "names and lines of the released code",
    "sitting": "a plan",
}


def table_blocks(text):
    """Yield (the line above, the lines) of each table of a page."""
    lines = text.splitlines()
    is_row = [line.startswith("|") for line in lines]
    for i in range(1, len(lines)):
        if is_row[i] and not is_row[i - 1]:
            yield lines[i - 1], list(itertools.takewhile(lambda x: x.startswith("|"), lines[i:]))


@pytest.mark.parametrize("page", PAGES)
def test_each_table_says_what_its_file_says(page):
    assert page_tables.anew(PAGES[page]) == PAGES[page], "run: python tests/page_tables.py --write"


def test_a_wrong_cell_is_found():
    wrong = README.replace("| 11.0 | 15.8 |", "| 11.0 | 15.9 |")
    assert wrong != README
    assert page_tables.anew(wrong) == README


@pytest.mark.parametrize("page", PAGES)
def test_every_other_table_is_known(page):
    for above, lines in table_blocks(PAGES[page]):
        if not above.startswith("<!-- python tests/page_tables.py "):
            assert lines[0].split("|")[1].strip() in OTHER_TABLES, lines[0]


@pytest.mark.parametrize("name", OTHER_TABLES)
def test_every_exception_is_there(name):
    assert f"| {name} |" in "".join(PAGES.values())


@pytest.mark.parametrize("name", page_tables.TABLES)
def test_a_table_has_as_many_cells_in_each_line(name):
    counts = {line.count("|") for line in page_tables.lines_of(name)}
    assert len(counts) == 1


def test_a_table_whose_run_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(page_tables.make_tables, "load", dict)
    page_tables.lines_of.cache_clear()
    check_refusal(run_function(page_tables.lines_of, "wishes"), "until/3", "make_tables.py")


# ---- links ---------------------------------------------------------------------------------------


def anchors(text):
    """The names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path) if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


# ---- commands ------------------------------------------------------------------------------------

# Commands that no test runs: what they hold -> why.
NOT_RUN = {
    "git clone": "there is no address",
    "cd msgm": "of the same line",
    "python3 -m venv": "it makes an environment; .ci/run does",
    "source": "it enters it",
    "pip install": "it downloads, and changes the environment of the tests",
    "pytest": "these are the tests",
    "torchrun": "tests/test_datasets.py starts two processes",
    "--dataset cifar10": "it downloads; tests/test_datasets.py has a small file in the true format",
    "--data-dir": "it takes pictures of your own; tests/test_datasets.py has some",
    "tests/shapes.py": "tests/test_datasets.py draws the shapes",
    "--pipeline": "it downloads Stable Diffusion; tests/test_text_to_image.py has a small one",
}

# What makes a command tiny.
TINY = {
    r"--steps \d+": "--steps 2",
    r"-steps\d+": "-steps2",
    r"--batch-size \d+": "--batch-size 8",
    r"--n \d+": "--n 20",
    r"--nfe \d+": "--nfe 4",
    r"--n-nll \d+": "--n-nll 3",
    r"--width \d+": "--width 16",
}


PROGRAM = re.compile(r"python - <<'EOF'\n(.*?)EOF\n", flags=re.DOTALL)


def blocks(text):
    """The code blocks of a page."""
    return re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)


def programs(text):
    """The programs that stand in the code blocks of a page between <<'EOF' and EOF."""
    return PROGRAM.findall("".join(blocks(text)))


def commands(text):
    """List the commands of all code blocks of a page, without those programs."""
    result = []
    for block in blocks(text):
        for line in PROGRAM.sub("", block).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            result += [part for part in shlex.join(words).split(" '&&' ") if part]
    return result


def is_run(command):
    return not any(text in command for text in NOT_RUN)


def run_tiny(command, out):
    """Run one command with --quick and tiny numbers -> Run."""
    for pattern, tiny in TINY.items():
        command = re.sub(pattern, tiny, command)
    if "--out " not in command:
        command += " --out out"
    _, name, *argv = shlex.split(command.replace("--out ", f"--out {out}/"))
    return run_script(name[:2], *argv, "--quick")


def check_commands(page, out):
    """Run all commands of a page in their order, in one folder."""
    numbers = []
    for command in filter(is_run, commands(PAGES[page])):
        run = run_tiny(command, out)
        # A run of two steps may have made things worse: status 1. Bad flags have status 2.
        assert run.status in (0, 1), f"{command}: {run.err[-500:]}"
        numbers.append(command.split()[1][:2])
    return numbers


def test_commands_of_readme_run(tmp_path):
    assert check_commands("README.md", tmp_path) == ["03"]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/results.md", "docs/course.md"])
def test_commands_of_the_other_pages_run(page, tmp_path):
    assert len(check_commands(page, tmp_path)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_programs_of_a_page_run(page):
    for program in programs(PAGES[page]):
        subprocess.run([sys.executable, "-"], input=program, text=True, cwd=ROOT, check=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_flags_that_its_script_knows(page):
    inline = re.findall(r"`(python \S+\.py[^`\n]*)`", PAGES[page])
    for command in [*filter(is_run, commands(PAGES[page])), *inline]:
        words = shlex.split(command, comments=True)
        if len(words) == 2:
            continue  # the name of a script, not the whole command
        script = types.SimpleNamespace(**load(words[1]))
        script.arguments(words[2:])  # it exits with status 2 on a flag that it does not know


def load(name):
    """The names that a script defines, of the project's folder or of tests/."""
    if name[:2] in SCRIPTS:
        return load_script(name[:2])
    spec = common.HERE / name
    return vars(__import__(spec.stem))


@pytest.mark.parametrize("text", NOT_RUN)
def test_every_command_that_is_not_run_is_there(text):
    found = commands("".join(PAGES.values()))
    assert any(text in command for command in found)


STUB = """#!/bin/bash
mkdir -p .venv/bin
echo "PATH=$PWD/venv:$PATH" > .venv/bin/activate
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("broken", ["", "pip", "python", "ruff"])
def test_ci_runs_the_commands_of_readme(tmp_path, broken):
    """With programs that only write down how they were called."""
    for name in (".ci/run", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "venv").mkdir()
    write_program(tmp_path / "bin/python3", STUB)
    for name in ("pip", "python", "ruff"):
        status = int(name == broken)
        said = f'#!/bin/bash\necho {name} "$@" >> "{tmp_path}/said"\nexit {status}\n'
        write_program(tmp_path / "venv" / name, said)

    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(tmp_path / ".ci/run")]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    said = (tmp_path / "said").read_text().splitlines()
    everything = [
        "pip install -r requirements.txt",
        "python 03_unlearn.py --dataset mnist --forget 3",
        "pip install -r tests/requirements.txt",
        "python -m pytest -q -n auto tests",
        "ruff check .",
        "ruff format --check .",
    ]
    assert said == everything[: len(said)]
    assert (done.returncode == 0) == (broken == "")
    assert (len(said) == len(everything)) == (broken == "")


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


# ---- functions to copy ---------------------------------------------------------------------------

IMPORTS = {
    "contextlib": "import contextlib",
    "math": "import math",
    "torch": "import torch",
    "nn": "import torch.nn as nn",
    "F": "import torch.nn.functional as F",
    "common": "import common",
}


def copied_rows():
    """Yield (script, names to take, names with them, imports, for what) of each row."""
    for _, lines in table_blocks(README):
        if lines[0].startswith("| take |"):
            for line in lines[2:]:
                cells = line.split("|")[1:-1]
                script = re.search(r"\((0\d)\)", cells[0])
                path = SCRIPTS[script[1]] if script else ROOT / "common.py"
                yield path, *[re.findall(r"`(\w+)`", cell) for cell in cells[:3]], cells[3].strip()


ROWS = list(copied_rows())
ROW = pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][0])


def needed(path, names):
    """What some functions of a file need -> (other names of the file, import statements)."""
    defined = {}
    imports = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                imports[alias.asname or alias.name] = ast.unparse(node)
    to_read = list(names)
    found = set()
    statements = set()
    while to_read:
        name = to_read.pop()
        found.add(name)
        for node in ast.walk(defined[name]):
            if isinstance(node, ast.Name) and node.id in defined and node.id not in found:
                to_read.append(node.id)
            elif isinstance(node, ast.Name) and node.id in imports:
                statements.add(imports[node.id])
    return found - set(names), statements


@ROW
def test_a_row_names_all_that_its_functions_need_and_no_more(row):
    path, names, others, imports, _ = row
    assert needed(path, names) == (set(others), {IMPORTS[name] for name in imports})
