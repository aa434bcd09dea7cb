"""What a site has answered: counted once, and nothing is answered where the record of it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thinwire.errors import Damaged
from thinwire.federation.asked import Refused
from thinwire.federation.site_run import Kept
from thinwire.federation.spent import LOST, Spent
from thinwire.wire import Illegal

DAMAGES = [
    "",
    "{",
    "[]",
    "3",
    "NaN",
    '{"7": []}',
    '{"7": {"files": [], "rounds": {"train": [1]}}}',
    '{"7": {"files": [3], "rounds": {}}}',
    '{"7": {"files": [], "rounds": {"train": ["1", 2]}}}',
    '{"7": {"files": []}}',
    "[" * 5000,
]


def test_what_is_spent_outlives_the_process(tmp_path: Path) -> None:
    spent = Spent(tmp_path)
    spent.asks("7", "a" * 64, 1)
    spent.add("7", "train", 1)
    spent.add("7", "train", 2)
    again = Spent(tmp_path)
    assert again.of("7", "train") == (2, 2)
    assert again.of("8", "train") == (0, 0)
    with pytest.raises(Illegal, match="answered already"):
        again.admit("7", "train", 2, 10)
    with pytest.raises(Refused, match="not allow more than 1 run files"):
        again.asks("8", "b" * 64, 1)


@pytest.mark.parametrize("text", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_record_is_refused_in_a_line_and_never_taken_for_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "spent.json").write_text(text)
    spent = Spent(tmp_path)
    assert spent.damaged is not None
    assert spent.damaged.startswith(f"{tmp_path / 'spent.json'}: not as it was written")
    assert "\n" not in spent.damaged
    for use in (
        lambda: spent.asks("7", "a", 10),
        lambda: spent.admit("7", "train", 1, 10),
        lambda: spent.add("7", "train", 1),
    ):
        with pytest.raises(Refused, match=LOST):
            use()
    assert (tmp_path / "spent.json").read_text() == text


@pytest.mark.parametrize(
    "held", ["", "[]", '{"newest": "1", "held": []}', '{"newest": 1, "held": [[1]]}', '{"held": []}']
)
def test_a_damaged_memory_of_versions_is_named(held: str, tmp_path: Path) -> None:
    (tmp_path / "held.json").write_text(held)
    with pytest.raises(Damaged, match=r"held.json: not as it was written"):
        Kept(tmp_path).held(0, 1)


def test_versions_are_held_by_round(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    assert (kept.newest, kept.held(0, 5)) == (0, None)
    kept.hold(1, "a")
    kept.hold(3, None)
    assert (kept.newest, kept.held(0, 2), kept.held(0, 3), kept.held(0, 4)) == (3, "a", "a", None)
    kept.rewind(2)
    assert kept.held(0, 4) == "a"
    assert json.loads((tmp_path / "held.json").read_text())["held"] == [[1, "a"]]
