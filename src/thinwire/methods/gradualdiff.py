"""GradualDiff-Fed (Faiyaz and Salman, 2025): only differences travel; in exact arithmetic it is FedAvg.

    d_i = w_i - w        D = sum_i (n_i / n) d_i        w <- w + s(D)

Lossless (the default): both ends hold the same low-precision tensors, and what travels is how many values of the dtype
each weight has moved by, entropy-coded (compress.ulp). A client says which version it holds, and receives the
difference to the current one, or the whole model once, coded too; a hash of the result rides in each frame, so that all
peers hold the same bits for ever. What rounding would lose is kept in the mean by a keyed draw (`stochastic`), or kept
by the one who rounds (`residue`), or lost as in FedAvg (`nearest`).

Lossy (`codec`): c = Q(d + e) travels, e <- d + e - c stays (error feedback), at the clients and at the server. The
server applies exactly what it sends. Its step s is the mean itself, or what `server_step` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.aggregate.server_step import of_flat
from thinwire.compress.catalogue import TensorCode, tensor_code
from thinwire.compress.entropy.packing import to_tensor
from thinwire.compress.exact.rounding import moves
from thinwire.core import Client, Server, StaleVersion
from thinwire.costs.differences import coded_bits, codes, differences
from thinwire.costs.frames import VERSION, Expected, Frames
from thinwire.costs.memory import MOMENTS, Memory, Side, exact_coding, holding, training
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.net import Net
from thinwire.privacy.protection import BOTH
from thinwire.train.versions import Exact, coded, decoded, key_below, layout, lossy_decoded
from thinwire.train.weights import fill
from thinwire.wire import Illegal, LazyTensors
from thinwire.wire.legal import LARGEST, check_keys, check_rate
from thinwire.wire.payload import Spec, specs_of

Tensors = Mapping[str, Tensor]
START = "start"  # in place of a version: the start model, which every site has


@dataclass(frozen=True)
class Held:
    """The weights that all peers hold, their version, and how they came of the version before.

    `step` has each tensor's coded change from the version `prior`, uint8, under `key`; the others are float32: the
    server's momentum and second moment, and what it has still to send.
    """

    KIND: ClassVar[str] = "State"

    weights: Tensors
    version: str
    prior: str | None = None
    step: Tensors | None = None
    key: int = 0
    first: Tensors | None = None
    second: Tensors | None = None
    residue: Tensors | None = None


@dataclass(frozen=True)
class Change:
    """How to come from the version `base` to `version`: a coded tensor each, uint8; none where they are one version.

    `base` is START for the start model that all sites have, and None where the whole model travels. `model` says whose
    weights they are. Exact changes are coded by ulp, others by the method's codec under `key`.
    """

    model: str
    base: str | None
    version: str
    exact: bool
    key: int
    changes: Tensors
    lr: float


@dataclass(frozen=True)
class Difference:
    """A client's coded difference to the version `base`, under a key; examples, loss, skipped steps as in FedAvg."""

    base: str = field(metadata={"release": True})
    key: int = field(metadata={"release": True})
    changes: Tensors = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


class GradualDiff(Exact):
    """Local first-order steps; coded differences of weights travel both ways."""

    name: Literal["gradualdiff"] = "gradualdiff"
    codec: Literal["lossless", "lowrank", "blocks", "eden", "topk"] = "lossless"
    bits: float = 4  # a value: lowrank 8, 4 or 2; blocks 8, 4, 2 or 1 (signs); eden 4 to 1 or 0.5; topk 16, 8, 4 or 2
    rank: PositiveInt = 16  # of a matrix, that lowrank sends
    down_rank: PositiveInt | None = None  # and that the server sends: of two clients' mean, twice theirs loses nothing
    share: float = Field(0.03, gt=0, le=1)  # of the weights, that topk sends
    feedback: bool = True  # what the codec loses is kept, and added to the next difference
    gate: bool = False  # what cannot change a weight as it is rounded is not sent, but kept

    Down, Up, State = Change, Difference, Held
    paper: ClassVar[str] = "Faiyaz and Salman 2025, arXiv:2506.19164"
    private = BOTH

    @model_validator(mode="before")
    @classmethod
    def _flat_step(cls, values: Any) -> Any:
        return of_flat(values)

    @model_validator(mode="after")
    def _known_code(self) -> GradualDiff:
        if self.codec != "lossless":
            self.code()  # raises ValueError for bits that it does not have
        return self

    def init(self, server: Server) -> Held:
        weights = {name: self.start_of(server.net, name) for name in server.net.names}
        return Held(weights, server.versions.put(weights))

    def broadcast(self, state: Held, server: Server, client_id: int, held: str | None) -> Change:
        known = server.versions.get(held) if held is not None else None
        base, exact, changes = held if known is not None else None, True, state.step
        if held == state.version:
            base, changes = held, {}
        elif held is not None and held == state.prior and changes is not None:
            base, exact = held, self.codec == "lossless"
        else:
            shared = known is None and self.start == "shared"
            base, changes = START if shared else base, {}
            for name, new in state.weights.items():
                own = self.start_of(server.net, name) if shared else None if known is None else known[name]
                changes[name] = coded(new, own)
        model = layout(specs_of(state.weights))
        return Change(model, base, state.version, exact, state.key, changes, self.rate(server))

    def client_update(self, down: Change, client: Client) -> Difference:
        self.receive(down, client)
        local = self.train(client, down.lr, keep=True)
        key, changes, held = client.key.fold("code").word(), {}, client.versions.get(down.version)
        assert held is not None  # `receive` has put it there
        for i, (name, trained) in enumerate(zip(client.net.names, local.weights, strict=True)):
            old, target = held[name], trained.detach().float()
            if name in client.memory:
                target = target + client.memory[name]
            if not torch.isfinite(target).all():
                raise Illegal(f"the update of {name} is not finite")
            if self.codec == "lossless":
                new = self.rounded(target, old.dtype, key, i)
                changes[name], left = coded(new, old), target - new.float()
            else:
                changes[name], sent = self._lossy(self.code(), old, target - old.float(), key, i)
                left = target - old.float() - sent
            if self._keeps:
                client.memory[name] = left
        return Difference(down.version, key, changes, len(client.data), local.loss, local.skipped)

    def check(self, state: Held, client_id: int, up: Difference) -> None:
        check_keys(up.key)
        if up.base != state.version:
            raise Illegal(f"a difference to the version {up.base:.12}, not to {state.version:.12}")
        if list(up.changes) != list(state.weights):
            raise Illegal("the names of the differences are not the model's")
        # All is decoded twice, here and for the mean, a tensor at a time: kept in between it would be a model a client.
        for name, change in self._differences(state, up).items():
            if not (change.abs() <= LARGEST).all():
                raise Illegal(f"the difference of {name} is beyond {LARGEST:g} or not finite")
            lossy = self.codec != "lossless"  # else it is the dtype's own numbers that are decoded
            if lossy and not torch.isfinite(((old := state.weights[name]).float() + change).to(old.dtype)).all():
                raise Illegal(f"the difference of {name} leaves the range of {old.dtype}")

    def update(self, state: Held, server: Server, up: Difference) -> Update:
        return Update(self._differences(state, up), self.weight(up), up.loss, up.skipped)

    def step(
        self, state: Held, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Held, Metrics]:
        key, weights, step = server.key.fold("code").word(), {}, {}
        before = {f"{kind}/{n}": t for kind in ("first", "second") for n, t in (getattr(state, kind) or {}).items()}
        kept: dict[str, Any] = {"first": {}, "second": {}, "residue": {}}
        for i, (name, old) in enumerate(state.weights.items()):
            move, entries = self.server_step(before, name, mean.pop(name))
            for entry, tensor in entries.items():
                kept[entry.partition("/")[0]][name] = tensor
            target = old.float() + move
            if state.residue is not None:
                target += state.residue[name]
            if self.codec == "lossless":
                weights[name] = self.rounded(target, old.dtype, key, i)
                step[name] = coded(weights[name], old)
            else:
                step[name], sent = self._lossy(self.code(down=True), old, target - old.float(), key, i)
                weights[name] = (old.float() + sent).to(old.dtype)  # exactly what the peers make of it
            if self._keeps:
                kept["residue"][name] = target - weights[name].float()
        after = Held(weights, server.versions.put(weights), state.version, step, key)
        return replace(after, **{name: tensors for name, tensors in kept.items() if tensors}), {}

    def materialise(self, state: Held, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Change, client: Client) -> None:
        check_keys(down.key)
        check_rate(down.lr)
        net = client.net
        mine = layout({name: Spec(self.held_dtype(p.dtype), tuple(p.shape)) for name, p in net.parameters()})
        if down.model != mine:
            raise Illegal(f"the server's model is {down.model}, this client's {mine}")
        known = client.versions.get(down.base) if down.base not in (None, START) else None
        if known is None and down.base not in (None, START):
            raise StaleVersion
        if list(down.changes) != list(net.names) and (len(down.changes) or down.base != down.version):
            raise Illegal("the names of the changes are not the model's")

        @torch.no_grad()
        def build() -> None:
            for i, (name, parameter) in enumerate(net.parameters()):
                old = self.start_of(net, name) if down.base == START else known[name] if known is not None else None
                spec = Spec(self.held_dtype(parameter.dtype), tuple(parameter.shape))
                if down.exact and len(down.changes):
                    old = decoded(down.changes[name], name, old, spec)
                elif len(down.changes):
                    if old is None:
                        raise Illegal("a lossy change needs a version to build on")
                    received = lossy_decoded(self.code(down=True), down.changes[name], name, spec, down.key, i)
                    old = (old.float() + received).to(old.dtype)
                assert old is not None  # no changes: then there is a base
                parameter.copy_(old)
            if self._keep(client) != down.version:
                raise Illegal(f"the changes do not make the version {down.version:.12}")

        net.rebuild(down.version.encode(), build)
        if client.versions.get(down.version) is None:  # a simulation has kept the weights longer than the store did
            self._keep(client)
        client.held = down.version

    def _keep(self, client: Client) -> str:
        """The version of the weights in the client's net, which is then in its store."""
        weights = {name: p.detach().to(self.held_dtype(p.dtype)) for name, p in client.net.parameters()}
        return client.versions.put(weights)

    @property
    def one_bit(self) -> bool:
        return self.codec == "blocks" and self.bits == 1

    @property
    def additive(self) -> bool:
        return True

    @property
    def _keeps(self) -> bool:
        return self.rounding == "residue" if self.codec == "lossless" else self.feedback

    def code(self, down: bool = False) -> TensorCode:
        """What codes a tensor of the lossy tier, up or down; ValueError for bits that it has not."""
        assert self.codec != "lossless"
        rank = self.down_rank or self.rank if down else self.rank
        return tensor_code("factors" if self.codec == "lowrank" else self.codec, self.bits, rank, self.share)

    def _lossy(self, code: TensorCode, old: Tensor, wanted: Tensor, key: int, stream: int) -> tuple[Tensor, Tensor]:
        """The code of what is wanted of this tensor, and what it decodes to, float32."""
        sent = torch.where(moves(old, wanted), wanted, 0.0) if self.gate else wanted
        data = code.encode(sent, own := key_below(key, stream))
        return to_tensor(data), code.decode(data, old.shape, own)

    def _differences(self, state: Held, up: Difference) -> LazyTensors:
        """What the reply changes in each tensor, float32, decoded when asked for."""
        specs, order = specs_of(state.weights), {name: i for i, name in enumerate(state.weights)}

        def read(name: str) -> Tensor:
            if self.codec != "lossless":
                return lossy_decoded(self.code(), up.changes[name], name, specs[name], up.key, order[name])
            old = state.weights[name]
            return decoded(up.changes[name], name, old, specs[name]).float() - old.float()

        return LazyTensors({name: Spec(torch.float32, spec.shape) for name, spec in specs.items()}, read)

    def frames(self, at: Expected) -> Frames | None:
        dtype = self.held_dtype(next(iter(at.trained.values())).dtype)
        empty = {name: torch.empty(0, dtype=torch.uint8) for name in at.trained}
        down = Change(VERSION, VERSION, VERSION, True, 1 << 63, empty, 0.0)
        heads = at.length(down), at.length(Difference(VERSION, 1 << 63, empty, 65535, 0.0, 0), held=VERSION)
        bits = coded_bits(self.lr, self.steps, self.optimiser, dtype, self.rounding == "stochastic")
        lossy = None
        if self.codec != "lossless":
            lossy = codes(self.code(down=True), at.trained, self.gate), codes(self.code(), at.trained, self.gate)
        return differences(at, heads, dtype, bits, lossy, self.start == "sent")

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        held, coding = at.size * self.held_dtype(at.dtype).itemsize, exact_coding(at) if self.codec == "lossless" else 0
        if side == "client":  # Net.rebuild's copy, and the weights that the difference is taken to
            return training(at, forward, self.optimiser, self.recompute, at.trained_bytes + held, coding)
        floats = 1 + self._keeps + MOMENTS[self.server_step.kind]
        return holding(at, 2 * held + 4 * at.size * floats, coding)  # old and new versions, while one becomes the other
