"""Late replies on the transport: they come in the next round or never, and sites remember what counted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from silos import Silos, in_process, state_of, visits
from slow import Slow

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from flwr.app import Message
from grid import FIRST, OneProcess, entries, federate
from test_transport import LOST, THIN, InRound, Replay, late, other_client, other_run

from thinwire import assemble
from thinwire.federation.server_app import counted
from thinwire.federation.transport import NoQuorum, Pieces
from thinwire.runtime import course

BF16 = {"dtype": "bfloat16"}


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


def slow(grid: OneProcess, transport: Pieces, late: int, until: int) -> None:
    """Client 1's work of round `late` is only done while the transport is in round `until`."""
    pull = grid.pull_messages

    def pulled(ids: Iterable[str]) -> list[Message]:
        about = {id: grid.waiting[id].metadata for id in ids if id in grid.waiting}
        held = {id for id, m in about.items() if m.dst_node_id == FIRST + 1 and m.group_id == str(late)}
        return pull([id for id in about if id not in held or transport._round == until])

    grid.pull_messages = pulled  # type: ignore[method-assign]


@pytest.mark.parametrize("method", [LOST, {"name": "onebit", "lr": 1e-2, "steps": 2, "batch_size": 4}])
def test_a_late_reply_counts_in_the_next_round_and_is_remembered(
    method: dict[str, Any], silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With clients that remember: their memory is that of one process in which the same reply comes a round later."""
    fields: dict[str, Any] = {"federation": {"late": 1, "weights": {"stale": 0.5}}, "model": BF16}
    run = silos.run(method, 4, **fields)
    job, grid, transport = federate(silos, run, tmp_path / "there", deadline=2.0, late=True)
    slow(grid, transport, 2, 3)
    course.train(job)
    record = course.read_records(tmp_path / "there" / "rounds.jsonl")
    assert [record[round]["clients"][1].get("late") for round in range(4)] == [None, None, 1, None]
    assert transport.counted == {0: 4, 1: 4, 2: 4}
    with monkeypatch.context() as patch:
        patch.setattr(course, "InProcess", lambda endpoint: Slow(endpoint, {(2, 1)}))
        silos.begin(run, tmp_path / "here")
        net = assemble.net_of(run, remember=True)
        course.train(assemble.job(run, silos.rows(run), net, tmp_path / "here", 0, course.Watch()))
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")
    asked = [(line["round"], line["direction"]) for line in entries(tmp_path / "there", "south")]
    assert asked == [(round, way) for round in (1, 2, 4) for way in ("in", "out")]


def test_a_reply_that_is_two_rounds_late_is_lost(silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = silos.run(LOST, 4, model=BF16, federation={"late": 1})
    job, grid, transport = federate(silos, run, tmp_path / "there", deadline=2.0, late=True)
    slow(grid, transport, 2, 4)
    course.train(job)
    errors = [row[1][3] for row in visits(tmp_path / "there")]
    assert errors == [None, *["late: no reply within 2 seconds"] * 2, None]
    others = {"kind": "only", "clients": [0, 2], "rounds": 2}
    absent = silos.run(LOST, 4, model=BF16, cohort=[{"kind": "all", "rounds": 1}, others, {"kind": "all"}])
    in_process(silos, absent, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")


def test_a_late_reply_that_a_server_was_waiting_for_when_it_ended_is_lost(
    silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = silos.run(LOST, 4, model=BF16, federation={"late": 1})
    job, grid, transport = federate(silos, run, tmp_path / "there", deadline=2.0, late=True)
    slow(grid, transport, 2, 3)

    class Ends(course.Watch):
        def round_begins(self, round: int, *_: Any) -> None:
            if round == 3:
                assert transport.under_way(range(3)) == (1,)
                grid.pull_messages([*grid.waiting])  # its site is done meanwhile, and remembers it
                raise KeyboardInterrupt

    job.watch = Ends()
    with pytest.raises(KeyboardInterrupt):
        course.train(job)
    transport.counted, transport._late, transport._round = counted(tmp_path / "there"), {}, -1  # as one that is new
    assert transport.counted == {0: 2, 1: 1, 2: 2}
    job.watch = course.Watch()
    course.train(job)
    others = {"kind": "only", "clients": [0, 2], "rounds": 1}
    absent = silos.run(LOST, 4, model=BF16, cohort=[{"kind": "all", "rounds": 1}, others, {"kind": "all"}])
    in_process(silos, absent, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")


def test_a_site_that_is_late_is_not_asked_to_evaluate(silos: Silos, tmp_path: Path) -> None:
    run = silos.run(THIN, 3, eval={"every": 1}, federation={"late": 1, "evaluate": True})
    job, grid, transport = federate(silos, run, tmp_path / "run", deadline=2.0, late=True)
    slow(grid, transport, 2, 3)
    course.train(job)
    rows = {
        row["round"]: row.get("errors")
        for row in course.read_records(tmp_path / "run" / "evals.jsonl")
        if row["split"] == "sites_train"
    }
    assert rows == {0: None, 1: None, 2: {"1": "busy with round 2"}, 3: None}
    assert counted(tmp_path / "run") == transport.counted == {0: 3, 1: 2, 2: 3}  # its memory is that of round 2


@pytest.mark.parametrize("tamper", [other_run, other_client, Replay()])
def test_a_late_reply_that_is_not_its_own_counts_as_absent(
    tamper: Any, silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = silos.run(THIN, 3, federation={"late": 1})
    job, grid, transport = federate(silos, run, tmp_path / "there", deadline=2.0, late=True)
    slow(grid, transport, 2, 3)
    grid.tamper = tamper if isinstance(tamper, Replay) else InRound(tamper)
    course.train(job)
    assert "Illegal" in visits(tmp_path / "there")[2][1][3]
    in_process(
        silos,
        silos.run(THIN, 3, cohort=[{"kind": "all", "rounds": 1}, {"kind": "only", "clients": [0, 2]}]),
        tmp_path / "here",
        monkeypatch,
    )
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")


def test_a_round_below_its_quorum_waits_for_no_late_reply(silos: Silos, tmp_path: Path) -> None:
    run = silos.run(THIN, rounds=3)
    job, grid, transport = federate(silos, run, tmp_path / "there", quorum=3, deadline=2.0, late=True)
    grid.tamper = InRound(late)
    with pytest.raises(NoQuorum, match=r"round 2: 2 of 3 replies came, 3 must; client 1: late"):
        course.train(job)
    assert transport.under_way(range(3)) == ()
    course.train(job)
    assert [error for row in visits(tmp_path / "there") for *_, error in row] == [None] * 9


@pytest.mark.parametrize("method", [LOST, {"name": "onebit", "lr": 1e-2, "steps": 2, "batch_size": 4}])
def test_who_is_removed_while_it_is_late_is_as_if_it_had_not_been_asked(
    method: dict[str, Any], silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply is in no round, and when it is back its memory is that of the last round that counted."""
    run = silos.run(method, 4, model=BF16, federation={"late": 1})
    job, grid, transport = federate(silos, run, tmp_path / "there", deadline=2.0, late=True)
    slow(grid, transport, 2, 3)
    job.members = lambda number: (0, 2) if number == 3 else (0, 1, 2)
    course.train(job)
    record = course.read_records(tmp_path / "there" / "rounds.jsonl")
    assert [[line["id"] for line in round["clients"]] for round in record] == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 2]]
    assert transport.counted == {0: 4, 1: 4, 2: 4}
    assert not [*transport.spool.rglob("*")]
    others = {"kind": "only", "clients": [0, 2], "rounds": 2}
    absent = silos.run(method, 4, model=BF16, cohort=[{"kind": "all", "rounds": 1}, others, {"kind": "all"}])
    in_process(silos, absent, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")
