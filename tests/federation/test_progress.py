"""What a server's operator reads of a run, whatever its files hold; and the files that its processes share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thinwire.errors import Damaged
from thinwire.federation.progress import Notices, Progress, notices_of
from thinwire.federation.server_app import Hub, Status, counted
from thinwire.runtime.outcome import first_examples

VISIT = {"id": 0, "name": "north", "bytes_up": 20, "examples": 4}
ROUND = {"round": 1, "clients": [VISIT], "bytes_down": 10, "bytes_up": 20, "seconds": 1.5}
SCORES = {"round": 1, "split": "heldout", "loss": 2.0}
WHOLE = "round 2 of 3: 10 bytes down, 20 up, 1.5 s"


def shown(folder: Path, **files: str) -> list[str]:
    """The lines that a look at a run's folder with these files reports."""
    for name, text in files.items():
        (folder / f"{name}.jsonl").write_text(text)
    found: list[str] = []
    Progress(folder, 3, found.append).tick()
    return found


def test_what_the_server_s_loop_notes_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "federation").mkdir()
    Notices(notices_of(tmp_path)).add("of an earlier run")
    found: list[str] = []
    progress, notes = Progress(tmp_path, 3, found.append), Notices(notices_of(tmp_path))
    for line in ("south has not joined: \x1b[2Jno\nrows", "south has not joined: \x1b[2Jno\nrows", "x" * 9000):
        notes.add(line)
        progress.tick()
    assert found == ["south has not joined: [2Jno rows", "x" * 497 + "..."]


def test_each_round_and_evaluation_is_a_line_once_it_is_whole(tmp_path: Path) -> None:
    found: list[str] = []
    progress = Progress(tmp_path, 3, found.append)
    lost = {"id": 1, "name": "south", "bytes_up": 0, "error": "no reply"}
    text = json.dumps(ROUND | {"clients": [VISIT, lost]})
    for part in (text[:30], text, text + "\n", text + "\n"):
        (tmp_path / "rounds.jsonl").write_text(part)
        progress.tick()
    assert found == ["round 1 of 3: 10 bytes down, 20 up, 1.5 s; absent: south (no reply)"]
    (tmp_path / "evals.jsonl").write_text(json.dumps(SCORES | {"accuracy": 0.5}) + "\n")
    progress.tick()
    assert found[1:] == ["after round 1: heldout loss 2.0000, accuracy 0.500"]


def test_a_loss_that_is_not_finite_is_reported_as_such(tmp_path: Path) -> None:
    assert shown(tmp_path, evals=json.dumps(SCORES | {"loss": None}) + "\n") == [
        "after round 1: heldout loss not finite"
    ]


BAD: list[tuple[str, str]] = [
    *((json.dumps(ROUND | {name: value}), "not as it was written") for name, value in (
        ("clients", None), ("clients", 5), ("clients", [5]), ("clients", [{"error": "x"}]), ("bytes_down", "many"),
        ("bytes_up", None), ("bytes_up", []), ("seconds", None), ("seconds", "\x1b[2J"), ("seconds", 10**400),
    )),
    *((json.dumps({k: v for k, v in ROUND.items() if k != name}), "not as it was written")
      for name in ("clients", "bytes_down", "bytes_up", "seconds")),
    ("[1, 2]", "not a record of a round"),
    ("null", "not a record of a round"),
    ('{"round": "1"}', "not a record of a round"),
    ('{"round": NaN}', "not a record of a round"),
    (json.dumps(ROUND)[:40], "not JSON"),
    ("\x1b[2J\x00", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"round": ' + "9" * 5000 + "}", "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "why"), BAD, ids=range(len(BAD)))
def test_a_round_that_is_not_as_it_was_written_costs_one_line(bad: str, why: str, tmp_path: Path) -> None:
    found = shown(tmp_path, rounds=f"{bad}\n{json.dumps(ROUND | {'round': 2})}\n")
    assert len(found) == 2
    assert found[0].startswith(f"{tmp_path / 'rounds.jsonl'}: record 1 is ")
    assert found[0].endswith(why)
    assert all(line.isprintable() for line in found)
    assert found[1] == WHOLE


@pytest.mark.parametrize(
    "bad",
    [{}, {"split": "heldout"}, {"split": "heldout", "loss": "low"}, {"loss": 1.0}, SCORES | {"accuracy": [1]}],
)
def test_an_evaluation_that_is_not_as_it_was_written_costs_one_line(bad: dict[str, Any], tmp_path: Path) -> None:
    found = shown(tmp_path, evals=json.dumps({"round": 1, **bad}) + "\n")
    assert found == [f"{tmp_path / 'evals.jsonl'}: record 1 is not as it was written"]


def test_what_steers_a_terminal_is_not_printed(tmp_path: Path) -> None:
    clients = [{"id": 0, "name": "north", "error": "\x1b[2J\n" + "x" * 9000}]
    (line,) = shown(tmp_path, rounds=json.dumps(ROUND | {"clients": clients}) + "\n")
    assert line.isprintable()
    assert len(line) <= 4000


@pytest.mark.parametrize("clients", [None, 5, "north", {}, [5, None, {}], [{"id": "0", "bytes_up": 1, "examples": 2}]])
def test_a_run_goes_on_from_rounds_whose_visits_are_none(clients: Any, tmp_path: Path) -> None:
    good = ROUND | {"round": 2, "clients": [VISIT, {"id": 1, "examples": "many", "bytes_up": 5}]}
    records = [ROUND | {"clients": clients}, good]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "state" / "round-000002").mkdir(parents=True)
    assert counted(tmp_path) == {0: 2, 1: 2}
    assert first_examples(records) == {0: 4}


HOSTILE = [
    "", "{", "null", "[]", "{}", '{"pid": 1}', '{"pid": "1", "state": "done"}', '{"pid": NaN, "state": "done"}',
    '{"pid": 1, "state": 2}', '{"pid": 1, "state": "done", "error": []}', "[" * 100_000, "\xff",
    '{"keys": 1, "session": "0", "sites": [], "splits": {}}',
    '{"keys": "", "session": "0", "sites": [1], "splits": {}}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize(("name", "read"), [("hub", Hub.load), ("status", Status.read)])
def test_a_file_that_was_not_written_here_is_refused_in_one_line(
    text: str, name: str, read: Any, tmp_path: Path
) -> None:
    (tmp_path / "federation").mkdir()
    file = tmp_path / "federation" / f"{name}.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(Damaged) as wrong:
        read(tmp_path)
    assert str(wrong.value).startswith(f"{file}: not as it was written: ")
    assert "\n" not in str(wrong.value)


def test_what_the_processes_share_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "federation").mkdir()
    assert Status.read(tmp_path) is None
    for status in (Status(7, "running"), Status(2**22, "stopped", "why")):
        status.write(tmp_path)
        assert Status.read(tmp_path) == status
    hub = Hub("/keys", "0" * 16, ("north", "south"), {"heldout": "/rows"})
    hub.write(tmp_path)
    assert Hub.load(tmp_path) == hub


def test_a_run_that_goes_on_is_reported_from_there(tmp_path: Path) -> None:
    found: list[str] = []
    lines = [json.dumps(ROUND | {"round": round}) + "\n" for round in (1, 2, 3)]
    (tmp_path / "rounds.jsonl").write_text("".join(lines[:2]))
    progress = Progress(tmp_path, 3, found.append)
    progress.skip()
    progress.tick()
    assert found == []
    (tmp_path / "rounds.jsonl").write_text(lines[0])  # beyond the checkpoint: dropped, and done again
    progress.tick()
    for count in (2, 3):
        (tmp_path / "rounds.jsonl").write_text("".join(lines[:count]))
        progress.tick()
    assert [line.partition(":")[0] for line in found] == ["round 2 of 3", "round 3 of 3"]


def test_records_can_be_passed_on_as_they_are(tmp_path: Path) -> None:
    found: list[tuple[str, Any]] = []
    for name, record in (("rounds.jsonl", ROUND), ("evals.jsonl", SCORES)):
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    Progress(tmp_path, 3, pytest.fail, lambda *record: found.append(record)).tick()
    assert found == [("evals.jsonl", SCORES), ("rounds.jsonl", ROUND)]
