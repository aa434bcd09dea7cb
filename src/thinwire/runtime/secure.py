"""A round of the server of which it learns the sum alone: four questions, and one virtual reply. See privacy.secure.

keys     everybody's public halves come
shares   they go round; what each seals for its peers comes
train    the broadcast goes, with who has shared; replies come under masks, and are added up
unmask   who has replied goes, with what was sealed; shares come, and take the masks off the sum

A client that fails at any step is out of the round; as long as `threshold` of the holders of each secret remain, the
sum of those whose masked replies came is what a plain round of them would have added up, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

import torch

from thinwire import wire
from thinwire.aggregate.mean import Counted, Metrics
from thinwire.aggregate.weights import Share
from thinwire.core import Averaged, Method
from thinwire.errors import RunError
from thinwire.privacy.masks import (
    SEALED,
    SEED,
    Pair,
    Random,
    check_public,
    least_of,
    neighbours,
    pair_mask,
    recovered,
    self_mask,
    system,
)
from thinwire.privacy.secure import Secure
from thinwire.privacy.terms import Sums, Words
from thinwire.runtime.payloads import Invite, Keys, Masked, Peers, Remaining, Shares, Task, Unmasked
from thinwire.runtime.round import Reply, Round, Visit, is_stale, shown
from thinwire.runtime.sums import EXAMPLES, Plan, commitment, linear_of, noise_in_shares, place_of, reported
from thinwire.runtime.vouch import SIGNATURE, check_lengths
from thinwire.wire import Frame, Illegal, WireError

P = TypeVar("P")
KEYS = 1 << 16  # bytes of a frame of keys, beside what grows with the clients


@dataclass(frozen=True)
class SecureRound:
    """The round function of a run with [privacy.secure]; `random` for tests alone."""

    secure: Secure
    random: Random = system

    def __call__(self, method: Method, state: Any, at: Round) -> tuple[Any, Metrics]:
        """See round.run_round. RunError where too few clients remain: nothing is unmasked then."""
        assert isinstance(method, Averaged)
        at.visits.update({client: Visit(client) for client in at.server.cohort})
        try:
            return _Sum(self, method, state, at).taken()
        finally:
            for client, visit in at.visits.items():
                visit.bytes_down = at.ledger.sent.get(client, 0)
                visit.bytes_up = at.ledger.received.get(client, 0)
                visit.bytes_keys = at.ledger.keys.get(client, 0)


@dataclass
class _Sum:
    """One attempt at a round's sum."""

    how: SecureRound
    method: Averaged
    state: Any
    at: Round
    keys: dict[int, Keys] = field(default_factory=dict)
    graph: dict[int, tuple[int, ...]] = field(default_factory=dict)
    sealed: dict[int, dict[int, bytes]] = field(default_factory=dict)  # for whom -> of whom -> its shares

    def taken(self) -> tuple[Any, Metrics]:
        """The state after it."""
        at, method = self.at, self.method
        state = linear_of(method, self.how.secure).begun(self.state)
        self.attempt = self.how.random(SEED)
        self.keys = self._keys()
        self._enough(self.keys, self.how.secure.minimum)
        clients = sorted(self.keys)
        self.place = place_of(at.run, at.server.round, self.attempt, clients)
        plan = Plan.of(method, at.server.net, self.how.secure, len(clients), noise_in_shares(at.server.protection))
        sums = plan.sums
        draws = at.server.key.fold("neighbours")
        order = [draws.fold(client).word() for client in clients]
        self.graph = neighbours(clients, self.how.secure.neighbours, order)
        shared = self._shares(clients)
        self._enough(shared, self.how.secure.minimum)
        total, replied = self._train(state, sums, shared)
        self._unmask(sums, total, shared, replied)
        found = sums.sums(total, len(replied))
        return self._moved(state, plan, {name: torch.from_numpy(sum) for name, sum in found.items()}, replied)

    def _keys(self) -> dict[int, Keys]:
        found: dict[int, Keys] = {}
        for client, keys in self._ask("keys", ((c, Invite(self.attempt)) for c in self.at.server.cohort), Keys):
            try:
                check_public(keys.seal, keys.mask, *(half for k in found.values() for half in (k.seal, k.mask)))
                check_lengths(keys)
            except ValueError as error:
                self._drop(client, f"Illegal: {error}")
            else:
                found[client] = keys
        return found

    def _shares(self, clients: Sequence[int]) -> list[int]:
        """Who has shared its secrets."""
        signed = any(keys.signature for keys in self.keys.values())

        def questions() -> Iterator[tuple[int, Peers]]:
            for client in clients:
                near = self.graph[client]
                seals, masks = (b"".join(getattr(self.keys[peer], name) for peer in near) for name in ("seal", "mask"))
                signatures = (
                    b"".join(self.keys[peer].signature or bytes(SIGNATURE) for peer in near) if signed else None
                )
                yield client, Peers(self.attempt, list(clients), list(near), seals, masks, signatures)

        shared: list[int] = []
        for client, shares in self._ask("shares", questions(), Shares):
            near = self.graph[client]
            if len(shares.sealed) != SEALED * len(near):
                self._drop(client, f"Illegal: {len(shares.sealed)} bytes of shares for {len(near)} peers")
                continue
            for place, peer in enumerate(near):
                self.sealed.setdefault(peer, {})[client] = shares.sealed[place * SEALED : (place + 1) * SEALED]
            shared.append(client)
        return shared

    def _train(self, state: Any, sums: Sums, shared: Sequence[int]) -> tuple[Words, list[int]]:
        """The sum of the masked replies, and whose they are."""
        at, there, known = self.at, {*shared}, dict(self.at.held)

        def frame(client: int, held: str | None) -> Frame:
            about: dict[str, Any] = {"run": at.run, "round": at.server.round, "client": client}
            inner = bytes(wire.encode(self.method.broadcast(state, at.server, client, held), **about))
            peers = [peer for peer in self.graph[client] if peer in there]
            task = Task(self.attempt, peers, torch.frombuffer(bytearray(inner), dtype=torch.uint8))
            return at.ledger.down(client, wire.encode(task, **about, spool=at.spool))

        total, replied = sums.zeros(), list[int]()
        for reply in at.transport.exchange((client, frame(client, known.get(client))) for client in shared):
            self._arrived(reply)
            if reply.frame is not None and is_stale(reply.frame, at.max_header):
                at.held.pop(reply.client, None)
                reply.frame.remove()
                reply = at.transport.again(reply.client, frame(reply.client, None))
                self._arrived(reply)
            masked = self._decoded(Masked, reply, at.max_bytes)
            if masked is None or reply.frame is None:
                continue
            try:
                if masked.numbers.dtype != torch.uint8:
                    raise ValueError(f"masked numbers of {masked.numbers.dtype}")
                sums.add(total, sums.unpack(wire.raw(masked.numbers)))
            except ValueError as error:
                self._drop(reply.client, f"Illegal: {error}")
                continue
            if (held := reply.frame.header(at.max_header).held) is not None:
                at.held[reply.client] = held
            replied.append(reply.client)
        return total, sorted(replied)

    def _unmask(self, sums: Sums, total: Words, shared: Sequence[int], replied: list[int]) -> None:
        """Take all masks off the sum."""
        self._enough(replied, self.how.secure.minimum)
        there, took = {*replied}, {*shared}
        holders = {client: sorted({*self.graph[client], client}) for client in took}
        least = {client: least_of(len(holders[client]), self.how.secure.threshold) for client in took}
        for client in took:  # before anybody reveals anything
            left = len(there.intersection(holders[client]))
            if left < least[client] and (client in there or there.intersection(self.graph[client])):
                self._fail(
                    f"{left} of the {len(holders[client])} holders of client {client}'s secrets remain, "
                    f"{least[client]} must"
                )

        def questions() -> Iterator[tuple[int, Remaining]]:
            for client in replied:
                ids = [peer for peer in self.graph[client] if peer in took]
                data = b"".join(self.sealed[client][peer] for peer in ids)
                yield client, Remaining(self.attempt, replied, ids, data)

        shares: dict[int, dict[int, bytes]] = {client: {} for client in took}  # of whom -> holder -> share
        for client, reply in self._ask("unmask", questions(), Unmasked):
            ids = reply.ids
            if len(reply.shares) != SEED * len(ids) or len({*ids}) < len(ids) or not {*ids} <= took:
                self.at.visits[client].error = shown("Illegal: shares of clients that it was not asked for, or none")
                continue
            for place, other in enumerate(ids):
                if client in holders[other]:
                    shares[other][holders[other].index(client)] = reply.shares[place * SEED : (place + 1) * SEED]
        for client in sorted(took):
            if client in there:
                own = self._secret(client, shares[client], least[client], self.keys[client].own, commitment)
                sums.mask(total, self_mask(own, self.place, client), -1)
            elif near := [peer for peer in self.graph[client] if peer in there]:
                seed = self._secret(client, shares[client], least[client], self.keys[client].mask, _public)
                for peer in near:  # what the peer has added of the mask between the two
                    key = pair_mask(Pair(seed), self.keys[peer].mask, self.place, client, peer)
                    sums.mask(total, key, -1 if peer < client else 1)

    def _secret(self, client: int, shares: Mapping[int, bytes], least: int, known: bytes, shows: Any) -> bytes:
        """A client's secret, of any of the shares that came: those of who lies are passed over."""
        if (secret := recovered(shares, least, lambda found: shows(found) == known)) is not None:
            return secret
        if len(shares) < least:
            return self._fail(f"{len(shares)} shares of client {client}'s secret came, {least} must")
        return self._fail(f"the shares of client {client} do not make its secret: leave it out, or ask why")

    def _moved(
        self, state: Any, plan: Plan, found: Mapping[str, torch.Tensor], replied: Sequence[int]
    ) -> tuple[Any, Metrics]:
        """What the sums do to the state, as one reply."""
        method, server, sums = self.method, self.at.server, plan.sums
        whole = {name: total.double() * sums.terms[name].unit for name, total in found.items()}
        weight = float(len(replied))
        if plan.weighted:
            weight = float(found[EXAMPLES]) / plan.most
        else:
            if noise_in_shares(server.protection) is not None:
                weight = float(len(server.cohort))  # whoever has replied, as in aggregate.noised
            server.weighing.shares = {client: Share(1 / weight, "equally") for client in replied}
        if not weight:
            self._fail("the clients claim no examples")
        metrics = reported(whole)
        own = (name for name in whole if not name.startswith("report/"))
        mean = {name: (whole[name] / weight).reshape(sums.terms[name].shape) for name in own}
        update = plan.linear.of_terms(state, server, mean)
        counted = [Counted(client, 1.0, update.metrics) for client in replied]
        server = replace(server, spool=self.at.spool)
        state, more = method.step(state, server, dict(update.tensors), counted)
        return state, metrics | more

    def _ask(self, action: str, questions: Iterable[tuple[int, Any]], kind: type[P]) -> Iterator[tuple[int, P]]:
        """The answers to questions about keys; who gives none is out of the round."""
        at = self.at

        def frames() -> Iterator[tuple[int, Frame]]:
            for client, question in questions:
                frame = wire.encode(question, run=at.run, round=at.server.round, client=client)
                yield client, at.ledger.key(client, frame)

        for reply in at.transport.exchange(frames(), action):
            self._arrived(reply, key=True)
            answer = self._decoded(kind, reply, KEYS + 2 * SEALED * len(at.visits))
            if answer is not None:
                yield reply.client, answer

    def _arrived(self, reply: Reply, key: bool = False) -> None:
        self.at.visits[reply.client].seconds += reply.seconds
        if reply.frame is not None and key:
            self.at.ledger.key(reply.client, reply.frame)
        elif reply.frame is not None:
            self.at.ledger.up(reply.client, reply.frame)

    def _decoded(self, kind: type[P], reply: Reply, most: int) -> P | None:
        if reply.frame is None:
            self._drop(reply.client, reply.error or "no reply")
            return None
        try:
            header = reply.frame.header(most)
            if (header.run, header.round, header.client) != (self.at.run, self.at.server.round, reply.client):
                raise Illegal(f"a reply of run {header.run}, round {header.round}, client {header.client}")
            return wire.decode(kind, reply.frame, most)
        except WireError as error:
            self._drop(reply.client, f"{type(error).__name__}: {error}")
            return None
        finally:
            reply.frame.remove()

    def _drop(self, client: int, why: str) -> None:
        self.at.visits[client].error = shown(why)

    def _enough(self, clients: Iterable[int], least: int) -> None:
        left = len({*clients})
        if left < least:
            self._fail(f"{left} of {len(self.at.visits)} clients remain, {least} must")

    def _fail(self, why: str) -> NoReturn:
        round = self.at.server.round
        errors = (f"; client {visit.client}: {visit.error}" for visit in self.at.visits.values() if visit.error)
        raise RunError(
            f"round {round}: the secure sum fails: {why}{next(errors, '')}; the checkpoint of round {round - 1} stays"
        )


def _public(seed: bytes) -> bytes:
    return Pair(seed).public
