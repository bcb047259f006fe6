"""Style: what ruff checks, and what it cannot see. Each rule is shown to find a bad example.

A rule is a function of a file's text that yields (line, reason) for every place that breaks it.
Why these rules: a reader should never have to unpack a line before understanding it, and should be
able to run every script with the four packages of requirements.txt.
"""

import ast
import functools
import io
import os
import re
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT, run_process

MAX_COLUMNS = 100
MAX_TOKENS = 13  # a code line, on average over a file
MIN_COMMENTS = 0.10  # share of the lines that are not blank
PACKAGES = {"torch", "numpy", "matplotlib", "torchvision", "common"}

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
PACKED_STATEMENTS = (ast.Tuple, ast.IfExp, ast.BoolOp, *COMPREHENSIONS)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.NamedExpr)


def python_files(folder):
    """All .py files of the project, sorted: none of hidden folders, of out/ or of .venv/."""
    result = []
    for place, folders, files in os.walk(folder):
        hidden = [name for name in folders if name.startswith(".") or name == "out"]
        for name in hidden:
            folders.remove(name)  # os.walk then does not go there
        result += [Path(place) / name for name in files if name.endswith(".py")]
    return sorted(result)


# ---- rules for every file ------------------------------------------------------------------------


@functools.cache
def nodes(source):
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(source)))


def find_long_lines(source):
    for number, line in enumerate(source.splitlines(), start=1):
        if len(line) > MAX_COLUMNS:
            yield number, f"{len(line)} columns"


def find_packed_statements(source):
    for node in nodes(source):
        if isinstance(node, ast.Expr) and isinstance(node.value, PACKED_STATEMENTS):
            yield node.lineno, "an expression as a statement: write one call on a line"


def find_nested_conditions(source):
    for node in nodes(source):
        if not isinstance(node, ast.IfExp):
            continue
        inside = [child for child in ast.walk(node) if child is not node]
        if any(isinstance(child, ast.IfExp) for child in inside):
            yield node.lineno, "a conditional expression inside another one"


def find_double_comprehensions(source):
    for node in nodes(source):
        if isinstance(node, COMPREHENSIONS) and len(node.generators) > 1:
            yield node.lineno, "a comprehension with two loops"


def find_packed_assignments(source):
    for node in nodes(source):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and not is_swap(target, node.value):
            yield node.lineno, "several assignments on one line"


def is_swap(target, value):
    """Whether an assignment such as `a, b = b, a` only exchanges what its targets name."""
    names = {ast.unparse(element) for element in target.elts}
    return names == {ast.unparse(element) for element in value.elts}


def find_walrus_in_calls(source):
    for node in nodes(source):
        if not isinstance(node, ast.Call):
            continue
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        if any(isinstance(value, ast.NamedExpr) for value in values):
            yield node.lineno, "a walrus inside a call"


def find_assigned_lambdas(source):
    for node in nodes(source):
        if isinstance(node, ASSIGNMENTS) and node.value and holds_lambda(node.value):
            yield node.lineno, "a lambda gets a name: write a def"


def holds_lambda(node):
    """Whether an expression has a lambda in it; what is handed to a call does not count."""
    if isinstance(node, ast.Lambda):
        return True
    if isinstance(node, ast.Call):
        return False
    return any(holds_lambda(child) for child in ast.iter_child_nodes(node))


def find_strings_times_conditions(source):
    switches = switch_names(source)
    for node in nodes(source):
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
            continue
        for text, factor in ((node.left, node.right), (node.right, node.left)):
            if is_string(text) and is_condition(factor, switches):
                yield node.lineno, "a string times a condition: write an if"


def switch_names(source):
    """Names that hold True or False: flags without a value, parameters with such a default."""
    result = {"quick", "compile"}  # flags that all scripts have
    for node in nodes(source):
        if isinstance(node, ast.Call) and is_switch(node):
            result.add(node.args[0].value.lstrip("-").replace("-", "_"))
        if isinstance(node, ast.arguments):
            with_default = [*node.posonlyargs, *node.args][-len(node.defaults) :]
            pairs = [*zip(with_default, node.defaults), *zip(node.kwonlyargs, node.kw_defaults)]
            result |= {argument.arg for argument, default in pairs if is_bool(default)}
    return result


def is_switch(call):
    """Whether a call is add_argument of a flag that is on or off."""
    actions = [keyword.value for keyword in call.keywords if keyword.arg == "action"]
    is_on_or_off = any("store_true" in ast.unparse(action) for action in actions)
    is_on_or_off |= any("BooleanOptionalAction" in ast.unparse(action) for action in actions)
    return is_on_or_off and bool(call.args) and isinstance(call.args[0], ast.Constant)


def is_bool(node):
    """Whether a node is True or False itself."""
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def is_string(node):
    """Whether an expression is a string as far as the text tells."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return is_string(node.left) or is_string(node.right)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    return isinstance(node, ast.JoinedStr)


def is_condition(node, switches):
    """Whether an expression is True or False as far as the text tells."""
    if isinstance(node, ast.Compare) or is_bool(node):
        return True
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.BoolOp):
        return all(is_condition(value, switches) for value in node.values)
    if isinstance(node, ast.Call):
        return is_condition(node.func, switches)
    name = ""
    if isinstance(node, ast.Name):
        name = node.id
    if isinstance(node, ast.Attribute):
        name = node.attr
    return name in switches | {"bool", "isinstance", "any", "all"} or name.startswith("is_")


COLOUR_WORDS = ("color", "edgecolor", "facecolor", "markeredgecolor", "mec", "mfc", "c")
NO_COLOUR = re.compile(r"black|white|none|k|w|0(\.\d+)?|1")  # a grey is a number from 0 to 1


def find_own_colours(source):
    """Colours mean the same in all figures, so they come from common.METHOD_STYLES and its like."""
    for node in nodes(source):
        pairs = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        if isinstance(node, ast.Dict):
            keys = [getattr(key, "value", None) for key in node.keys]
            pairs = list(zip(keys, node.values))
        for name, value in pairs:
            is_text = isinstance(value, ast.JoinedStr) or isinstance(
                getattr(value, "value", None), str
            )
            text = getattr(value, "value", "of an f-string")
            if name in COLOUR_WORDS and is_text and not NO_COLOUR.fullmatch(str(text)):
                yield value.lineno, f"a colour of its own: {text}"


# ---- rules for common.py and the numbered scripts ------------------------------------------------


def find_other_packages(source):
    """Only four packages at top level; an optional one is imported where it is needed."""
    for node in top_level_nodes(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            package = name.split(".")[0]
            if package not in PACKAGES | sys.stdlib_module_names:
                yield node.lineno, f"imports {name} at top level"


def top_level_nodes(node):
    """All nodes outside functions: those inside of `if`, `try` and classes run at import too."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from top_level_nodes(child)


def find_missing_comments(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    filled = [line for line in source.splitlines() if line.strip()]
    share = len(commented) / max(1, len(filled))
    if share < MIN_COMMENTS:
        yield 1, f"comments on {100 * share:.1f} % of the lines"


def find_dense_code(source):
    """A line of 20 tokens is no fault. A file of such lines cannot be read, only deciphered."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    text = docstring_lines(source)
    num_tokens = 0
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_code = token.string and token.type not in silent
        if is_code and token.start[0] not in text:
            num_tokens += 1
            lines.update(range(token.start[0], token.end[0] + 1))
    if num_tokens > MAX_TOKENS * len(lines):
        yield 1, f"{num_tokens / len(lines):.1f} tokens a line"


def docstring_lines(source):
    """The numbers of all lines that belong to a docstring."""
    result = set()
    for node in nodes(source):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            result.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return result


RULES = {
    "dense code": find_dense_code,
    "long lines": find_long_lines,
    "packed statements": find_packed_statements,
    "nested conditions": find_nested_conditions,
    "double comprehensions": find_double_comprehensions,
    "packed assignments": find_packed_assignments,
    "walrus in calls": find_walrus_in_calls,
    "assigned lambdas": find_assigned_lambdas,
    "strings times conditions": find_strings_times_conditions,
    "own colours": find_own_colours,
}
TOP_LEVEL_RULES = {
    "other packages": find_other_packages,
    "missing comments": find_missing_comments,
}
FILES = python_files(ROOT)
TOP_LEVEL_FILES = [path for path in FILES if path.parent == ROOT]


def relative_name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative_name)
@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps(rule, path):
    assert list(RULES[rule](path.read_text())) == []


@pytest.mark.parametrize("path", TOP_LEVEL_FILES, ids=relative_name)
@pytest.mark.parametrize("rule", TOP_LEVEL_RULES)
def test_every_top_level_file_keeps(rule, path):
    assert list(TOP_LEVEL_RULES[rule](path.read_text())) == []


@pytest.mark.parametrize("name", ["common.py", "03_unlearn.py", "tests/test_style.py"])
def test_files_are_found(name):
    assert ROOT / name in FILES


def test_hidden_and_written_folders_are_left_out(tmp_path):
    for folder in (".venv/lib", ".git", "out", "tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "some.py").write_text("")
    assert python_files(tmp_path) == [tmp_path / "tests/some.py"]


# ---- each rule finds what it is for --------------------------------------------------------------

COMMENTED = "# why\n" + "x = 1\n" * 9  # exactly one line of ten

BAD = [
    ("dense code", "x = [a(1), b(2), c(3)]"),
    ("dense code", '"""Text does not make it any thinner."""\nx = [a(1), b(2), c(3)]'),
    ("long lines", "x = '" + "a" * 95 + "'"),
    ("packed statements", "print(1), print(2)"),
    ("packed statements", "print(1) if x else print(2)"),
    ("packed statements", "x and print(1)"),
    ("packed statements", "[print(i) for i in range(3)]"),
    ("nested conditions", "x = 1 if a else 2 if b else 3"),
    ("nested conditions", "x = 1 if a else f(2 if b else 3)"),
    ("double comprehensions", "x = [i + j for i in a for j in b]"),
    ("double comprehensions", "x = {i: j for i in a for j in b}"),
    ("packed assignments", "a, b = 1, []"),
    ("packed assignments", "a, b = b, c"),
    ("walrus in calls", "f(x := 1)"),
    ("walrus in calls", "f(key=(x := 1))"),
    ("assigned lambdas", "f = lambda x: x"),
    ("assigned lambdas", "f: Callable = lambda x: x"),
    ("assigned lambdas", "f, g = (lambda x: x), h"),
    ("assigned lambdas", "f = g or (lambda x: x)"),
    ("assigned lambdas", "table = {'a': lambda x: x}"),
    ("strings times conditions", "x = 's' * (n > 1)"),
    ("strings times conditions", "x = (n == 1) * f', {n}'"),
    ("strings times conditions", "x = ('-' + name) * (not name)"),
    ("strings times conditions", "x = 's' * is_many"),
    ("strings times conditions", "x = 's' * isinstance(n, list)"),
    ("strings times conditions", "x = ' --quick' * args.quick"),
    ("strings times conditions", "def f(packed=True): return '.gz' * packed"),
    ("strings times conditions", "add('--from-scratch', action='store_true'); 's' * from_scratch"),
    ("own colours", "ax.plot(x, y, color='red')"),
    ("own colours", "ax.plot(x, y, color=f'C{k}')"),
    ("own colours", "style = {'edgecolor': '#d05050'}"),
    ("other packages", "import scipy"),
    ("other packages", "from PIL import Image"),
    ("other packages", "import torch, scipy.linalg"),
    ("other packages", "from . import losses"),
    ("other packages", "try:\n    import diffusers\nexcept ImportError:\n    pass"),
    ("missing comments", "# why\n" + "x = 1\n" * 10),
    ("missing comments", "x = '# no comment'\n"),
]

GOOD = [
    ("dense code", "x = [a(1), b(2), c(3)]\ny = x\nz = y"),
    ("long lines", "x = '" + "a" * 94 + "'"),
    ("packed statements", "print(1)"),
    ("nested conditions", "x = 1 if a else 2"),
    ("double comprehensions", "x = [[i + j for i in a] for j in b]"),
    ("packed assignments", "a, b = b, a"),
    ("packed assignments", "a, b = f(x)"),
    ("walrus in calls", "while line := f(x):\n    pass"),
    ("assigned lambdas", "x = sorted(y, key=lambda z: -z)"),
    ("strings times conditions", "x = '-' * width"),
    ("strings times conditions", "x = '-' * (len(y) + 1)"),
    ("own colours", "ax.plot(x, y, color='0.5', mec='black', **style)"),
    ("own colours", "ax.plot(x, y, color=common.FORGOTTEN)"),
    ("other packages", "import os\nimport torch.nn\nfrom torchvision import datasets"),
    ("other packages", "def f():\n    import diffusers"),
    ("missing comments", COMMENTED),
    ("missing comments", COMMENTED + "\n" * 50),
]


@pytest.mark.parametrize("rule, source", BAD)
def test_a_bad_example_is_found(rule, source):
    found = {**RULES, **TOP_LEVEL_RULES}[rule](source)
    assert list(found) != []


@pytest.mark.parametrize("rule, source", GOOD)
def test_a_good_example_is_left_alone(rule, source):
    found = {**RULES, **TOP_LEVEL_RULES}[rule](source)
    assert list(found) == []


@pytest.mark.parametrize("rule", [*RULES, *TOP_LEVEL_RULES])
def test_every_rule_has_a_bad_example(rule):
    assert rule in [name for name, _ in BAD]


# ---- ruff ----------------------------------------------------------------------------------------

RUFF = {"check": ("check",), "format": ("format", "--check")}


def run_ruff(command, *paths):
    """Run ruff with the project's settings -> Run."""
    settings = ("--no-cache", "--config", ROOT / "pyproject.toml")
    return run_process("-m", "ruff", *RUFF[command], *settings, *paths, cwd=ROOT)


@pytest.mark.parametrize("command", RUFF)
def test_ruff_finds_nothing(command):
    run = run_ruff(command, *FILES)
    assert run.status == 0, run.out + run.err


@pytest.mark.parametrize("command", RUFF)
def test_ruff_finds_a_bad_example(command, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import os\nx=1\n")
    run = run_ruff(command, path)
    assert run.status == 1, run.out + run.err
    assert "bad.py" in run.out
