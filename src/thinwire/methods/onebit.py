"""onebit: what is trained is sent as one bit a number, with its error carried over, in both directions.

Client i holds the numbers v that all hold, trains them to v_i, and owes e_i of what it learned before:

    c_i = Q(v_i - v + e_i)        e_i <- v_i - v + e_i - c_i                     sent: Q's bytes

The server moves along the mean, owes E, and sends the change in the same form:

    c = Q(s(sum_i n_i c_i / n) + E)        v' = L(v + c)        E <- v + s(...) + E - v'

Q is a sign under a mean magnitude for each block (or what `code` names). L rounds to 8 bits a number, so that a
newcomer's numbers are short and to the bit those of the others. The start follows from the run's key: nobody is sent
it. Who has missed rounds receives their changes, or all numbers in 8 bits, whichever is shorter.

After every `merge_every` rounds factors go into the weights that they stand beside, at all ends to the same bits, and
begin anew as the key draws them for that stage; debts and moments, which were of other numbers, do too. A newcomer then
receives each stage's numbers in 8 bits, and comes to the same weights by them (train.stages).

Error feedback at one end: Karimireddy et al. 2019, arXiv:1901.09847; at both: Tang et al. 2019, arXiv:1905.05957.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.compress.catalogue import Plain, TensorCode, sizes
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.coding import AnyCoding, Coding
from thinwire.compress.entropy.packing import to_bytes, to_tensor
from thinwire.compress.feedback import DEBT, carried, debt_of, encode_with_debt, on_grid
from thinwire.core import Client, Server, StaleVersion
from thinwire.costs.changes import kept_changes
from thinwire.costs.frames import VERSION, Expected, Frames
from thinwire.model.net import Net
from thinwire.model.numbers import fill
from thinwire.privacy.protection import BOTH
from thinwire.privacy.secure import Secure
from thinwire.train import common_signs
from thinwire.train.common_signs import CommonSigns, next_scales
from thinwire.train.local import Moments, Schedule
from thinwire.train.probing import Probing
from thinwire.train.stages import LEVELS, arrive, check_merges, check_stages, grown, name_of, on_levels, settle
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST, check_keys, check_rate
from thinwire.wire.payload import LATE

NUMBERS = "numbers"
MISSED = 7  # changes that are kept for those who missed them: of one bit, more are as long as the numbers in 8
MERGE = torch.empty(0, dtype=torch.uint8)  # in place of a change: the factors are merged, and begin anew


@dataclass(frozen=True)
class Numbers:
    """What all hold, as changes of what the net trains from its start: float32 [n], and their version.

    `start`: the version of the start, which everybody has. `owed`: the server's debt, float64 [n]. `changes`: the last
    rounds' coded changes by the version that each is of, oldest first, under the keys `keys`. `stages`: see
    train.stages; the numbers are those of the present one. `scales`: see train.common_signs, in secure sums alone.
    """

    numbers: Tensor
    version: str
    start: str
    owed: Tensor
    changes: Mapping[str, Tensor]
    keys: list[int]
    moments: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)
    stages: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)
    scales: Tensor | None = field(default=None, metadata=LATE)


@dataclass(frozen=True)
class Step:
    """How to come from the version `base`, or where that is None from the start, to `version`.

    Changes, oldest first, under `keys`, empty for a merge; or all numbers in 8 bits, `stages` too. `key`: this round's.
    """

    base: str | None
    version: str
    changes: Mapping[str, Tensor]
    keys: list[int]
    levels: Tensor | None
    key: int
    lr: float
    stages: Mapping[str, Tensor] | None = field(default=None, metadata=LATE)
    scales: Tensor | None = field(default=None, metadata=LATE)


@dataclass(frozen=True)
class Learnt:
    """The coded change of a client's numbers, uint8; its examples, its loss, its skipped steps; its probes, if any."""

    change: Tensor = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})
    probes: int | None = field(default=None, metadata={"release": True, **LATE})
    scales: Tensor | None = field(default=None, metadata={"release": True, **LATE})


class OneBit(Probing):
    """Local first-order steps on few numbers; signs of what they changed travel, with a debt at both ends."""

    name: Literal["onebit"] = "onebit"
    lr: float = 4.5e-3
    schedule: Schedule = "linear"
    moments: Moments = "kept"
    code: AnyCoding = Coding()  # of what the numbers have changed by, up; none: the numbers themselves, and no debt
    code_down: AnyCoding | None = None  # and down; None: as up
    merge_every: NonNegativeInt = 0  # rounds after which factors go into the weights and begin anew; 0: never

    Down, Up, State = Step, Learnt, Numbers
    paper: ClassVar[str] = "error feedback at both ends: Tang et al. 2019, arXiv:1905.05957"
    private = BOTH
    needs_weights: ClassVar[bool] = False

    def init(self, server: Server) -> Numbers:
        start, owed = torch.zeros(server.net.size), torch.zeros(server.net.size, dtype=torch.float64)
        version = server.versions.put({NUMBERS: start})
        return Numbers(start, version, version, owed, {}, [])

    def broadcast(self, state: Numbers, server: Server, client_id: int, held: str | None) -> Step:
        lr, key = self.rate(server), server.key.fold("code").word()
        versions, from_ = [*state.changes, state.version], held or state.start
        if from_ in versions:
            first = versions.index(from_)
            missed = {str(i): change for i, change in enumerate([*state.changes.values()][first:])}
            all_of_it = (1 + len(state.stages or {})) * sizes(self._levels, state.numbers.shape)[1]
            if sum(change.numel() for change in missed.values()) <= all_of_it:
                return Step(held, state.version, missed, state.keys[first:], None, key, lr, scales=state.scales)
        levels = to_tensor(self._levels.encode(state.numbers, 0))
        return Step(None, state.version, {}, [], levels, key, lr, state.stages, state.scales)

    def client_update(self, down: Step, client: Client) -> Learnt:
        numbers, over = self._receive(down, client)
        settle(client.memory, over)
        before = [p.detach().double().cpu() for _, p in client.net.parameters()]
        local = self.train(client, down.lr, keep=True, differences=self.probes_at(client))
        # of the weights as they were filled: what a low precision has cut of the start and the numbers is not learnt
        learnt = torch.cat([(w.detach().cpu() - b).flatten() for w, b in zip(local.weights, before, strict=True)])
        if not torch.isfinite(learnt).all():
            raise Illegal("the update is not finite")
        code, debt = self.code.code(), carried(debt_of(client.memory, learnt), self.code.carry)
        own = None
        if self.code.plain:
            data = code.encode((numbers + learnt).float(), down.key)
        elif down.scales is not None:
            data, own, client.memory[DEBT] = common_signs.encode(code, learnt, debt, down.scales)
        else:
            data, _, client.memory[DEBT] = encode_with_debt(code, learnt, debt, down.key)
        probes = self.probes_in(client.id, local.skipped)
        return Learnt(to_tensor(data), len(client.data), local.loss, local.skipped, probes, own)

    def check(self, state: Numbers, client_id: int, up: Learnt) -> None:
        code, shape = self.code.code(), state.numbers.shape
        if isinstance(code, Blocks) and code.bits <= 4:  # which is seen by the scales, of thousands of replies
            try:
                largest = code.largest(to_bytes(up.change), state.numbers.numel())
            except ValueError as error:
                raise Illegal(f"the numbers: {error}") from None
        else:
            largest = float(_decoded(code, up.change, shape, 0).abs().max())
        if not largest <= LARGEST:
            raise Illegal(f"the change is beyond {LARGEST:g}")
        if up.probes is not None and up.probes < 1:
            raise Illegal(f"{up.probes} probes")

    def update(self, state: Numbers, server: Server, up: Learnt) -> Update:
        found = _decoded(self.code.code(), up.change, state.numbers.shape, server.key.fold("code").word())
        return Update({NUMBERS: found}, self.counts(up, found.numel()), up.loss, up.skipped)

    def origin(self, state: Numbers) -> Mapping[str, Tensor]:
        return {NUMBERS: state.numbers} if self.code.plain else {}

    def linear(self, secure: Secure) -> CommonSigns:
        return CommonSigns(self, secure, self.code.code(), NUMBERS)

    def step(
        self, state: Numbers, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Numbers, Metrics]:
        key, code, moments, stages = server.key.fold("code").word(), self.down.code(), state.moments, state.stages or {}
        move = mean[NUMBERS].double() - (state.numbers if self.code.plain else 0)
        if not self.server_step.plain:
            move, moments = self.server_step(state.moments or {}, NUMBERS, move.float())
        if self.down.plain:
            numbers, owed = (state.numbers + move.double()).float(), state.owed
            data = code.encode(numbers, key)
        else:
            owed = carried(state.owed, self.down.carry)
            data, sent, _ = encode_with_debt(code, move, owed, key)
            numbers = on_levels(state.numbers, sent)
            owed = on_grid(state.numbers) + on_grid(move) + owed - on_grid(numbers)
        version = server.versions.put({NUMBERS: numbers, **stages})
        changes, keys = {**state.changes, state.version: to_tensor(data)}, [*state.keys, key]
        if len(changes) < len(keys) or version in changes:  # the numbers are where they have been before
            changes, keys = ({}, []) if version == state.version else ({state.version: to_tensor(data)}, [key])
        if self.merge_every and server.round % self.merge_every == 0 and server.round < server.rounds:
            changes, keys = {**changes, version: MERGE}, [*keys, key]
            stages = grown(stages, numbers, self.down.plain)
            numbers, owed, moments = torch.zeros_like(numbers), torch.zeros_like(owed), None
            version = server.versions.put({NUMBERS: numbers, **stages})
        kept = dict(list(changes.items())[-MISSED:])
        scales = next_scales(mean)
        kept_too = moments or None, stages or None, scales
        return Numbers(numbers, version, state.start, owed, kept, keys[-MISSED:], *kept_too), {}

    def materialise(self, state: Numbers, net: Net) -> None:
        if self.merge_every:
            arrive(net, state.stages or {}, state.numbers)
        else:
            fill(net, state.numbers)

    def receive(self, down: Step, client: Client) -> None:
        self._receive(down, client)

    def fits(self, net: Net) -> None:
        super().fits(net)
        if self.merge_every:
            check_merges(net, "method.merge_every")

    def _receive(self, down: Step, client: Client) -> tuple[Tensor, int]:
        """Fill the client's net; the numbers that it then holds, and how many stages are over."""
        check_rate(down.lr)
        check_keys(down.key, *down.keys)
        if len(down.changes) != len(down.keys) or len(down.keys) > MISSED:
            raise Illegal(f"{len(down.changes)} changes under {len(down.keys)} keys")
        size, stages = client.net.size, dict(down.stages or {})
        check_stages(stages, size)
        if down.levels is not None:
            numbers = _decoded(self._levels, down.levels, (size,), 0)
        elif down.base is None:
            numbers = torch.zeros(size)
        else:
            known = client.versions.get(down.base)
            if known is None or NUMBERS not in known or known[NUMBERS].shape != (size,):
                raise StaleVersion
            numbers, stages = known[NUMBERS], {name: known[name] for name in known if name != NUMBERS}
        for change, key in zip(down.changes.values(), down.keys, strict=True):
            if self.merge_every and not change.numel():
                numbers, stages = torch.zeros(size), grown(stages, numbers, self.down.plain)
            else:
                sent = _decoded(self.down.code(), change, (size,), key)
                numbers = sent if self.down.plain else on_levels(numbers, sent)
        if client.versions.put({NUMBERS: numbers, **stages}) != down.version:
            raise Illegal(f"the changes do not make the version {down.version:.12}")
        if self.merge_every:
            arrive(client.net, stages, numbers)
        else:
            client.net.rebuild(down.version.encode(), lambda: fill(client.net, numbers))
        client.held = down.version
        return numbers, len(stages)

    def frames(self, at: Expected) -> Frames | None:
        def step(base: str | None, missed: list[Tensor], merges: int, levels: Tensor | None, over: int) -> Step:
            changes = {str(i): change for i, change in enumerate([*missed, *[MERGE] * merges])}
            stages = {name_of(stage): levels for stage in range(over) if levels is not None} or None
            return Step(base, VERSION, changes, [1 << 63] * len(changes), levels, 1 << 63, 0.0, stages)

        def reply(client: int, up: Tensor, examples: int) -> Learnt:
            return Learnt(up, examples, 0.0, 0, self.probes_in(client))

        codes = self.code.code(), self.down.code(), self._levels
        return kept_changes(at, codes, self.merge_every, MISSED, step, reply)

    @property
    def moves_base(self) -> bool:
        return self.merge_every > 0

    @property
    def one_bit(self) -> bool:
        return self.code.one_bit

    @property
    def additive(self) -> bool:
        return not self.code.plain and not self.merge_every  # after a merge the numbers are others

    @property
    def down(self) -> Coding:
        """How what is sent down is coded."""
        return self.code if self.code_down is None else self.code_down

    @property
    def _levels(self) -> Blocks | Plain:
        return Plain() if self.down.plain else LEVELS


def _decoded(code: TensorCode, change: Tensor, shape: Sequence[int], key: int) -> Tensor:
    try:
        return code.decode(to_bytes(change), shape, key)
    except ValueError as error:
        raise Illegal(f"the numbers: {error}") from None
