"""CG-FedLLM (Wu et al., 2024): what a client has learnt is encoded, decoded at the server, averaged, and put in place.

    client i   trains the factors of a LoRA view from (A, B) to (A_i, B_i)
               X_i = Phi(A_i - A, B_i - B)          z_i = Enc(X_i + e_i)         e_i <- X_i + e_i - Dec(z_i)
    server     (A, B) <- (A, B) + sum_i (n_i / n) Phi^-1(Dec(z_i))

Phi stacks all factors into one image (lora_image). The paper leaves open whether X is the state, the increment or
the gradient: `encode` says; it writes a plain sum where its base takes the weighted mean: `average` says. Its
autoencoder is the codec "resnet"; "learned" is ours (compress.components), and "components" the same with Gaussian
tables that know nothing of updates; the others are classical. The learnt ones come from an artefact of `thinwire
fit-codec`, which is delivered to each newcomer and counted; what it was made from are the replies of `Tgap`.

Down: the factors, or the coded step to them, and the codec for who has none. Up: the code and its key, the cosine of
the update with its decoding, examples, loss. Where that cosine is below `gate` the reply is coded by EDEN at the same
bytes. The paper's DP variant is not here: `bound` clips X, and its noise would be added to z.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from thinwire.aggregate.mean import Counted, Metrics, Update
from thinwire.compress.catalogue import LEARNT, Code, Name, code_of, side_of
from thinwire.compress.codecs.eden import Eden
from thinwire.compress.codecs.powersgd import PowerSgd
from thinwire.compress.entropy.packing import to_bytes, to_tensor
from thinwire.compress.learned import codebooks, codec_file
from thinwire.compress.learned.lora_image import Image
from thinwire.core import Client, Server, StaleVersion
from thinwire.costs.frames import VERSION, Expected, Frames, Span
from thinwire.costs.memory import Memory, Side, averaging, image_coding, training
from thinwire.costs.sketch import Pass, Sketch
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.privacy.protection import Level
from thinwire.privacy.released import Released
from thinwire.train.factors import OnFactors, moved
from thinwire.train.weights import fill, fill_checked
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST, check_keys
from thinwire.wire.payload import LATE

Tensors = Mapping[str, Tensor]
NONE = "-"  # in place of a version


@dataclass(frozen=True)
class Global:
    """The factors and the codec; with a coded down-link also their versions, the coded step, and what it left."""

    weights: Tensors
    codec: Tensors
    codec_version: str
    version: str = NONE
    prior: str = NONE
    step: Tensor | None = None
    key: int = 0
    residue: Tensor | None = None
    moments: Tensors | None = field(default=None, metadata=LATE)  # the memory of the server's step


@dataclass(frozen=True)
class Told:
    """The factors, or the coded step (uint8, under `key`) from the version `base`; the codec for a newcomer."""

    weights: Tensors
    base: str
    version: str
    step: Tensor | None
    key: int
    codec: Tensors
    codec_version: str
    lr: float


@dataclass(frozen=True)
class Coded:
    """A client's code (uint8) under a key, whether EDEN's, and the cosine of what was coded with what it decodes to."""

    code: Tensor = field(metadata={"release": True})
    key: int = field(metadata={"release": True})
    spare: bool = field(metadata={"release": True})
    cosine: float = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})
    skipped: int = field(metadata={"release": True})


class CGFed(OnFactors):
    """Stage 2: local first-order steps on the factors of a LoRA view; codes of what they changed travel up."""

    name: Literal["cgfed"] = "cgfed"
    codec: Name = "components"
    ratio: Literal[16, 32, 64] = 64  # float32 bytes to coded ones
    artefact: str | None = None  # a file of thinwire fit-codec; read by the codecs resnet and learned alone
    average: Literal["mean", "sum"] = "mean"  # sum: the paper's letter, which grows with the clients
    feedback: bool = False  # what the codec loses is kept, and added to the next update
    gate: float = Field(0.5, ge=0, le=1)  # a lower cosine than this: EDEN instead, which has 0.56 at 1/64
    downlink: Literal["raw", "coded"] = "raw"  # coded: EDEN at the same ratio, with feedback at the server
    bound: NonNegativeFloat = 0.0  # of the update's norm, before it is encoded; 0: none

    Down, Up, State = Told, Coded, Global
    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2405.13746"
    private = ("client",)  # clip, encode, decode, noise: what an encoder makes of one update bounds no other's part

    @model_validator(mode="after")
    def _fits(self) -> CGFed:
        if self.codec in LEARNT and self.artefact is None:
            raise ValueError(f"artefact: missing; the codec {self.codec} needs a file of thinwire fit-codec")
        if self.codec == "resnet" and self.ratio != 64:
            raise ValueError(f"ratio: the codec resnet has 64 and no other, not {self.ratio}")
        if self.codec == "sign" and self.ratio < 32:
            raise ValueError(f"ratio: the codec sign has 32 at least, not {self.ratio}")
        if self.feedback and (self.encode == "state" or self.codec == "qsgd"):
            raise ValueError("feedback: goes with increments or gradients, and with codecs that contract, not qsgd")
        if self.average == "sum" and self.downlink == "coded":
            raise ValueError("average: a sum goes with a raw down-link only")
        return self

    def init(self, server: Server) -> Global:
        image = self._image(server.net)
        codec: Tensors = codebooks.untrained() if self.codec == "components" else {}
        if self.codec in LEARNT and self.artefact is not None:
            try:
                found = codec_file.read(Path(self.artefact))
            except ValueError as error:
                raise ModelError(f"method.artefact: {error}") from None
            mine = codec_file.fingerprint(server.net.model, image)
            if found.kind != self.codec:
                raise ModelError(f"method.artefact: {self.artefact} is of the codec {found.kind}, not {self.codec}")
            if found.fingerprint != mine:
                raise ModelError(f"method.artefact: {self.artefact} is for {found.fingerprint}, this run has {mine}")
            codec = found.tensors
        try:
            code_of(self.codec, self.ratio, image, codec)
        except ValueError as error:
            raise ModelError(f"method.codec: {error}") from None
        weights = {name: server.net.base[name] for name in server.net.names}
        version = server.versions.put(weights) if self.downlink == "coded" else NONE
        return Global(weights, codec, server.versions.put(codec) if codec else NONE, version)

    def broadcast(self, state: Global, server: Server, client_id: int, held: str | None) -> Told:
        has, _, codec_version = (held or "").partition(" ")
        codec = {} if codec_version == state.codec_version else state.codec
        weights, base, step = state.weights, NONE, None
        if state.version != NONE and has == state.version:
            weights, base = {}, has
        elif state.step is not None and has == state.prior:
            weights, base, step = {}, has, state.step
        return Told(weights, base, state.version, step, state.key, codec, state.codec_version, self.rate(server))

    def client_update(self, down: Told, client: Client) -> Coded:
        image = self._image(client.net)
        try:
            code = code_of(self.codec, self.ratio, image, self._codec(down, client), self.feedback)
        except ValueError as error:
            raise Illegal(f"the codec: {error}") from None
        weights = self._weights(down, client, image)
        client.held = f"{down.version} {down.codec_version}"
        learnt, loss, skipped = self.learn(weights, client, down.lr, first=False)
        wanted = image.stack(learnt)
        if self.bound and (norm := float(wanted.norm())) > self.bound:
            wanted = wanted * (self.bound / norm)
        if self.feedback and "residue" in client.memory:
            wanted = wanted + client.memory["residue"]
        if not bool(torch.isfinite(wanted).all()):
            raise Illegal("the update is not finite")
        key = client.key.fold("code").word()
        try:
            data, decoded = self._coded(code, wanted, key, client)
            cosine = alike(wanted, decoded)
            spare = cosine < self.gate
        except ValueError:  # beyond what the codec was trained on, so that the server would drop it
            cosine, spare = 0.0, True
        if spare:
            code = code_of("eden", self.ratio, image, contract=self.feedback)
            data = code.encode(wanted, key)
            decoded = code.decode(data, wanted.shape, key)
        if self.feedback:
            client.memory["residue"] = wanted - decoded
        return Coded(to_tensor(data), key, spare, cosine, len(client.data), loss, skipped)

    def released(self, level: Level) -> Released | None:
        return super().released(level) if self.average == "mean" else None

    def check(self, state: Global, client_id: int, up: Coded) -> None:
        check_keys(up.key)
        if not -1.001 <= up.cosine <= 1.001:
            raise Illegal(f"a cosine of {up.cosine}")
        if not bool((self._decoded(state, up, self._layout(state)).abs() <= LARGEST).all()):
            raise Illegal(f"the update is beyond {LARGEST:g} or not finite")

    def update(self, state: Global, server: Server, up: Coded) -> Update:
        image = self._layout(state)
        decoded = self._decoded(state, up, image)
        metrics = {"cosine": up.cosine, "fallback": up.spare, "norm": float(decoded.norm())}
        return Update(image.unstack(decoded), self.weight(up), up.loss, up.skipped, metrics)

    def weight(self, up: Coded) -> float:
        return 1 if self.average == "sum" else super().weight(up)

    def origin(self, state: Global) -> Mapping[str, Tensor]:
        return state.weights if self.encode == "state" else {}

    def step(
        self, state: Global, server: Server, mean: dict[str, Tensor], counted: Sequence[Counted]
    ) -> tuple[Global, Metrics]:
        image, metrics = self._image(server.net), dict[str, float]()
        if known := [reply.metrics for reply in counted if reply.metrics]:  # a private mean comes without
            metrics["cosine"] = sum(each["cosine"] for each in known) / len(known)
            metrics["fallbacks"] = sum(each["fallback"] for each in known)
        if len(known) > 1:  # near 1 where the decoder gives the same whatever it is given
            metrics["alike"] = alike_all(float(image.stack(mean).norm()), counted)
        if self.average == "sum":
            mean = {name: tensor * len(counted) for name, tensor in mean.items()}
        weights, moments = self.moved(state.weights, mean, state.moments)
        state = replace(state, moments=moments)
        if self.downlink == "raw":
            return replace(state, weights=weights), metrics
        now = image.stack({name: tensor.float() for name, tensor in state.weights.items()})
        step = image.stack({name: tensor.float() for name, tensor in weights.items()}) - now
        if state.residue is not None:
            step = step + state.residue
        key, code = server.key.fold("code").word(), code_of("eden", self.ratio, image, contract=True)
        data = code.encode(step, key)
        decoded = code.decode(data, step.shape, key)
        weights = moved(state.weights, image.unstack(decoded), "increment")  # exactly what the clients make of it
        version = server.versions.put(weights)
        after = replace(state, weights=weights, version=version, prior=state.version, step=to_tensor(data), key=key)
        return replace(after, residue=step - decoded), metrics

    def materialise(self, state: Global, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Told, client: Client) -> None:
        fill_checked(client.net, self._weights(down, client, self._image(client.net)))

    def _image(self, net: Net) -> Image:
        return self.image(net, side_of(self.codec))

    def _layout(self, state: Global) -> Image:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
        kind = Image.paper if self.layout == "paper" else Image.packed
        return kind(shapes, side_of(self.codec))

    def _codec(self, down: Told, client: Client) -> Tensors:
        """The codec's tensors, as they came or as they are held; StaleVersion where neither."""
        if down.codec_version == NONE:
            return {}
        found = down.codec if len(down.codec) else client.versions.get(down.codec_version)
        if found is None:
            raise StaleVersion
        found = dict(found)
        if client.versions.put(found) != down.codec_version:  # also keeps it from being dropped as the oldest
            raise Illegal(f"the codec is not the version {down.codec_version:.12}")
        return found

    def _weights(self, down: Told, client: Client, image: Image) -> Tensors:
        """The factors as received; StaleVersion where the step is from a version that is not held."""
        check_keys(down.key)
        if down.version == NONE:
            return down.weights
        weights: Tensors | None = down.weights
        if down.base != NONE:
            weights = client.versions.get(down.base)
            if weights is None:
                raise StaleVersion
            if down.step is not None:
                code = code_of("eden", self.ratio, image, contract=True)
                try:
                    step = code.decode(to_bytes(down.step), (image.height, image.width), down.key)
                except ValueError as error:
                    raise Illegal(f"the step: {error}") from None
                weights = moved(weights, image.unstack(step), "increment")
        assert weights is not None
        weights = dict(weights)
        if client.versions.put(weights) != down.version:
            raise Illegal(f"the step does not make the version {down.version:.12}")
        return weights

    def _coded(self, code: Code, wanted: Tensor, key: int, client: Client) -> tuple[bytes, Tensor]:
        """The bytes and what they decode to; PowerSGD starts from where the last update ended."""
        if self.codec == "powersgd" and isinstance(code, PowerSgd):
            data = code.encode(wanted, key, client.memory.get("basis"))
            client.memory["basis"] = code.halves(data, (wanted.shape[0], wanted.shape[1]))[1].contiguous()
        else:
            data = code.encode(wanted, key)
        return data, code.decode(data, wanted.shape, key)

    def _decoded(self, state: Global, up: Coded, image: Image) -> Tensor:
        name: Name = "eden" if up.spare else self.codec
        try:
            code = code_of(name, self.ratio, image, state.codec, self.feedback)
            return code.decode(to_bytes(up.code), (image.height, image.width), up.key)
        except ValueError as error:
            raise Illegal(str(error)) from None

    def fits(self, net: Net) -> None:
        super().fits(net)
        self._image(net)

    def frames(self, at: Expected) -> Frames | None:
        """Down the factors, to a newcomer with the codec, or a coded step; up a code at the ratio, or somewhat less."""
        values, step = sum(t.numel() for t in at.trained.values()), Eden(32 / self.ratio)
        codec: Tensors = codebooks.untrained() if self.codec == "components" else {}
        if self.codec in LEARNT and self.artefact is not None and Path(self.artefact).exists():
            try:
                codec = codec_file.read(Path(self.artefact)).tensors
            except ValueError as error:
                raise ModelError(f"method.artefact: {error}") from None
        version = VERSION if self.downlink == "coded" else NONE
        codec_version = VERSION if codec or self.codec in LEARNT else NONE
        exact = {"none": 4 * values, "eden": step.size(values)}.get(self.codec)
        sizes = (2 * values // self.ratio, 4 * values // self.ratio) if exact is None else (exact, exact)
        digits = 24  # of round, client and key, in all

        def down(new: bool, coded: bool) -> Span:
            data = torch.empty(step.size(values), dtype=torch.uint8) if coded else None
            base, key = VERSION if coded else NONE, 1 << 63 if version != NONE else 0
            known = {} if coded else at.trained
            size = at.length(Told(known, base, version, data, key, codec if new else {}, codec_version, 0.0))
            return Span(size - digits, size + digits)

        def up(size: int) -> int:
            reply = Coded(torch.empty(size, dtype=torch.uint8), 1 << 63, False, 0.0, 65535, 0.0, 0)
            return at.length(reply, held=f"{version} {codec_version}")

        reply = Span(up(sizes[0]) - digits, up(sizes[1]) + digits)

        def frames(round: int, client: int, new: bool) -> tuple[Span, Span]:
            return down(new, version != NONE and not new and client in at.cohorts[round - 2]), reply

        return frames

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        coding = image_coding(at)
        if side == "client":
            kept = 4 * at.size * self.feedback
            return training(at, forward, self.optimiser, self.recompute, kept, coding)
        step = 8 * at.size if self.downlink == "coded" else 0  # what it is made of, and what it has left
        return averaging(at, self.server_step.kind, step, coding)


def alike(x: Tensor, y: Tensor) -> float:
    """The cosine of two updates; 0 where one of them is zero."""
    lengths = float(x.norm()) * float(y.norm())
    return float((x * y).sum()) / lengths if lengths > 0 else 0.0


def alike_all(length: float, counted: Sequence[Counted]) -> float:
    """The mean cosine of any two updates, from the length of their weighted mean and their own.

    |sum_i p_i d_i|^2 = sum_i p_i^2 |d_i|^2 + the pairs' products, of which each weighs p_i p_j |d_i| |d_j|.
    """
    total = sum(reply.weight for reply in counted)
    parts = [reply.weight / total * reply.metrics["norm"] for reply in counted]
    own = sum(part * part for part in parts)
    pairs = sum(parts) ** 2 - own
    return (length**2 - own) / pairs if pairs > 0 else 0.0
