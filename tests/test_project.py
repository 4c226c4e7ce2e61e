"""The project's files: how long they are, what they import, what setting up installs."""

import ast
import importlib.util
import os
import random
import re
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent.parent
BUDGETS = {  # lines, and lines of code: neither blank, nor comments, nor docstrings
    "sacl.py": (1424, 996),
    "images.py": (345, 261),
    "texture.py": (470, 300),
    "shapes.py": (102, 70),
    "eval_linear.py": (284, 207),
    "test_sacl.py": (711, 510),
    "tests/*.py": (3775, 2870),
    "related/*.py": (636, 333),
    "bench/*.py": (1990, 1420),
    "README.md": (150, None),
}


def lines_of_code(path):
    """Explanation is free."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    with open(path, "rb") as file:
        for t in list(tokenize.tokenize(file.readline))[1:]:
            docstring = t.type == tokenize.STRING and t.string.startswith('"""')
            if t.type not in silent | {tokenize.ENDMARKER} and not docstring:
                lines |= set(range(t.start[0], t.end[0] + 1))
    return len(lines)


@pytest.mark.parametrize("name", BUDGETS)
def test_files_stay_within_their_budget(name):
    """What they have reached, plus 3 %."""
    (lines, code), files = BUDGETS[name], list(HERE.glob(name))
    assert files, f"{name}: there is no such file"
    assert sum(len(file.read_text().splitlines()) for file in files) <= lines
    assert code is None or sum(map(lines_of_code, files)) <= code


LAYERS = [  # each imports those before it only
    {"images", "texture", "shapes"}, {"sacl"}, {"eval_linear"}, {"related"}, {"bench"},
    {"conftest", "test_sacl", "tests"},
]  # fmt: skip


def imports(tree):
    """The top-level names of what is imported below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0] if not node.level else "."


def layer(name):
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


@pytest.mark.parametrize("folder", ["", "tests", "related", "bench"])
def test_imports_run_one_way(folder):
    """tests -> bench -> related -> eval_linear -> sacl -> images, texture, shapes."""
    files = list((HERE / folder).glob("*.py"))
    for path in files:
        module = "tests" if path.name.startswith("test_") else folder or path.stem
        own = layer(module)
        for name in imports(ast.parse(path.read_text())):
            found = layer(name)
            beside = found == own > layer("eval_linear")  # a folder's files may share parts
            assert found is None or found < own or beside, f"{path} imports {name}"
    assert files


@pytest.mark.parametrize("name, also", [
    ("shapes", {"torch"}), ("texture", {"torch", "numpy"}), ("images", {"torch", "numpy", "PIL"}),
    ("sacl", {"torch", "torchvision", "numpy"}), ("eval_linear", {"torch", "sacl"}),
])  # fmt: skip
def test_a_file_imports_only_what_the_requirements_name(name, also):
    """At import; what only some runs need comes later, and is in the requirements too."""
    requirements = re.findall(r"(?m)^[\w-]+", (HERE / "requirements.txt").read_text())
    tree = ast.parse((HERE / f"{name}.py").read_text())
    top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    assert set(imports(top)) - set(sys.stdlib_module_names) <= also
    third = {"PIL": "pillow"}
    rest = set(imports(tree)) - set(sys.stdlib_module_names) - set().union(*LAYERS)
    assert {third.get(x, x) for x in rest} <= {x.lower() for x in requirements}


def state():
    yield from (torch.get_num_threads(), torch.get_float32_matmul_precision(), list(sys.path))
    yield from (torch.backends.cudnn.benchmark, torch.cuda.is_initialized(), dict(os.environ))
    yield from (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))


@pytest.mark.parametrize("name", ["sacl", "texture", "images", "shapes", "eval_linear"])
def test_importing_has_no_effect(name, capsys, monkeypatch):
    before = list(state())
    spec = importlib.util.spec_from_file_location("anew", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "anew", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    assert list(state()) == before and capsys.readouterr() == ("", "")


def test_every_numbered_equation_stands_in_sacl_py():
    found = re.findall(r"Eq\. \((\d+)\)((?:, \(\d+\)|-\(\d+\))*)", (HERE / "sacl.py").read_text())
    numbers = set()
    for first, rest in found:
        last = re.findall(r"\d+", rest)
        numbers |= set(range(int(first), int(last[-1]) + 1)) if last else {int(first)}
    assert numbers >= set(range(1, 11))


def test_nothing_names_the_place_where_it_was_built():
    """Results are left out: a log may say where it was written."""
    kinds = {".py", ".md", ".sh", ".toml", ".txt", ".yml", ".cff"}
    words = ("../" + "shared", "/" + "work/")
    skipped = {".git", ".venv", "venv", "results", "runs", "data", "__pycache__"}
    for path in [p for p in HERE.rglob("*") if p.is_file() and p.suffix in kinds]:
        if not skipped & set(path.relative_to(HERE).parts):
            text = path.read_text()
            assert not any(word in text for word in words), path


def project():
    """pyproject.toml, which the other lists of requirements repeat."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    return tomllib.loads, tomllib.loads((HERE / "pyproject.toml").read_text())


@pytest.mark.parametrize("script", ["sacl.py", "eval_linear.py"])
def test_a_scripts_head_is_the_projects_requirements(script):
    """`uv run sacl.py` reads the head (PEP 723), `uv run pytest` reads pyproject.toml."""
    loads, whole = project()
    head = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", (HERE / script).read_text())
    head = loads(re.sub(r"(?m)^# ", "", head[1]))
    assert head["dependencies"] == whole["project"]["dependencies"]
    assert head["requires-python"] == whole["project"]["requires-python"]


def test_requirements_txt_is_what_runs_and_what_tests():
    _, whole = project()
    wanted = whole["project"]["dependencies"] + whole["dependency-groups"]["dev"]
    assert (HERE / "requirements.txt").read_text().split() == wanted
