"""The JSON Schema of run files agrees with what a run file may hold; and the shell completes commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from test_cli import thinwire

from thinwire import config
from thinwire.methods import METHODS

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.toml"))
GOOD: dict[str, Any] = {"data": {"path": "x"}, "method": {"name": "fedkseed"}}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    result = thinwire("schema")
    assert (result.code, result.err) == (0, "")
    schema = json.loads(result.out)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(validator: Draft202012Validator, path: Path) -> None:
    assert [error.message for error in validator.iter_errors(tomllib.loads(path.read_text()))] == []


def test_a_run_file_with_every_default_is_valid(validator: Draft202012Validator) -> None:
    for name in METHODS:
        text = config.parse(GOOD | {"method": {"name": name}}).to_toml()
        assert [error.message for error in validator.iter_errors(tomllib.loads(text))] == []


@pytest.mark.parametrize(
    ("tree", "valid"),
    [
        ({}, True),
        ({"cohort": {"kind": "uniform", "n": 2}}, True),
        ({"cohort": [{"kind": "all", "rounds": 2}, {"kind": "cyclic"}]}, True),
        ({"method": {"path": "package.module:Class", "anything": 1}}, True),
        ({"data": {"path": "x", "heldout": "test.csv"}}, True),
        ({"compare": {"seeds": [0]}}, True),
        ({"rounds": 0}, False),
        ({"data": {}}, False),
        ({"data": {"path": "x", "clientz": 2}}, False),
        ({"data": {"path": "x", "partition": "random"}}, False),
        ({"method": {}}, False),
        ({"method": {"name": "fedav"}}, False),
        ({"method": {"name": "fedavg", "seeds": 4}}, False),  # a field of another method
        ({"method": {"name": "fedavg", "lr": -1}}, False),
        ({"cohort": {"kind": "some"}}, False),
    ],
)  # fmt: skip
def test_the_schema_names_what_the_reader_says(
    validator: Draft202012Validator, tree: dict[str, Any], valid: bool
) -> None:
    tree = GOOD | tree
    assert validator.is_valid(tree) == valid
    if "path" in tree["method"]:
        return  # there is no such module
    if valid:
        config.parse({key: value for key, value in tree.items() if key != "compare"})
    else:
        with pytest.raises(config.ConfigError):
            config.parse(tree)


@pytest.mark.parametrize(("words", "found"), [("thinwire sch", ["schema"]), ("thinwire run --o", ["--out"])])
def test_the_shell_completes(words: str, found: list[str]) -> None:
    count = str(len(words.split()) - 1)
    environment = os.environ | {"_THINWIRE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    code = "from thinwire.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.split() == found
