"""The core's hooks that no built-in method uses yet, on small methods made for the purpose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from federation import Federation, tiny_net
from torch import Tensor

from thinwire import wire
from thinwire.core import Client, Method, Metrics, Server, StaleVersion
from thinwire.model.net import Net
from thinwire.runtime.cohort import All, Cyclic, Uniform, cohort_of
from thinwire.runtime.endpoint import serve
from thinwire.runtime.round import GROUP, SMALL, Reply, groups
from thinwire.runtime.store import version_of
from thinwire.wire import Illegal, LazyTensors


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


@dataclass(frozen=True)
class Vector:
    """Global weights of a toy: version None marks them as whole, else they add to that version."""

    weights: Mapping[str, Tensor]
    version: str | None = None
    stage: int = 0


@dataclass(frozen=True)
class Answer:
    weights: Mapping[str, Tensor]
    examples: int


class Differences(Method):
    """Sends the difference to what a client holds, the whole to a newcomer; a stage lives in the state."""

    name: Literal["differences"] = "differences"
    forgets: int = -1  # this client loses what it holds before round 3
    liar: int = -1  # this client answers with a weight beyond the bound

    Down, Up, State = Vector, Answer, Vector

    def init(self, server: Server) -> Vector:
        return Vector({"w": torch.zeros(4)})

    def broadcast(self, state: Vector, server: Server, client_id: int, held: str | None) -> Vector:
        server.versions.put(state.weights)
        old = server.versions.get(held) if held is not None else None
        if old is None:
            return Vector(state.weights)
        return Vector({"w": state.weights["w"] - old["w"]}, held)

    def client_update(self, down: Vector, client: Client) -> Answer:
        forgets = client.id == self.forgets and client.memory.get("rounds", torch.zeros(1)).item() == 2
        if forgets and down.version is not None:  # what it writes into its memory before that is not kept
            client.held = None
            client.memory["rounds"] = torch.full((1,), 9.0)
            raise StaleVersion
        if down.version is None:
            weights = down.weights["w"]
        else:
            if down.version != client.held:
                raise StaleVersion
            weights = client.memory["w"] + down.weights["w"]
        client.memory["w"] = weights
        client.memory["rounds"] = client.memory.get("rounds", torch.zeros(1)) + 1
        client.held = version_of({"w": weights})
        step = 1e9 if client.id == self.liar else float(client.id + 1)
        return Answer({"w": weights + step}, len(client.data))

    def check(self, state: Vector, client_id: int, up: Answer) -> None:
        if up.weights["w"].abs().max() > 1e6:
            raise Illegal(f"client {client_id} is out of bounds")

    def aggregate(self, state: Vector, server: Server, replies: Iterable[tuple[int, Answer]]) -> tuple[Vector, Metrics]:
        answers = [up.weights["w"] for _, up in replies]
        if not answers:
            return state, {}
        return Vector({"w": torch.stack(answers).mean(0)}, stage=state.stage + 1), {"answers": len(answers)}

    def materialise(self, state: Vector, net: Net) -> None:
        net.model.lm_head.weight.data[0, :4] = state.weights["w"]


def test_a_returning_client_gets_the_difference_and_a_newcomer_the_whole(net: Net, tmp_path: Path) -> None:
    federation = Federation(Differences(), net, tmp_path)
    sent: list[Vector] = []
    hook = Differences.broadcast

    class Spy(Differences):
        def broadcast(self, *args: Any) -> Vector:
            sent.append(hook(self, *args))
            return sent[-1]

    federation.method = Spy()
    federation.step(cohort=(0, 1))
    federation.step(cohort=(0, 1, 2))
    assert [v.version is None for v in sent] == [True, True, False, False, True]
    assert len(federation.held) == 3
    assert federation.state.weights["w"].tolist() == [3.5] * 4  # (1 + 2) / 2, then + (1 + 2 + 3) / 3


def test_a_stale_client_is_asked_once_more_and_both_frames_are_counted(net: Net, tmp_path: Path) -> None:
    federation = Federation(Differences(forgets=1), net, tmp_path / "a").run(2)
    at = federation.step()
    steady = Federation(Differences(), net, tmp_path / "b").run(2)
    other = steady.step()
    assert at.visits[1].error is None
    assert torch.equal(federation.state.weights["w"], steady.state.weights["w"])
    assert at.visits[1].bytes_down > 1.5 * other.visits[1].bytes_down
    assert at.visits[1].bytes_up > other.visits[1].bytes_up
    assert at.visits[0].bytes_down == other.visits[0].bytes_down


def test_a_client_that_stays_stale_is_dropped(net: Net, tmp_path: Path) -> None:
    class Never(Differences):
        def client_update(self, down: Vector, client: Client) -> Answer:
            if client.id == 1:
                raise StaleVersion
            return super().client_update(down, client)

    at = Federation(Never(), net, tmp_path).step()
    assert "Stale" in str(at.visits[1].error)
    assert at.visits[0].error is None


def test_a_version_that_the_server_no_longer_keeps_means_the_whole_model(net: Net, tmp_path: Path) -> None:
    federation = Federation(Differences(), net, tmp_path, rounds=9)  # the store keeps three versions
    federation.step(cohort=(0, 1))
    for _ in range(4):
        federation.step(cohort=(1,))
    held = federation.held[0]
    assert federation.versions.get(held) is None
    at = federation.step(cohort=(0,))
    assert at.visits[0].error is None
    assert federation.held[0] != held


def test_check_drops_a_client_with_its_reason(net: Net, tmp_path: Path) -> None:
    federation = Federation(Differences(liar=2), net, tmp_path)
    at = federation.step()
    assert at.visits[2].error == "Illegal: client 2 is out of bounds"
    assert federation.metrics == {"answers": 2}
    assert 2 not in federation.held  # nothing is believed of a reply that is refused


def test_a_stage_lives_in_the_state_and_survives_encoding(net: Net, tmp_path: Path) -> None:
    federation = Federation(Differences(), net, tmp_path).run(2)
    assert wire.decode(Vector, wire.encode(federation.state)).stage == 2


def test_private_memory_is_one_file_a_client_and_never_travels(net: Net, tmp_path: Path) -> None:
    Federation(Differences(), net, tmp_path).run(2)
    assert sorted(p.parent.name for p in tmp_path.glob("clients/*/000002.safetensors")) == ["0", "1", "2"]


def test_large_frames_are_spooled_decoded_lazily_and_removed(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire.frame, "SPOOL_ABOVE", 8)
    seen: list[type] = []

    class Large(Differences):
        def client_update(self, down: Vector, client: Client) -> Answer:
            seen.append(type(down.weights))
            return super().client_update(down, client)

        def check(self, state: Vector, client_id: int, up: Answer) -> None:
            seen.append(type(up.weights))

    spool = tmp_path / "spool"
    spool.mkdir()
    spooled = Federation(Large(), net, tmp_path / "a", spool=spool).run(2)
    assert set(seen) == {LazyTensors}
    assert not list(spool.iterdir())
    plain = Federation(Differences(), net, tmp_path / "b").run(2)
    assert torch.equal(spooled.state.weights["w"], plain.state.weights["w"])
    assert [at.ledger for at in spooled.history] == [at.ledger for at in plain.history]


def test_segments_of_cohorts() -> None:
    from thinwire.keys import Key

    segments = [All(rounds=2), Cyclic(rounds=4), Uniform(n=2)]
    picked = [cohort_of(segments, range(3), round, Key.root(0).fold(round)) for round in range(1, 10)]
    assert picked[:6] == [(0, 1, 2), (0, 1, 2), (0,), (1,), (2,), (0,)]
    assert all(len(cohort) == 2 for cohort in picked[6:])


def test_receive_fills_a_clients_net_and_reports_it_where_a_method_has_none(net: Net, tmp_path: Path) -> None:
    class Seen(Differences):
        def receive(self, down: Vector, client: Client) -> None:
            with torch.no_grad():
                client.net.model.lm_head.weight[0, :4] = down.weights["w"]

    federation = Federation(Seen(), net, tmp_path).run(1)
    down = federation.method.broadcast(federation.state, federation.server(2, (0,)), 0, None)
    federation.method.receive(down, federation.client(0, 2))
    assert net.model.lm_head.weight[0, :4].tolist() == [2.0] * 4
    with pytest.raises(NotImplementedError, match="Differences"):
        Differences().receive(down, federation.client(0, 2))


def test_a_client_refuses_a_frame_that_is_not_for_it(net: Net, tmp_path: Path) -> None:
    federation = Federation(Differences(), net, tmp_path)
    frame = wire.encode(federation.state, client=1, round=1)
    with pytest.raises(Illegal, match="client 1 was given to client 0"):
        serve(federation.method, frame, federation.client(0, 1))


def test_a_damaged_down_frame_costs_that_client_its_round(net: Net, tmp_path: Path) -> None:
    federation = Federation(Differences(), net, tmp_path)
    transport = federation.step().transport
    good = bytes(wire.encode(federation.state, round=2, client=0))
    (reply,) = transport.exchange([(0, wire.Frame(good[:-1] + bytes([good[-1] ^ 1])))])
    assert reply.frame is None
    assert "Corrupt" in str(reply.error)


def test_small_replies_come_by_the_dozen_and_large_ones_alone() -> None:
    small, large = wire.Frame(b"x" * SMALL), wire.Frame(b"x" * (SMALL + 1))
    frames = [small, None, large, large, *[small] * (2 * GROUP + 1), large]
    asked = 0

    def replies() -> Iterator[Reply]:
        nonlocal asked
        for asked, frame in enumerate(frames, 1):
            yield Reply(asked, frame)

    sizes, seen = [], []
    for group in groups(replies()):
        sizes.append(len(group))
        seen += [reply.client for reply in group]
        assert asked <= seen[-1] + 1  # no more than one ahead
    assert sizes == [2, 1, 1, GROUP, GROUP, 1, 1]
    assert seen == list(range(1, len(frames) + 1))


class Forged(Differences):
    """A client whose reply meets a fault of ours."""

    fault: str = ""

    def check(self, state: Vector, client_id: int, up: Answer) -> None:
        if client_id == 1:
            raise {"value": ValueError, "key": KeyError, "overflow": OverflowError, "memory": MemoryError}[self.fault](
                "line one\n\x1b[2Jline two" + 5_000 * "x"
            )


@pytest.mark.parametrize("fault", ["value", "key", "overflow", "memory"])
def test_no_reply_ends_a_run(net: Net, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    federation = Federation(Forged(fault=fault), net, tmp_path)
    at = federation.step()
    assert federation.metrics == {"answers": 2}
    error = at.visits[1].error
    assert error is not None
    assert "Error" in error
    assert len(error) <= 500
    assert error.isprintable()  # one line, and nothing that a terminal obeys
    assert "Traceback" in caplog.text
    assert "round 1, client 1" in caplog.text


def test_a_fault_of_this_machine_is_no_clients(net: Net, tmp_path: Path) -> None:
    class Full(Differences):
        def check(self, state: Vector, client_id: int, up: Answer) -> None:
            raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many"):
        Federation(Full(), net, tmp_path).step()


def test_examples_beyond_the_rows_are_refused_and_the_first_number_is_kept(net: Net, tmp_path: Path) -> None:
    counted: list[int] = []
    round = 0

    class Claims(Differences):
        claims: tuple[int, ...] = (10, 10**6, 3)

        def client_update(self, down: Vector, client: Client) -> Answer:
            answer = super().client_update(down, client)
            return Answer(answer.weights, self.claims[round]) if client.id == 0 else answer

        def aggregate(
            self, state: Vector, server: Server, replies: Iterable[tuple[int, Answer]]
        ) -> tuple[Vector, Metrics]:
            kept = [*replies]
            counted.extend(up.examples for id, up in kept if id == 0)
            return super().aggregate(state, server, kept)

    federation = Federation(Claims(), net, tmp_path)
    for round in range(3):  # noqa: B007 - what the client claims looks at it
        federation.step()
    assert counted == [10, 10, 3]
    assert [at.visits[0].examples for at in federation.history] == [10, 10, 3]
    capped = Federation(Claims(claims=(0, 0, 10**6)), net, tmp_path / "capped")
    capped.caps[0] = 12
    at = capped.step()
    assert "examples is 1000000, of 12 at most" in str(at.visits[0].error)
    assert at.visits[1].error is None


def test_a_header_larger_than_the_methods_own_is_not_read(net: Net, tmp_path: Path) -> None:
    names = {f"{i:09d}" + 90 * "x": torch.empty(0) for i in range(2_000)}

    def swap(client: int, frame: wire.Frame) -> wire.Frame:
        return wire.encode(Answer(names, 1), run=1, round=1, client=1) if client == 1 else frame

    federation = Federation(Differences(), net, tmp_path, tamper=swap)
    at = federation.step()
    assert "TooLarge: a header of" in str(at.visits[1].error)
    assert federation.metrics == {"answers": 2}
