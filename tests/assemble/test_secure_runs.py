"""Runs whose replies cannot be added up under masks: refused in a line before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("cryptography", reason="comes with: pip install 'thinwire[secure]'")
pytest.importorskip("Crypto", reason="comes with: pip install 'thinwire[secure]'")

from thinwire import config
from thinwire.assemble.secure import check_secure
from thinwire.config import ConfigError

NAMES = ["north", "south", "west", "east"]
SCALARS = {"name": "fedkseed", "shared": True, "weighting": "uniform"}
RECORD = {"level": "record", "epsilon": 4.0, "secure": {}}


def checked(tree: dict[str, Any]) -> None:
    """Check a run file with these tables."""
    check_secure(config.parse({"data": {"path": "absent.jsonl"}, "method": SCALARS, **tree}), NAMES)


@pytest.mark.parametrize(
    "tree",
    [
        {"privacy": {"secure": {}}},
        {"privacy": RECORD},
        {},
        {"privacy": {"secure": {"minimum": 4}}},
        {"privacy": {**RECORD, "level": "client"}},
    ],
)
def test_what_can_be_had_is_let_through(tree: dict[str, Any]) -> None:
    checked(tree)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"privacy": {}}, r"^the run file: privacy\.level: missing"),
        ({"privacy": {"level": "record", "secure": {}}}, r"^the run file: privacy\.epsilon: missing"),
        ({"privacy": {"secure": {"minimum": 5}}}, r"^privacy\.secure\.minimum: a round of 4 clients is smaller than 5"),
        ({"privacy": {"secure": {"minimum": 2}}}, r"^the run file: privacy\.secure\.minimum: must be"),
        ({"privacy": {"secure": {"threshold": 0.5}}}, r"^the run file: privacy\.secure\.threshold: must be"),
        (
            {"privacy": {"secure": {}}, "cohort": [{"kind": "uniform", "n": 2}]},
            r"^privacy\.secure\.minimum: a round of 2",
        ),
        ({"privacy": {"secure": {}}, "federation": {"keep_replies": True}}, r"^federation\.keep_replies, cross: under"),
        ({"privacy": {"secure": {}}, "federation": {"late": 1}}, r"^federation\.late: under"),
        ({"privacy": {"secure": {}}, "federation": {"weights": {"fair": 0.5}}}, r"^federation\.weights: under"),
        ({"privacy": {"secure": {}}, "federation": {"weights": {"by": "examples"}}}, r"^federation\.weights: under"),
        ({"privacy": {"secure": {}}, "method": {"name": "fedavg"}}, r"^privacy\.secure\.examples: missing"),
        ({"privacy": {"secure": {}}, "method": {"name": "flora"}}, r"^privacy\.secure: FLora makes more of"),
        (
            {"privacy": {**RECORD, "level": "client"}, "method": {"name": "onebit", "weighting": "uniform"}},
            r"^privacy\.level: what onebit adds up under masks has a length of its own",
        ),
        (
            {"privacy": RECORD | {"secure": {"examples": 9}}, "method": {**SCALARS, "weighting": "examples"}},
            r"^method\.weighting: must be",
        ),
    ],
)
def test_what_cannot_is_refused_in_a_line(tree: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        checked(tree)
    assert "\n" not in str(caught.value)
