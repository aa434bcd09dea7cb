"""What the project has of itself in several files is one thing; what its workflows call is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from thinwire import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.search(r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released
    assert PROJECT["dynamic"] == ["version"]  # the package has it
    assert {str(citation["version"]), released[1]} == {__version__}
    assert str(citation["date-released"]) == released[2]


def test_types_are_there_for_others() -> None:
    assert (ROOT / "src/thinwire/py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def steps() -> list[str]:
    """The commands of the workflows and of the hooks before a commit."""
    jobs: list[Any] = []
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        jobs += yaml.safe_load(file.read_text())["jobs"].values()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step] + [hook["entry"] for hook in hooks]


@pytest.mark.parametrize("step", steps())
def test_what_a_workflow_names_is_there(step: str) -> None:
    for path in re.findall(r"(?<!\S)((?:tests|\.ci)/[\w/.]+)", step):
        assert (ROOT / path).exists()
    if step.startswith("make "):
        assert re.search(rf"^{step.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_workflow_runs_what_must_pass() -> None:
    assert ".ci/run" in steps()
