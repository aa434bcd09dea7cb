"""FedDM (Xiong et al., 2023): clients send synthetic rows of each class, and the server trains on them.

Client k learns for each class c that it has a set S_kc of `rows` prompts, points of the input-embedding space, whose
gradient is that of its real rows of the class, at weights drawn anew in a ball of radius `rho` around the round's w:

    S_kc = argmin_S mean_u D(S; w + rho u)        D: the gradients' distance, see train.embedded

    server   w' from w by `server_steps` steps on sum_kc n_kc CE(S_kc) / sum_kc n_kc,  |w' - w| <= rho where rho > 0

The paper matches the means of features and logits of images; gradients are what its surrogate is for. Down: the
weights. Up: the sets, float16, of rows x length x width numbers each, and n_kc, how many rows of each class there are:
no number of it depends on the model's size but the width. For closed sets of answers alone.

What it reveals: a set is an average of a client's rows of one class by what the model makes of them, and is made to
stand for them; words near its points can be read off it, and it travels to a server that keeps it for the round. A
mean of updates shows less. Sets begin as noise, not, as in published code, as copies of real rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from thinwire.aggregate.mean import Metrics, Reports, Update
from thinwire.core import Client, Method, Server
from thinwire.costs.frames import Expected, Frames, between, fixed
from thinwire.costs.sketch import Work
from thinwire.data.batch import Dataset
from thinwire.keys import Key
from thinwire.model.classifier import is_classifier
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train import embedded
from thinwire.train.local import Optimiser, Schedule, scheduled
from thinwire.train.objective import loss as batch_loss
from thinwire.train.weights import fill, fill_checked
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST, MOST

Tensors = Mapping[str, Tensor]
Answers = tuple[tuple[int, ...], ...]
ABSENT = -1  # fills up the shorter answers
LONGEST, MANY = 64, 256  # tokens of an answer, classes


@dataclass(frozen=True)
class Known:
    """The weights; the width of an embedding, how many tokens the model has, and a classifier's classes, else 0."""

    weights: Tensors
    width: int
    tokens: int
    classes: int


@dataclass(frozen=True)
class Surrounded:
    """The weights at which the sets' gradients are to be the real rows'."""

    weights: Tensors


@dataclass(frozen=True)
class Distilled:
    """The sets by class, "0" and so on, float16 [rows, length, width], in `answers`' order, and how many rows of each.

    `answers`: int32 [classes, tokens], the answers' tokens, ABSENT beyond; of a classifier [classes, 0]. `distance` is
    what is left of D, `loss` that of the real rows.
    """

    sets: Tensors = field(metadata={"release": True})
    counts: list[int] = field(metadata={"release": True})
    answers: Tensor = field(metadata={"release": True})
    distance: float = field(metadata={"release": True})
    examples: int = field(metadata={"release": True})
    loss: float = field(metadata={"release": True})


class Set(NamedTuple):
    """A class's rows as they came, and how much they count together."""

    rows: Tensor
    label: int
    weight: float


class FedDM(Method):
    """Synthetic rows of each class, whose gradients are those of a client's rows; the server trains on them."""

    name: Literal["feddm"] = "feddm"
    lr: float = Field(1e-3, gt=0, le=100)  # of the server's steps
    schedule: Schedule = "constant"
    optimiser: Optimiser = "adamw"
    server_steps: PositiveInt = 20
    rho: NonNegativeFloat = 0.0  # the ball of weights around the round's in which the sets are to hold; 0: there alone
    rows: PositiveInt = 4  # of a class
    length: PositiveInt = 8  # tokens that a row is as long as
    steps: PositiveInt = 20  # of a set's learning
    rows_lr: float = Field(0.1, gt=0, le=100)  # of these steps, in units of the embedding's deviation
    batch_size: PositiveInt = 8  # real rows a step

    Down, Up, State = Surrounded, Distilled, Known
    paper: ClassVar[str] = "Xiong et al. 2023, arXiv:2207.09653"
    classes_only: ClassVar[bool] = True

    def init(self, server: Server) -> Known:
        net = server.net
        classes = int(net.model.config.num_labels or 0) if is_classifier(net.model) else 0
        weights = {name: net.base[name] for name in net.names}
        return Known(weights, embedded.table(net.model).shape[1], min(net.rows), classes)

    def broadcast(self, state: Known, server: Server, client_id: int, held: str | None) -> Surrounded:
        return Surrounded(state.weights)

    def client_update(self, down: Surrounded, client: Client) -> Distilled:
        self.receive(down, client)
        net, data = client.net, client.data
        if data.candidates is None:
            raise Illegal("the answers are open, and have no classes")
        table = embedded.table(net.model).detach()
        unit = float(table.float().std())
        sets, counts, apart, losses = dict[str, Tensor](), list[int](), 0.0, list[tuple[float, int]]()
        for label in sorted({example.choice or 0 for example in data.examples}):
            own = tuple(e for e in data.examples if (e.choice or 0) == label)
            real = replace(data, examples=own, balanced=False, pack=0, focus=None)
            key, seen = client.key.fold("class", label), list[float]()
            shape = (self.rows, self.length, table.shape[1])
            start = unit * torch.from_numpy(key.fold("rows").numpy().standard_normal(shape, "float32")).to(net.device)
            wanted = self._gradients(net, real, key, down.weights, seen)
            parameters = [p for _, p in net.parameters()]
            rate = self.rows_lr * unit
            found, left = embedded.matched(net.model, parameters, start, label, data.candidates, wanted, rate)
            sets[str(label)] = found.half().cpu()
            counts.append(len(own))
            apart += left * len(own) / len(data)
            losses.append((sum(seen) / len(seen), len(own)))
        mean = sum(loss * count for loss, count in losses) / len(data)
        return Distilled(sets, counts, _packed(data.candidates), apart, len(data), mean)

    def _gradients(
        self, net: Net, real: Dataset, key: Key, weights: Tensors, seen: list[float]
    ) -> Iterator[list[Tensor]]:
        """A gradient of real rows for each step, at weights in the ball, which are then in the net."""
        batches = real.batches(key.fold("batches"), self.batch_size)
        parameters = [p for _, p in net.parameters()]
        for step in range(self.steps):
            if self.rho:
                self._moved(net, weights, key.fold("ball", step))
            loss = batch_loss(net.model, next(batches))
            seen.append(loss.item())
            yield [g.float() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)]

    @torch.no_grad()
    def _moved(self, net: Net, weights: Tensors, key: Key) -> None:
        """Weights := the round's + rho times a random direction of length 1."""
        draws = {name: key.fold(name).numpy().standard_normal(tuple(t.shape), "float32") for name, t in weights.items()}
        length = math.sqrt(sum(float((draw.astype("float64") ** 2).sum()) for draw in draws.values()))
        for name, parameter in net.parameters():
            step = torch.from_numpy(draws[name]).to(net.device)
            parameter.copy_(weights[name].to(net.device).float() + self.rho / length * step)

    def check(self, state: Known, client_id: int, up: Distilled) -> None:
        answers = up.answers
        if answers.dtype != torch.int32 or answers.dim() != 2 or answers.shape[1] > LONGEST:
            raise Illegal(f"the answers are {answers.dtype} {list(answers.shape)}")
        classes, longest = answers.shape
        if (classes != state.classes or longest) if state.classes else not (2 <= classes <= MANY and longest):
            raise Illegal(f"{classes} answers of up to {longest} tokens are not the model's")
        known = ((answers >= ABSENT) & (answers < state.tokens)).all() and (answers[:, :1] >= 0).all()
        if not known:
            raise Illegal("the answers are no tokens of the model's")
        if not up.sets or not {*up.sets} <= {str(label) for label in range(classes)}:
            raise Illegal(f"the sets are not of {classes} classes")
        if len(up.counts) != len(up.sets) or not all(1 <= count <= MOST for count in up.counts):
            raise Illegal("the counts are not one for each set")
        if not 0 <= up.distance <= LARGEST:
            raise Illegal(f"a distance of {up.distance:g}")
        for label, rows in up.sets.items():
            if rows.dtype != torch.float16 or rows.shape != (self.rows, self.length, state.width):
                raise Illegal(f"the set of class {label} is {rows.dtype} {list(rows.shape)}")
            if not torch.isfinite(rows).all():
                raise Illegal(f"the set of class {label} is not finite")

    def aggregate(
        self, state: Known, server: Server, replies: Iterable[tuple[int, Distilled]]
    ) -> tuple[Known, Metrics]:
        sets: dict[Answers, list[Set]] = {}
        reports = Reports()
        distance, total = 0.0, 0.0
        for _, up in replies:
            answers = _unpacked(up.answers)
            for (label, rows), count in zip(up.sets.items(), up.counts, strict=True):
                # by the examples that count, whatever the counts claim
                weight = up.examples * count / sum(up.counts)
                sets.setdefault(answers, []).append(Set(rows.clone(), int(label), weight))
            reports.add(Update({}, up.examples, up.loss))
            distance, total = distance + up.examples * up.distance, total + up.examples
        if not sets:
            return state, {}
        weights, surrogate = self._learnt(state.weights, server, sets)
        return replace(state, weights=weights), reports.metrics | {
            "distance": distance / total,
            "surrogate": surrogate,  # the loss on the sets, after the last step but one
        }

    def _learnt(
        self, weights: Tensors, server: Server, sets: Mapping[Answers, Sequence[Set]]
    ) -> tuple[dict[str, Tensor], float]:
        """The weights after the server's steps on all sets, and their last loss."""
        net, lr = server.net, scheduled(self.schedule, self.lr, server.round, server.rounds)
        fill(net, weights)
        parameters = [p for _, p in net.parameters()]
        masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
        start = [m.detach().clone() for m in masters] if self.rho else []
        kind = torch.optim.AdamW if self.optimiser == "adamw" else torch.optim.SGD
        rule: torch.optim.Optimizer = kind(masters, lr=lr, weight_decay=0.0)
        total, value = sum(each.weight for group in sets.values() for each in group), math.nan
        for _ in range(self.server_steps):
            value = 0.0
            for answers, group in sets.items():
                rows = torch.cat([each.rows for each in group]).to(net.device)
                labels = torch.tensor([each.label for each in group], device=net.device).repeat_interleave(self.rows)
                weight = torch.tensor([each.weight / total / self.rows for each in group], device=net.device)
                each_loss = embedded.losses(net.model, rows, labels, answers)
                loss = (each_loss * weight.repeat_interleave(self.rows)).sum()
                loss.backward()
                value += loss.item()
            for parameter, master in zip(parameters, masters, strict=True):
                if parameter is not master:
                    master.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
            if all(m.grad is None or torch.isfinite(m.grad).all() for m in masters):  # sets are legal at any size
                rule.step()
            rule.zero_grad(set_to_none=True)
            if self.rho:
                _back(masters, start, self.rho)
            with torch.no_grad():
                for parameter, master in zip(parameters, masters, strict=True):
                    if parameter is not master:
                        parameter.copy_(master)
        return {name: p.detach().clone() for name, p in net.parameters()}, value

    def materialise(self, state: Known, net: Net) -> None:
        fill(net, state.weights)

    def receive(self, down: Surrounded, client: Client) -> None:
        fill_checked(client.net, down.weights)

    def reply_bytes(self, net: Net) -> int:
        return MANY * (2 * self.rows * self.length * embedded.table(net.model).shape[1] + 4 * LONGEST)

    def fits(self, net: Net) -> None:
        if "inputs_embeds" not in inspect.signature(net.model.forward).parameters:
            raise ModelError(f"model.path: {self.name} needs a model that takes embeddings for tokens")
        if net.view.front:
            raise ModelError(f"model.view: {self.name} trains on embeddings, a prompt stands in front of tokens alone")
        if net.view.kind == "tied":
            raise ModelError(f"model.view: {self.name} compares the weights' gradients, and tied numbers hide those")

    def frames(self, at: Expected) -> Frames | None:
        """From one class at a client and answers of a token to all classes and the longest answers."""
        if at.width is None or at.classes is None:
            return None
        most, rows = at.classes, torch.empty(self.rows, self.length, at.width, device="meta").half()

        def up(classes: int, tokens: int, count: int) -> Distilled:
            answers = rows.new_empty(most, tokens, dtype=torch.int32)
            return Distilled(dict.fromkeys(map(str, range(classes)), rows), [count] * classes, answers, 0.0, count, 0.0)

        return between(*(fixed(at, Surrounded(at.trained), partial(up, *end)) for end in ((1, 1), (most, LONGEST))))

    def work(self, round: int) -> Work:
        return Work(self.steps, math.nan, self.batch_size)  # for each class that a client has, which a run file has not


def _packed(answers: Sequence[Sequence[int]]) -> Tensor:
    """The answers' tokens, ABSENT beyond: int32 [classes, tokens]."""
    longest = max(map(len, answers))
    filled = [[*a, *[ABSENT] * (longest - len(a))] for a in answers]
    return torch.tensor(filled, dtype=torch.int32).view(len(answers), longest)


def _unpacked(answers: Tensor) -> Answers:
    return tuple(tuple(token for token in row if token != ABSENT) for row in answers.tolist())


@torch.no_grad()
def _back(weights: Sequence[Tensor], start: Sequence[Tensor], radius: float) -> None:
    """Weights that have left the ball around the start := the nearest ones in it."""
    length = math.sqrt(sum(float((w - s).double().square().sum()) for w, s in zip(weights, start, strict=True)))
    if length > radius:
        for weight, origin in zip(weights, start, strict=True):
            weight.copy_(origin + (radius / length) * (weight - origin))
