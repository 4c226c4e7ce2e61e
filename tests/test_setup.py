"""The ways of setting up agree: requirements.txt, pyproject.toml and the heads of the scripts."""

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("script", ["sacl.py", "eval_linear.py"])
def test_a_scripts_head_is_the_projects_requirements(script):
    """`uv run sacl.py` reads the head (PEP 723), `uv run pytest` reads pyproject.toml."""
    head = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", (ROOT / script).read_text())
    head = tomllib.loads(re.sub(r"(?m)^# ", "", head[1]))
    assert head["dependencies"] == PROJECT["project"]["dependencies"]
    assert head["requires-python"] == PROJECT["project"]["requires-python"]


def test_requirements_txt_is_what_runs_and_what_tests():
    wanted = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    assert (ROOT / "requirements.txt").read_text().split() == wanted
