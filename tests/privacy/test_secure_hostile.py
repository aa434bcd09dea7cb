"""Hostile ends of a secure sum: what a client will not answer, and what a client that lies can cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from federation import Federation, tiny_net

pytest.importorskip("cryptography", reason="comes with: pip install 'thinwire[secure]'")
pytest.importorskip("Crypto", reason="comes with: pip install 'thinwire[secure]'")

import torch
from secured import Quick, Secured

from thinwire import wire
from thinwire.errors import RunError
from thinwire.model.net import Net
from thinwire.privacy.masks import Pair
from thinwire.privacy.secure import Secure
from thinwire.runtime.endpoint import ACTIONS, Endpoint
from thinwire.runtime.masked import MaskedClients
from thinwire.runtime.payloads import Invite, Keys, Masked, Peers, Remaining, Shares, Task, Unmasked
from thinwire.wire import Frame, Illegal

METHOD = Quick(seeds=64, steps=6, batch_size=4, shared=True)
NOW, LATER = b"n" * 16, b"l" * 16


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


@dataclass
class Victim:
    """Client 0 of a sum of four, and a server that has it answer whatever it asks."""

    federation: Federation
    secure: Secure = field(default_factory=lambda: Secure(examples=16))

    def __post_init__(self) -> None:
        self.clients = MaskedClients(self.secure)
        self.endpoint = Endpoint(METHOD, self.federation.seats, {**ACTIONS, **self.clients.actions})
        self.pairs = {client: (Pair(bytes([client]) * 16), Pair(bytes([client + 9]) * 16)) for client in (1, 2, 3)}

    def ask(self, action: str, payload: Any, round: int = 1) -> Any:
        """The decoded answer."""
        frame = self.endpoint.answer(action, wire.encode(payload, run=1, round=round, client=0))
        kinds = {"keys": Keys, "shares": Shares, "train": Masked, "unmask": Unmasked}
        return wire.decode(kinds[action], frame)

    @property
    def peers(self) -> Peers:
        """The honest ones."""
        halves = (b"".join(pair[end].public for pair in self.pairs.values()) for end in (0, 1))
        return Peers(NOW, [0, 1, 2, 3], [1, 2, 3], *halves)

    def task(self, ids: list[int], round: int = 1, attempt: bytes = NOW) -> Task:
        """The method's broadcast, to be masked with these peers."""
        server = self.federation.server(round, (0, 1, 2, 3))
        down = METHOD.broadcast(self.federation.state, server, 0, None)
        inner = bytes(wire.encode(down, run=1, round=round, client=0))
        return Task(attempt, ids, torch.frombuffer(bytearray(inner), dtype=torch.uint8))

    def shared(self) -> Victim:
        """It has shared its secrets."""
        self.ask("keys", Invite(NOW))
        self.ask("shares", self.peers)
        return self

    def trained(self) -> Victim:
        """It has replied, under the masks of all."""
        self.shared().ask("train", self.task([1, 2, 3]))
        return self


@pytest.fixture
def victim(net: Net, tmp_path: Path) -> Victim:
    return Victim(Federation(METHOD, net, tmp_path, sizes=(4, 5, 6, 7)))


SMALL_ORDER = bytes(32)
ODD: dict[str, Callable[[Victim, Peers], Peers]] = {
    "no key": lambda v, p: replace(p, masks=p.masks[:-1]),
    "a key of small order": lambda v, p: replace(p, masks=p.masks[:64] + SMALL_ORDER),
    "a key twice": lambda v, p: replace(p, masks=p.masks[:32] * 3),
    "its own key": lambda v, p: replace(p, seals=p.seals[:64] + v.ask("keys", Invite(NOW)).seal),
    "a client twice": lambda v, p: replace(p, ids=[1, 2, 2]),
    "itself": lambda v, p: replace(p, ids=[0, 1, 2]),
    "strangers": lambda v, p: replace(p, ids=[1, 2, 4]),
    "a sum of two": lambda v, p: replace(p, clients=[0, 1], ids=[1], seals=p.seals[:32], masks=p.masks[:32]),
    "a sum of others": lambda v, p: replace(p, clients=[1, 2, 3]),
    "fewer peers than clients": lambda v, p: replace(p, ids=[1, 2], seals=p.seals[:64], masks=p.masks[:64]),
    "another attempt": lambda v, p: replace(p, attempt=LATER),
    "a client below 0": lambda v, p: replace(p, clients=[-1, 0, 1, 2], ids=[-1, 1, 2]),
}


@pytest.mark.parametrize("odd", ODD)
def test_keys_and_cohorts_that_are_not_as_agreed_get_no_shares(odd: str, victim: Victim) -> None:
    victim.ask("keys", Invite(NOW))
    with pytest.raises(Illegal) as caught:
        victim.ask("shares", ODD[odd](victim, victim.peers))
    assert "\n" not in str(caught.value)
    assert len(victim.ask("shares", victim.peers).sealed) == 3 * 48


def test_a_reply_is_masked_once_and_with_enough_others(victim: Victim) -> None:
    victim.shared()
    for few in ([], [1], [1, 1, 2], [1, 2, 5]):
        with pytest.raises(Illegal):
            victim.ask("train", victim.task(few))
    masked = victim.ask("train", victim.task([1, 2, 3]))
    for ids in ([1, 2], [1, 2, 3]):
        with pytest.raises(Illegal, match="the reply of round 1 is masked already"):
            victim.ask("train", victim.task(ids))
    assert masked.numbers.numel()


def test_a_plain_frame_of_the_method_gets_no_reply(victim: Victim) -> None:
    victim.shared()
    plain = Frame(bytes(wire.raw(victim.task([1, 2, 3]).down)))
    with pytest.raises(wire.WireError, match="Gains"):
        victim.endpoint.answer("train", plain)


def test_never_both_shares_of_a_client(victim: Victim) -> None:
    """The first question decides of whom it reveals which; it may come again, and no other one may."""
    victim.trained()
    first = Remaining(NOW, [0, 1, 2], [1, 2, 3], bytes(3 * 48))
    answer = victim.ask("unmask", first)
    assert answer == victim.ask("unmask", first)
    for other in ([0, 1, 2, 3], [0, 1, 3]):
        with pytest.raises(Illegal, match="another question of this sum has been answered"):
            victim.ask("unmask", Remaining(NOW, other, [1, 2, 3], bytes(3 * 48)))


def test_what_does_not_open_is_not_revealed_and_what_opens_is_one_of_the_two(victim: Victim) -> None:
    from thinwire.privacy.masks import sealed
    from thinwire.runtime.sums import place_of

    keys = victim.ask("keys", Invite(NOW))
    victim.trained()
    place = place_of(1, 1, NOW, [0, 1, 2, 3])
    good = {
        c: sealed(victim.pairs[c][0], keys.seal, place, c, 0, bytes([c]) * 16 + bytes([c + 50]) * 16) for c in (1, 3)
    }
    answer = victim.ask("unmask", Remaining(NOW, [0, 1, 2], [1, 2, 3], good[1] + bytes(48) + good[3]))
    assert answer.ids == [0, 1, 3]
    assert answer.shares[16:] == bytes([51]) * 16 + bytes([3]) * 16  # 1 has replied: its own mask's; 3 has not


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (Remaining(NOW, [0, 1], [1, 2, 3], bytes(144)), "a sum of 2 clients is too small"),
        (Remaining(NOW, [1, 2, 3], [1, 2, 3], bytes(144)), "not this one among them"),
        (Remaining(NOW, [0, 1, 2, 7], [1, 2, 3], bytes(144)), "not the clients of this sum"),
        (Remaining(NOW, [0, 2, 1], [1, 2, 3], bytes(144)), "not the clients of this sum"),
        (Remaining(NOW, [0, 1, 2], [1, 1, 3], bytes(144)), "a client is there twice"),
        (Remaining(NOW, [0, 1, 2], [1, 2, 5], bytes(144)), "a client whose masks are not in this one's reply"),
        (Remaining(NOW, [0, 1, 2], [1, 2, 3], bytes(143)), "143 bytes, not 3 times 48"),
        (Remaining(LATER, [0, 1, 2], [1, 2, 3], bytes(144)), "the keys of this sum are not here"),
    ],
)
def test_a_sum_that_is_too_small_or_another_one_is_not_unmasked(victim: Victim, asked: Remaining, line: str) -> None:
    victim.trained()
    with pytest.raises(Illegal, match=line):
        victim.ask("unmask", asked)


def test_nothing_is_unmasked_before_a_reply_and_no_keys_come_of_an_earlier_round(victim: Victim) -> None:
    victim.shared()
    with pytest.raises(Illegal, match="no reply is masked yet"):
        victim.ask("unmask", Remaining(NOW, [0, 1, 2], [1, 2, 3], bytes(144)))
    victim.ask("keys", Invite(LATER), round=2)
    with pytest.raises(Illegal, match="keys for round 1 after those for round 2"):
        victim.ask("keys", Invite(NOW))


def changed(who: int, kind: type, change: Callable[[Any], Any]) -> Any:
    """A tamper that has one client send something else."""

    def tamper(client: int, frame: Frame) -> Frame:
        header = frame.header()
        if client != who or header.kind != kind.__name__:
            return frame
        sent = change(wire.decode(kind, frame))
        return wire.encode(sent, run=header.run, round=header.round, client=client, held=header.held)

    return tamper


LIES: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "a key of small order": (Keys, lambda up: replace(up, mask=bytes(32))),
    "a short key": (Keys, lambda up: replace(up, seal=b"short")),
    "no commitment": (Keys, lambda up: replace(up, own=b"")),
    "one key for both": (Keys, lambda up: replace(up, mask=up.seal)),
    "too few shares": (Shares, lambda up: Shares(up.sealed[:-1])),
    "shares for nobody": (Shares, lambda up: Shares(up.sealed + bytes(48))),
    "too few numbers": (Masked, lambda up: Masked(up.numbers[:-1])),
    "numbers of another form": (Masked, lambda up: Masked(up.numbers.to(torch.int64))),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_client_that_lies_is_out_of_the_round_and_nobody_else(lie: str, net: Net, tmp_path: Path) -> None:
    both = Secured(METHOD, net, tmp_path)
    both.masked.tamper = changed(2, *LIES[lie])
    at = both.masked.step()
    assert [client for client, visit in at.visits.items() if visit.error] == [2]
    trained = range(4) if LIES[lie][0] is Masked else [0, 1, 3]
    assert bytes(wire.encode(both.masked.state)) == bytes(wire.encode(both.plain_round([0, 1, 3], trained)))


@pytest.mark.parametrize(
    "lie",
    [
        lambda up: Unmasked(up.ids, bytes(len(up.shares))),  # wrong shares of everybody
        lambda up: Unmasked([*up.ids[:-1], 9], up.shares),
        lambda up: Unmasked(up.ids, up.shares[:-1]),
        lambda up: Unmasked(up.ids[:1] * len(up.ids), up.shares),
        lambda up: Unmasked([], b""),
    ],
)
def test_wrong_shares_of_one_holder_are_passed_over(lie: Any, net: Net, tmp_path: Path) -> None:
    both = Secured(METHOD, net, tmp_path)
    both.masked.tamper = changed(2, Unmasked, lie)
    both.masked.step()
    assert bytes(wire.encode(both.masked.state)) == bytes(wire.encode(both.plain_round(range(4))))


def test_a_client_whose_shares_are_of_nothing_is_named(net: Net, tmp_path: Path) -> None:
    """It ends the round: its masks are in the sum, and nobody can take them off."""
    both = Secured(METHOD, net, tmp_path)
    both.masked.tamper = changed(1, Shares, lambda up: Shares(bytes(len(up.sealed))))
    with pytest.raises(RunError, match=r"1 shares of client 1's secret came, 3 must") as caught:
        both.masked.step()
    assert "\n" not in str(caught.value)
