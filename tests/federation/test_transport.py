"""The transport and the sites' workers, joined within one process: the same bytes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from silos import Silos, in_process, state_of, visits
from tiny import tiny_folder

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from flwr.app import Message
from grid import FIRST, OneProcess, entries, federate

from thinwire import wire
from thinwire.federation.envelope import pack, unpack
from thinwire.federation.local import OPEN
from thinwire.federation.questions import Refusal, join
from thinwire.federation.transport import AHEAD, NoQuorum
from thinwire.federation.worker import Worker
from thinwire.methods.fedavg import Weights
from thinwire.methods.fedkseed import Gains, Steps
from thinwire.runtime import checkpoint, course
from thinwire.runtime.payloads import Scores
from thinwire.runtime.survey import Survey, record

THIN: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 2, "batch_size": 4}
WIDE: dict[str, Any] = {"name": "fedavg", "lr": 1e-3, "steps": 2, "batch_size": 4}
Tamper = Callable[[int, Message], Message | None]


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


def absent_run(silos: Silos, folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[str, bytes]:
    """The state after the rounds of fedkseed in which client 1 is absent from round 2 on."""
    cohort = [{"kind": "all", "rounds": 1}, {"kind": "only", "clients": [0, 2]}]
    run = silos.run(THIN, cohort=cohort, **fields)
    in_process(silos, run, folder, monkeypatch)
    return state_of(folder)


def damaged(silos: Silos, folder: Path, tamper: Tamper, **options: Any) -> str:
    """Two rounds of fedkseed with replies that `tamper` changes; the error of client 1 in round 2."""
    job, grid, _ = federate(silos, silos.run(THIN), folder, **options)
    grid.tamper = tamper
    course.train(job)
    seen = visits(folder)
    assert [error for *_, error in seen[0]] == [None] * 3
    assert [error for *_, error in seen[1]][::2] == [None] * 2
    return str(seen[1][1][3])


@pytest.mark.parametrize("chunk", [1_000, 108_395, 1 << 20])
def test_pieces_of_any_size_carry_the_same_bytes(
    chunk: int, silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = silos.run(WIDE, rounds=1)
    job, grid, _ = federate(silos, run, tmp_path / "there", chunk_bytes=chunk)
    course.train(job)
    frames = in_process(silos, run, tmp_path / "here", monkeypatch)
    logged = {
        (line["round"], line["client"], line["direction"]): [(line["bytes"], line["sha256"])]
        for name in job.names
        for line in entries(tmp_path / "there", name)
    }
    assert logged == frames
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")
    assert max(grid.bodies) <= chunk
    assert not list((tmp_path / "there" / "at").glob("*/spool/*"))


def test_large_frames_pass_through_files(silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire.frame, "SPOOL_ABOVE", 50_000)
    monkeypatch.setattr("thinwire.federation.call.SPOOL_ABOVE", 50_000)
    run = silos.run(WIDE, rounds=1)
    job, grid, _ = federate(silos, run, tmp_path / "there", chunk_bytes=30_000)
    course.train(job)
    in_process(silos, run, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "there")[0] == state_of(tmp_path / "here")[0]
    assert len(grid.bodies) > 3 * 2 * 2 * AHEAD
    assert grid.most == AHEAD


def test_what_is_left_of_frames_is_removed(silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire.frame, "SPOOL_ABOVE", 50_000)
    monkeypatch.setattr("thinwire.federation.call.SPOOL_ABOVE", 50_000)
    job, grid, transport = federate(silos, silos.run(WIDE, rounds=1), tmp_path / "there", chunk_bytes=30_000)
    course.train(job)
    spool = tmp_path / "there" / "spool"
    spool.mkdir()
    down = checkpoint.on_disk(tmp_path / "there" / "state", 1, Weights)  # FedAvg's state is what it sends
    grid.tamper = lambda client, reply: None if client == 1 else reply
    transport.deadline = 1.0
    frames = (
        (client, wire.encode(down, run=job.run, round=2, client=client, spool=spool))
        for client in range(len(job.names))
    )
    replies = list(transport.exchange(frames))
    assert [reply.frame is None for reply in replies] == [False, True, False]
    assert len(list(spool.iterdir())) == 2
    for reply in replies:
        if reply.frame is not None:
            reply.frame.remove()
    assert list(spool.iterdir()) == []


class Replay:
    """Gives client 1's reply of round 1 once more in round 2."""

    def __init__(self) -> None:
        self.old: bytes | None = None

    def __call__(self, client: int, reply: Message) -> Message:
        frame, about = unpack(reply.content)
        if client == 1 and self.old is None:
            self.old = frame
        elif client == 1:
            reply.content = pack(self.old or b"", **{**about, "total": len(self.old or b"")})
        return reply


class InRound:
    """Changes client 1's reply in round 2."""

    def __init__(self, change: Callable[[Message, bytes, dict[str, Any]], Message | None]) -> None:
        self.change, self.count = change, 0

    def __call__(self, client: int, reply: Message) -> Message | None:
        self.count += client == 1
        return self.change(reply, *unpack(reply.content)) if client == 1 and self.count == 2 else reply


def other_node(reply: Message, frame: bytes, about: dict[str, Any]) -> Message:
    reply.metadata.__dict__["_src_node_id"] = FIRST
    return reply


def other_client(reply: Message, frame: bytes, about: dict[str, Any]) -> Message:
    sent = wire.Frame(frame)
    header, up = sent.header(), wire.decode(Steps, sent)
    frame = bytes(wire.encode(up, run=header.run, round=header.round, client=0))
    reply.content = pack(frame, **{**about, "total": len(frame)})
    return reply


def other_run(reply: Message, frame: bytes, about: dict[str, Any]) -> Message:
    frame = bytes(wire.encode(wire.decode(Steps, wire.Frame(frame)), run=1, round=2, client=1))
    reply.content = pack(frame, **{**about, "total": len(frame)})
    return reply


def other_frame(reply: Message, frame: bytes, about: dict[str, Any]) -> Message:
    reply.content = pack(frame, **{**about, "transfer": "0" * 16})
    return reply


def too_long(reply: Message, frame: bytes, about: dict[str, Any]) -> Message:
    reply.content = pack(frame, **{**about, "total": len(frame) - 1})
    return reply


def endless(reply: Message, frame: bytes, about: dict[str, Any]) -> Message:
    reply.content = pack(frame, **{**about, "total": 1 << 60})
    return reply


def late(reply: Message, frame: bytes, about: dict[str, Any]) -> None:
    return None


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (Replay(), "replayed"),
        (InRound(other_node), "answers for client"),
        (InRound(other_client), "a reply of run"),
        (InRound(other_run), "a reply of run"),
        (InRound(other_frame), "another frame"),
        (InRound(too_long), "does not begin"),
        (InRound(endless), "beyond the cap"),
        (InRound(late), "late"),
    ],
)
def test_a_foreign_replayed_or_late_reply_counts_as_absent(
    tamper: Tamper, reason: str, silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reason in damaged(silos, tmp_path / "there", tamper, deadline=2.0)
    assert state_of(tmp_path / "there") == absent_run(silos, tmp_path / "here", monkeypatch)


LOST = {"name": "gradualdiff", "lr": 3e-3, "steps": 2, "batch_size": 4, "rounding": "residue"}


def test_a_lost_reply_leaves_no_trace_in_the_client_s_memory(
    silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method whose clients remember: its run with a reply lost is the run in which that client was absent."""
    model = {"dtype": "bfloat16"}
    job, grid, _ = federate(silos, silos.run(LOST, 4, model=model), tmp_path / "there", deadline=2.0)
    grid.tamper = InRound(late)
    course.train(job)
    assert "late" in visits(tmp_path / "there")[1][1][3]
    others = {"kind": "only", "clients": [0, 2], "rounds": 1}
    run = silos.run(LOST, 4, model=model, cohort=[{"kind": "all", "rounds": 1}, others, {"kind": "all"}])
    in_process(silos, run, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")


def test_a_round_below_its_quorum_ends_the_run_and_it_goes_on_later(
    silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = silos.run(THIN, rounds=3)
    job, grid, _ = federate(silos, run, tmp_path / "there", quorum=3, deadline=2.0)
    grid.tamper = InRound(late)
    with pytest.raises(NoQuorum, match=r"round 2: 2 of 3 replies came, 3 must; client 1: late"):
        course.train(job)
    assert len(visits(tmp_path / "there")) == 1
    course.train(job)  # the sites are the same, and have been through round 2 before
    in_process(silos, run, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")


def test_a_site_that_is_not_connected_is_absent(silos: Silos, tmp_path: Path) -> None:
    job, _, transport = federate(silos, silos.run(THIN, rounds=1), tmp_path / "run")
    transport.nodes = lambda: {0: FIRST, 2: FIRST + 2}
    course.train(job)
    assert [error for *_, error in visits(tmp_path / "run")[0]] == [None, "not connected", None]


def test_a_worker_refuses_frames_that_are_not_for_it(silos: Silos, tmp_path: Path) -> None:
    job, grid, transport = federate(silos, silos.run(THIN), tmp_path / "run")
    down: list[wire.Frame] = []
    push = grid.push_messages

    def noted(messages: list[Message]) -> list[str]:
        down.extend(wire.Frame(unpack(message.content)[0]) for message in messages)
        return push(messages)

    grid.push_messages = noted  # type: ignore[method-assign]
    course.train(job)
    of_round = {frame.header().round: frame for frame in down if frame.header().client == 1}

    def answer(frame: wire.Frame, client: int = 1) -> str:
        (reply,) = transport.ask("train", [(client, frame)])
        return str(reply.error)

    assert "replayed" in answer(of_round[1])
    header = of_round[2].header()
    assert "given to client 0" in answer(of_round[2], client=0)
    foreign = wire.encode(wire.decode(Gains, of_round[2]), run=7, round=header.round, client=1)
    assert "a frame of run 7" in answer(foreign)
    refusals = [line for line in entries(tmp_path / "run", "south") if line["verdict"] != "passed"]
    assert [line["round"] for line in refusals] == [1, 2]
    assert all(line["direction"] == "in" for line in refusals)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ('methods = ["fedavg"]', "does not allow the method fedkseed"),
        ('kinds = ["Trained"]', "does not allow a payload of kind Steps to leave"),
        ("max_bytes = 10", "bytes to leave"),
        ("max_bytes_in = 10", "bytes to come in"),
        ('code = ["no.such:Class"]\nmethods = []', "does not allow the method fedkseed"),
    ],
)
def test_the_site_s_policy_is_kept(policy: str, reason: str, silos: Silos, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(OPEN + policy)
    job, _, _ = federate(silos, silos.run(THIN, rounds=1), tmp_path / "run", policy=file)
    with pytest.raises(NoQuorum, match=reason):
        course.train(job)


@pytest.mark.parametrize("evaluate", ["false", '"mean"'])
def test_what_a_site_withholds_is_absent_and_said_so(evaluate: str, silos: Silos, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(f"{OPEN}evaluate = {evaluate}\n")
    run = silos.run(THIN, rounds=1, federation={"evaluate": True})
    job, grid, _ = federate(silos, run, tmp_path / "run")
    for client in (0, 2):
        grid.workers[client] = Worker(replace(grid.workers[client].site, policy=str(file)))
    job.card = None
    course.train(job)
    last = [row for row in course.read_records(tmp_path / "run" / "evals.jsonl") if row["split"] == "sites_train"][-1]
    assert [each["name"] for each in last["each"]] == [job.names[1]]
    if evaluate == "false":
        assert last["sites"] == 1
        assert all("does not allow evaluation" in last["errors"][str(client)] for client in (0, 2))
    else:
        assert (last["sites"], last["withheld"]) == (3, [job.names[0], job.names[2]])
    log = [json.loads(line) for line in (tmp_path / "run" / "audit.jsonl").read_text().splitlines()]
    sent = [
        entry
        for entry in entries(tmp_path / "run", job.names[1])
        if (entry["direction"], entry["action"]) == ("out", "train")
    ]
    assert [each["sha256"] for each in log[1]["counted"] if each["id"] == 1] == [entry["sha256"] for entry in sent]


def test_a_class_from_elsewhere_is_not_even_imported(silos: Silos, tmp_path: Path) -> None:
    job, grid, _ = federate(silos, silos.run(THIN, rounds=1), tmp_path / "run")
    tree = json.loads(grid.settings)
    tree["toml"] = tree["toml"].replace('name = "fedkseed"', 'path = "antigravity:Nothing"')
    grid.settings = json.dumps(tree)
    with pytest.raises(NoQuorum, match="does not allow the class antigravity"):
        course.train(job)


@pytest.mark.parametrize("name", ["base", "tokenizer", "prompt"])
def test_a_site_with_another_model_tokenizer_or_prompt_cannot_join(name: str, silos: Silos, tmp_path: Path) -> None:
    job, _, transport = federate(silos, silos.run(THIN, rounds=1), tmp_path / "run")
    join(transport, job.run, 3, job.names, 3)
    transport.about[name] = "0" * 16
    what = {"base": "base model", "tokenizer": "tokenizer", "prompt": "prompt template"}[name]
    with pytest.raises(Refusal, match=f"north cannot take part: {what}: the server's is 0000"):
        join(transport, job.run, 3, job.names, 3)


@pytest.mark.parametrize("trouble", ["name", "policy", "rows", "model"])
def test_a_site_that_cannot_take_part_is_out_alone(trouble: str, silos: Silos, tmp_path: Path) -> None:
    """The others run to the end without it, and the reason is in one line; only a quorum that is not met ends a run."""
    job, grid, transport = federate(silos, silos.run(THIN, rounds=1), tmp_path / "run")
    site = grid.workers[1].site
    if trouble == "name":
        site, reason = replace(site, name="zurich"), "zurich is not one of the run's sites: north, south, west"
    elif trouble == "policy":
        (tmp_path / "closed.toml").write_text('methods = ["fedavg"]')
        site, reason = replace(site, policy=str(tmp_path / "closed.toml")), "does not allow the method fedkseed"
    elif trouble == "rows":
        (tmp_path / "rows.jsonl").write_text('{"text": "no column"}\n')
        site, reason = replace(site, data=str(tmp_path / "rows.jsonl")), "its rows cannot be used"
    else:
        tiny_folder(tmp_path / "other", seed=5)
        site, reason = replace(site, model=str(tmp_path / "other")), "base model: the server's is"
    grid.workers[1] = Worker(site)
    absent = join(transport, job.run, 3, job.names, 2)
    assert list(absent) == ["south"]
    assert reason in absent["south"]
    course.train(job)
    errors = [error for *_, error in visits(tmp_path / "run")[0]]
    assert errors[::2] == [None, None]
    assert reason in str(errors[1])
    with pytest.raises(NoQuorum, match=r"2 of 3 sites have joined, 3 must; south: "):
        join(transport, job.run, 3, job.names, 3)


def test_a_worker_that_begins_anew_between_two_pieces_costs_its_site_the_round_alone(
    silos: Silos, tmp_path: Path
) -> None:
    """What it had of the frame is gone, and nobody waits for a reply that cannot come until the round's deadline."""
    job, grid, _ = federate(silos, silos.run(WIDE), tmp_path / "run", chunk_bytes=30_000, deadline=600.0)
    pieces = 0

    def begun(client: int, reply: Message) -> Message:
        nonlocal pieces
        pieces += client == 1
        if client == 1 and pieces == 2:
            grid.workers[1] = Worker(grid.workers[1].site)
        return reply

    grid.tamper = begun
    course.train(job)
    first, second = visits(tmp_path / "run")
    reason = "all pieces were taken in, and no reply came: its worker has begun anew between them"
    assert [error for *_, error in first] == [None, reason, None]
    assert [error for *_, error in second] == [None] * 3


def test_a_node_that_comes_back_within_the_patience_has_joined(silos: Silos, tmp_path: Path) -> None:
    from flwr.app import Error

    job, grid, transport = federate(silos, silos.run(THIN), tmp_path / "run", patience=60.0)
    away = 2

    def unavailable(client: int, reply: Message) -> Message:
        nonlocal away
        if client == 1 and away:
            away -= 1
            return Message(Error(3, "Node Unavailable"), reply_to=reply)
        return reply

    grid.tamper = unavailable
    assert join(transport, job.run, 3, job.names, 3) == {}
    transport.patience, away = 0.0, 1
    assert "Node Unavailable" in join(transport, job.run, 3, job.names, 2)["south"]
    transport.nodes = dict
    absent = join(transport, job.run, 3, job.names, 0)  # a run that has begun asks for no quorum here
    assert absent == dict.fromkeys(("north", "south", "west"), "not connected")


def test_an_answer_to_joining_has_no_room_for_more(silos: Silos, tmp_path: Path) -> None:
    job, grid, transport = federate(silos, silos.run(THIN), tmp_path / "run")

    def large(client: int, reply: Message) -> Message:
        frame, about = unpack(reply.content)
        if client == 1:
            reply.content = pack(frame, **{**about, "total": 1 << 20})
        return reply

    grid.tamper = large
    assert "1048576 bytes, beyond the cap of 65536" in join(transport, job.run, 3, job.names, 2)["south"]


def test_a_site_s_words_are_one_short_line(silos: Silos, tmp_path: Path) -> None:
    job, grid, _ = federate(silos, silos.run(THIN, rounds=1), tmp_path / "run")
    words = "\x1b[2J\x1b]0;owned\x07" + "no\r\nround 9 of 9: all is well\u202e " + "x" * 5_000_000

    def rude(client: int, reply: Message) -> Message:
        if client == 1:
            reply.content = pack(b"", transfer="0" * 16, total=0, error=words)
        return reply

    grid.tamper = rude
    course.train(job)
    error = str(visits(tmp_path / "run")[0][1][3])
    assert error.isprintable()
    assert len(error) == 200
    assert "no round 9 of 9" in error


@pytest.mark.parametrize("gone", ["at the end", "at the start"])
def test_a_group_of_scores_may_come_and_go(gone: str, silos: Silos, tmp_path: Path) -> None:
    """A site whose rows hold none out is a group of its own; a survey has a record of each group that answered."""
    run = silos.run(THIN, eval={"every": 1})
    job, grid, transport = federate(silos, run, tmp_path / "run")
    held = silos.folder / "heldout.jsonl"
    for client in (0, 2):
        grid.workers[client] = Worker(replace(grid.workers[client].site, heldout=str(held)))
    survey = Survey(transport, run.method, job.run, tmp_path / "run" / "spool")
    away = {"at the end": (2,), "at the start": (0,)}[gone]

    def some(state: Any, server: Any, known: dict[int, str]) -> list[dict[str, Any]]:
        there = {client: FIRST + client for client in range(3) if client != 1 or server.round not in away}
        transport.nodes = lambda: there
        try:
            return survey(state, server, known)
        finally:
            transport.nodes = lambda: {client: FIRST + client for client in range(3)}

    job.survey = some
    job.card = None
    course.train(job)
    found = [(r["round"], r["split"]) for r in course.read_records(tmp_path / "run" / "evals.jsonl")]
    both = ["sites", "sites_train"]
    want = [(round, name) for round in (0, 1, 2) for name in both if name == "sites" or round not in away]
    assert [entry for entry in found if entry[1] in both] == want


@pytest.mark.parametrize("method", [THIN, WIDE, {**WIDE, "name": "gradualdiff"}], ids=lambda method: method["name"])
def test_scores_of_the_sites_are_weighted_by_their_rows(
    method: dict[str, Any], silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = silos.run(method, eval={"every": 1}, federation={"evaluate": True})
    job, _, _ = federate(silos, run, tmp_path / "there")
    course.train(job)
    in_process(silos, run, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")  # a survey leaves no trace
    assert visits(tmp_path / "there") == visits(tmp_path / "here")
    scored = [course.read_records(tmp_path / place / "evals.jsonl") for place in ("there", "here")]
    assert scored[0] == scored[1]  # in one process the clients are asked the same, in the same bytes
    # the last state scored by hand: all rows in one data set
    from thinwire import assemble
    from thinwire.evaluate.splits import Split, evaluate

    rows = [row for held in silos.rows(run).clients.values() for row in held]
    last = [r for r in course.read_records(tmp_path / "there" / "evals.jsonl") if r["split"] == "sites_train"]
    assert [r["round"] for r in last] == [0, 1, 2]
    net = assemble.net_of(
        run.model_copy(update={"model": run.model.model_copy(update={"path": str(tmp_path / "there" / "model")})})
    )
    found = evaluate(net, Split("all", assemble.dataset(run.data, rows, net.tokenizer)), run.eval.batch_size)
    assert last[-1]["loss"] == pytest.approx(found.loss, rel=1e-5)
    assert last[-1]["accuracy"] == pytest.approx(found.accuracy)
    assert (last[-1]["rows"], last[-1]["sites"]) == (len(rows), 3)
    assert last[-1]["bytes_up"] > 0


def test_a_mean_of_scores() -> None:
    mean = record("sites", [Scores(1, 4.0, 1.0, None, True), Scores(3, 2.0, 0.0, None, True)])
    assert (mean["loss"], mean["accuracy"], mean["rouge_l"], mean["rows"]) == (2.5, 0.25, None, 4)


def test_a_message_of_another_kind_is_refused() -> None:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    with pytest.raises(ValueError, match="without the records"):
        unpack(RecordDict({}))
    array = ArrayRecord({"piece": Array("uint8", (1,), "numpy.ndarray", b"x")})
    with pytest.raises(ValueError, match="of type numpy"):
        unpack(RecordDict({"about": ConfigRecord({}), "frame": array}))
    assert unpack(pack(b"abc", total=3)) == (b"abc", {"total": 3})


def test_a_grid_of_one_process_has_the_nodes(silos: Silos, tmp_path: Path) -> None:
    _, grid, _ = federate(silos, silos.run(THIN), tmp_path / "run")
    assert isinstance(grid, OneProcess)
    assert grid.get_node_ids() == [FIRST, FIRST + 1, FIRST + 2]
