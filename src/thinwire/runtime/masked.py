"""A client's part in secure sums: four questions a round, and what it will not answer. See privacy.secure.

keys     the public halves of two fresh pairs
shares   its peers' halves come; its two secrets go, shared and sealed
train    the method's frame comes; the reply goes as whole numbers under masks
unmask   who has replied comes; one share of each peer goes

Its secrets are in this process alone. A question that comes again gets the answer that it got, another one in its place
none: who could ask twice could take masks off one by one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire import wire
from thinwire.core import Client, Method
from thinwire.privacy.masks import (
    KEY,
    SEALED,
    SEED,
    Pair,
    Random,
    check_public,
    least_of,
    numbered,
    opened,
    pair_mask,
    sealed,
    self_mask,
    split,
    system,
)
from thinwire.privacy.secure import Secure
from thinwire.privacy.shares import noised
from thinwire.runtime.endpoint import Action, visit
from thinwire.runtime.payloads import Invite, Keys, Masked, Peers, Remaining, Shares, Task, Unmasked
from thinwire.runtime.sums import (
    CUT,
    EXAMPLES,
    LOSS,
    MEASURED,
    SKIPPED,
    Plan,
    commitment,
    noise_in_shares,
    place_of,
)
from thinwire.runtime.vouch import SIGNATURE, Vouch, vouched
from thinwire.wire import Frame, Illegal, Stale

Promise = Callable[[int, int, str], None]  # client, round, of what sum: raises where it was another one in that round


class Remembered:
    """The promise of clients in this process: a round's sum, once unmasked, is that one for good."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[int, str]] = {}

    def __call__(self, client: int, round: int, sum: str) -> None:
        """Illegal for another sum of the round, or of an earlier one."""
        last, known = self.kept.get(client, (round, sum))
        if round < last or (round == last and sum != known):
            raise Illegal(f"a sum of round {last} is unmasked already")
        self.kept[client] = (round, sum)


@dataclass
class _Part:
    """What one client holds for one attempt at a sum. `own` and `pair.seed` are the secrets that are shared."""

    round: int
    attempt: bytes
    seals: Pair
    pair: Pair
    own: bytes = field(repr=False)
    clients: list[int] = field(default_factory=list)
    peers: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # client -> its public halves: seal, mask
    place: bytes = b""
    kept: bytes = b""  # its own share of its own secret
    least: int = 0
    masked: list[int] | None = None  # the peers that its reply was masked with
    down: bytes = b""  # the hash of what it trained on
    answers: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # action -> the question's hash, the answer


class MaskedClients:
    """The clients of a run at one place, as the actions of secure sums.

    `promise`: see Promise; `vouch`: signs a client's keys, and checks its peers'; `random`: for tests alone.
    """

    def __init__(
        self, secure: Secure, promise: Promise | None = None, vouch: Vouch | None = None, random: Random = system
    ) -> None:
        self.secure, self.promise, self.vouch, self.random = secure, promise or Remembered(), vouch, random
        self._parts: dict[int, _Part] = {}

    @property
    def actions(self) -> Mapping[str, Action]:
        """What Endpoint takes beside joining: `train` answers in masks alone."""
        return {"keys": self.keys, "shares": self.shares, "train": self.train, "unmask": self.unmask}

    def keys(self, method: Method, frame: Frame, client: Client, spool: Path | None = None) -> Frame:
        """Begin an attempt at a sum, with fresh secrets; what an earlier one has left is forgotten."""
        round, invite = frame.header().round, wire.decode(Invite, frame)
        if len(invite.attempt) != SEED:
            raise Illegal("an attempt has 16 bytes")
        known = self._parts.get(client.id)
        if known is None or known.attempt != invite.attempt:
            if known is not None and round < known.round:
                raise Illegal(f"keys for round {round} after those for round {known.round}")
            secrets = (self.random(SEED) for _ in range(3))
            self._parts[client.id] = _Part(
                round, invite.attempt, Pair(next(secrets)), Pair(next(secrets)), next(secrets)
            )

        def answer(part: _Part) -> Keys:
            halves = part.seals.public, part.pair.public
            text = vouched(frame.header().run, round, part.attempt, client.id, *halves)
            return Keys(*halves, commitment(part.own), None if self.vouch is None else self.vouch.sign(text))

        return self._once("keys", frame, client, invite.attempt, answer)

    def shares(self, method: Method, frame: Frame, client: Client, spool: Path | None = None) -> Frame:
        """Take the peers' public halves, and share the secrets among them."""
        peers = wire.decode(Peers, frame)

        def answer(part: _Part) -> Shares:
            ids, holders = peers.ids, sorted({*peers.ids, client.id})
            self._check_peers(peers, client.id)
            seals, masks = _cut(peers.seals, KEY, len(ids)), _cut(peers.masks, KEY, len(ids))
            try:
                check_public(*seals, *masks, part.seals.public, part.pair.public)
            except ValueError as error:
                raise Illegal(f"keys of peers: {error}") from None
            if self.vouch is not None:
                signatures = _cut(peers.signatures or bytes(SIGNATURE * len(ids)), SIGNATURE, len(ids))
                for peer, *halves, signature in zip(ids, seals, masks, signatures, strict=True):
                    text = vouched(frame.header().run, part.round, part.attempt, peer, *halves)
                    self.vouch.check(peer, text, signature)
            part.clients, part.peers = peers.clients, dict(zip(ids, zip(seals, masks, strict=True), strict=True))
            part.place = place_of(frame.header().run, part.round, part.attempt, peers.clients)
            part.least = least_of(len(holders), self.secure.threshold)
            both = [split(secret, len(holders), part.least) for secret in (part.pair.seed, part.own)]
            shares = dict(zip(holders, map(b"".join, zip(*both, strict=True)), strict=True))
            part.kept = shares[client.id][SEED:]
            return Shares(
                b"".join(
                    sealed(part.seals, seal, part.place, client.id, peer, shares[peer])
                    for peer, (seal, _) in part.peers.items()
                )
            )

        return self._once("shares", frame, client, peers.attempt, answer)

    def train(self, method: Method, frame: Frame, client: Client, spool: Path | None = None) -> Frame:
        """The method's visit; its reply as whole numbers under the client's own mask and those with its peers."""
        header, task = frame.header(), wire.decode(Task, frame)
        part = self._part(client.id, header.round, task.attempt)
        if part.masked is not None:
            raise Illegal(f"the reply of round {part.round} is masked already")
        if not part.peers or len({*task.ids}) < len(task.ids) or not {*task.ids} <= {*part.peers}:
            raise Illegal("peers that the client has no keys of, or one twice")
        if len(task.ids) + 1 < max(part.least, min(self.secure.minimum, len(part.peers) + 1)):
            raise Illegal(f"{len(task.ids)} peers are too few to mask a reply with")
        inner = Frame(bytes(wire.raw(task.down)))
        if inner.header()[1:4] != header[1:4]:
            raise Illegal("a frame within is of another run, round or client")
        down, up = visit(method, inner, client)
        about: dict[str, Any] = {"run": header.run, "round": header.round, "client": client.id, "held": client.held}
        if isinstance(up, Stale):
            return wire.encode(up, **about)
        protection = noise_in_shares(client.protection)
        plan = Plan.of(method, client.net, self.secure, len(part.clients), protection)
        sums, parts = plan.sums, plan.linear.parts(down, up, client)
        if protection is not None:
            numbers = noised(parts, protection, self.secure.minimum, client.secrets)
        else:
            numbers = self._numbers(plan, parts, up)
        words = sums.words(numbers)
        sums.mask(words, self_mask(part.own, part.place, client.id), 1)
        for peer in task.ids:
            sums.mask(
                words,
                pair_mask(part.pair, part.peers[peer][1], part.place, client.id, peer),
                1 if client.id < peer else -1,
            )
        part.masked, part.down = sorted(task.ids), hashlib.sha256(bytes(inner)).digest()
        return wire.encode(
            Masked(torch.frombuffer(bytearray(sums.pack(words)), dtype=torch.uint8)), **about, spool=spool
        )

    def unmask(self, method: Method, frame: Frame, client: Client, spool: Path | None = None) -> Frame:
        """Reveal one share of each peer, for the sum of these clients; refused for a sum that is too small."""
        asked = wire.decode(Remaining, frame)

        def answer(part: _Part) -> Unmasked:
            self._check_remaining(asked, part, client.id)
            there = {*asked.clients}
            about = part.down + numbered(frame.header().run, *asked.clients)
            self.promise(client.id, part.round, hashlib.sha256(about).hexdigest())
            found = {client.id: part.kept}
            for peer, data in zip(asked.ids, _cut(asked.sealed, SEALED, len(asked.ids)), strict=True):
                shares = opened(part.seals, part.peers[peer][0], part.place, peer, client.id, data)
                if shares is not None:
                    found[peer] = shares[SEED:] if peer in there else shares[:SEED]
            return Unmasked(list(found), b"".join(found.values()))

        return self._once("unmask", frame, client, asked.attempt, answer)

    def _numbers(self, plan: Plan, parts: Mapping[str, Tensor], up: Any) -> dict[str, NDArray[np.int64]]:
        """The whole numbers of a reply, times its weight, with what it reports beside."""
        terms, share, cut, found = plan.sums.terms, 1.0, 0, dict[str, NDArray[np.int64]]()
        if plan.weighted:
            count = min(up.examples, plan.most)
            share, found[EXAMPLES], cut = count / plan.most, np.array([count]), int(up.examples > count)
        for name, part in parts.items():
            term = terms[name]
            try:
                found[name], over = term.whole(part if share == 1 else part.double() * share)
            except ValueError as error:
                raise Illegal(f"{name}: {error}") from None
            cut += over
        if self.secure.reports:
            loss = getattr(up, "loss", None)
            loss = math.nan if loss is None else loss
            known = math.isfinite(loss)
            reports = {LOSS: loss * share if known else 0.0, MEASURED: share if known else 0.0}
            reports |= {SKIPPED: getattr(up, "skipped", None) or 0, CUT: cut}
            for name, value in reports.items():
                found[name], _ = terms[name].whole(torch.tensor(float(value), dtype=torch.float64))
        return found

    def _check_peers(self, peers: Peers, client: int) -> None:
        clients, ids, wanted = peers.clients, {*peers.ids}, self.secure.neighbours
        if (
            clients != sorted({*clients})
            or client not in clients
            or len(clients) < self.secure.minimum
            or clients[0] < 0
        ):
            raise Illegal(f"a sum of {len(clients)} clients: not {self.secure.minimum}, or not this one among them")
        most = len(clients) - 1
        count = most if wanted is None else min(wanted + wanted % 2, most)
        if len(ids) < len(peers.ids) or client in ids or not ids <= {*clients} or len(ids) != count:
            raise Illegal(f"{len(peers.ids)} peers, not {count} others of the sum's clients")

    def _check_remaining(self, asked: Remaining, part: _Part, client: int) -> None:
        clients, near = {*asked.clients}, {*part.peers, client}
        if part.masked is None:
            raise Illegal("no reply is masked yet")
        if asked.clients != sorted(clients) or not clients <= {*part.clients} or client not in clients:
            raise Illegal("not the clients of this sum, or not this one among them")
        if (few := len(clients)) < self.secure.minimum or (few := len(clients & near)) < part.least:
            raise Illegal(f"a sum of {few} clients is too small to be unmasked")
        if not clients & near <= {*part.masked, client} or {*asked.ids} - {*part.masked}:
            raise Illegal("a client whose masks are not in this one's reply")
        if len({*asked.ids}) < len(asked.ids):
            raise Illegal("a client is there twice")

    def _part(self, client: int, round: int, attempt: bytes) -> _Part:
        part = self._parts.get(client)
        if part is None or (part.round, part.attempt) != (round, attempt):
            raise Illegal("the keys of this sum are not here: this process began later, or the sum is another one")
        return part

    def _once(self, action: str, frame: Frame, client: Client, attempt: bytes, answer: Callable[[_Part], Any]) -> Frame:
        """The answer to a question; the same again where the question comes again, and none to another."""
        header = frame.header()
        part = self._part(client.id, header.round, attempt)
        question = hashlib.sha256(bytes(frame)).digest()
        if action in part.answers:
            if part.answers[action][0] != question:
                raise Illegal(f"{action}: another question of this sum has been answered")
        else:
            reply = wire.encode(answer(part), run=header.run, round=header.round, client=client.id)
            part.answers[action] = question, bytes(reply)
        return Frame(part.answers[action][1])


def _cut(data: bytes, size: int, count: int) -> list[bytes]:
    if len(data) != size * count:
        raise Illegal(f"{len(data)} bytes, not {count} times {size}")
    return [data[at : at + size] for at in range(0, len(data), size)]
