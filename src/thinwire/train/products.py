"""What methods have in common whose server works with the products of its clients' LoRA factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from thinwire.aggregate.mean import Counted, Update
from thinwire.aggregate.products import Pair
from thinwire.aggregate.stack import Stack
from thinwire.core import Server
from thinwire.errors import ConfigError
from thinwire.keys import Key
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.train.first_order import FirstOrder
from thinwire.train.weights import Trained, check_weights
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST

Tensors = Mapping[str, Tensor]
LEFT, RIGHT = ".lora_A.", ".lora_B."


class Places(NamedTuple):
    """Where a layer's factors are: the names of left [rank, in] and right [out, rank]."""

    left: str
    right: str


class OnProducts(FirstOrder):
    """Local steps on both factors of a LoRA view; the server has all clients' factors, and no mean of them."""

    keeps: ClassVar[bool] = False
    aggregation: Stack = Stack()  # type: ignore[assignment] # no run file can choose it, and these nothing else

    @model_validator(mode="after")
    def _plain(self) -> OnProducts:
        if not self.server_step.plain:
            raise ValueError(f"server_step: {self.name} ends where the mean of the products is: plain alone, lr 1")
        if self.moments == "kept":
            raise ValueError(f"moments: kept ones are of factors that {self.name} replaces from round to round")
        return self

    def check(self, state: Any, client_id: int, up: Trained) -> None:
        check_factors(state.factors, up.weights)

    def update(self, state: Any, server: Server, up: Trained) -> Update:
        return Update(rows(up.weights), self.weight(up), up.loss, up.skipped)

    def fits(self, net: Net) -> None:
        check_trained(net.names, self.name)

    def rank_in(self, trained: Tensors) -> int:
        """The rank of what is trained; ModelError for what the method cannot train, before there is a net."""
        check_trained(trained, self.name)
        return rank_of(trained)


class Ranked(OnProducts):
    """The same with a rank for each client: of a client that is not in the table, the view's.

    One scale, the view's alpha / rank, holds for all. A client of a lower rank has zeros in the other rows, which no
    step moves: it computes as the view does, and sends and is sent less.
    """

    ranks: dict[NonNegativeInt, PositiveInt] = Field({})  # client -> rank

    def rank_of(self, client: int, most: int) -> int:
        """A client's rank; `most` is the view's."""
        return self.ranks.get(client, most)

    def check(self, state: Any, client_id: int, up: Trained) -> None:
        check_factors(cut(state.factors, self.rank_of(client_id, rank_of(state.factors))), up.weights)

    def fits(self, net: Net) -> None:
        super().fits(net)
        most = rank_of(net.base)
        for client, rank in self.ranks.items():
            if rank > most:
                raise ModelError(f"method.ranks.{client}: {rank} is more than model.lora.rank, which is {most}")

    def check_clients(self, clients: int) -> None:
        if unknown := [client for client in self.ranks if client >= clients]:
            there = f"are {clients} clients, 0 to {clients - 1}" if clients > 1 else "is one client, 0"
            raise ConfigError(f"method.ranks: no client {', '.join(map(str, unknown))}: there {there}")


def check_trained(names: Iterable[str], method: str) -> None:
    """ModelError unless what is trained are both factors of a LoRA view, and nothing else."""
    names = list(names)
    factors = {name for place in places(names).values() for name in place}
    if not any(LEFT in name or RIGHT in name for name in names):
        raise ModelError(f"model.lora: missing; {method} works with the factors of a LoRA view")
    if not factors <= {*names} or any(RIGHT in name for name in {*names} - factors):
        raise ModelError(f"model.lora: {method} trains both factors of a LoRA view, and here one is not trained")
    if others := [name for name in names if name not in factors]:
        raise ModelError(
            f"model.lora: {method} works with factors alone, and a classifier's view trains its head too: {others[0]}"
        )


def places(names: Iterable[str]) -> dict[str, Places]:
    """Layer -> the names of its factors, of all that a LoRA view trains."""
    return {name.partition(LEFT)[0]: Places(name, name.replace(LEFT, RIGHT)) for name in names if LEFT in name}


def rank_of(weights: Tensors) -> int:
    """The rank of a view, by its factors."""
    return next(weights[place.left].shape[0] for place in places(weights).values())


def rows(weights: Tensors) -> dict[str, Tensor]:
    """Factors rank first, under LAYER/left and LAYER/right: what a reply adds to a stack."""
    found: dict[str, Tensor] = {}
    for layer, place in places(weights).items():
        found |= {f"{layer}/left": weights[place.left], f"{layer}/right": weights[place.right].T}
    return found


def pairs(stacked: Tensors) -> dict[str, Pair]:
    """The inverse of those names: layer -> the pair of all clients' rows."""
    layers = [name.removesuffix("/left") for name in stacked if name.endswith("/left")]
    return {layer: Pair(stacked[f"{layer}/left"], stacked[f"{layer}/right"]) for layer in layers}


def named(layers: Mapping[str, Pair], like: Tensors) -> dict[str, Tensor]:
    """Pairs as factors under their own names, in the dtypes and on the devices of `like`."""
    found: dict[str, Tensor] = {}
    for layer, place in places(like).items():
        found[place.left] = layers[layer].left.to(like[place.left])
        found[place.right] = layers[layer].right.T.contiguous().to(like[place.right])
    return found


def shares(counted: Sequence[Counted], ranks: Sequence[int]) -> Tensor:
    """How much each row of a stack counts, float64: its client's part of all weights."""
    total = sum(reply.weight for reply in counted)
    each = [reply.weight / total for reply in counted]
    return torch.tensor(
        [share for share, rank in zip(each, ranks, strict=True) for _ in range(rank)], dtype=torch.float64
    )


def fresh(net: Net, key: Key, rank: int) -> dict[str, Tensor]:
    """Factors to begin with: left uniform on +-1 / sqrt(in) from the key, in `rank` rows and 0 beyond; right 0."""
    found: dict[str, Tensor] = {}
    for layer, place in net.adapted().items():
        left = net.base[place.left]
        uniform = torch.from_numpy(2 * key.fold(layer).uniform(rank * left.shape[1]) - 1).view(rank, left.shape[1])
        found[place.left] = torch.zeros_like(left)
        found[place.left][:rank] = (uniform / math.sqrt(left.shape[1])).to(left)
        found[place.right] = torch.zeros_like(net.base[place.right])
    return found


def cut(weights: Tensors, rank: int) -> dict[str, Tensor]:
    """The first rows of left and columns of right: the factors of a client of that rank."""
    return {
        name: (tensor[:rank] if LEFT in name else tensor[:, :rank]).contiguous() for name, tensor in weights.items()
    }


def padded(weights: Tensors, like: Tensors) -> dict[str, Tensor]:
    """The inverse of `cut`: with zeros beyond, in the shapes of `like`; Illegal where it is longer, or not its own."""
    if set(weights) != set(like):
        raise Illegal("the names of the factors are not the model's")
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        whole = torch.zeros_like(like[name], device=tensor.device)
        side = 0 if LEFT in name else 1
        if tensor.dim() != 2 or tensor.shape[side] > whole.shape[side] or tensor.dtype != whole.dtype:
            raise Illegal(f"{name} is {tensor.dtype} {list(tensor.shape)}, beyond {list(whole.shape)}")
        if tensor.shape[1 - side] != whole.shape[1 - side]:
            raise Illegal(f"{name} is {list(tensor.shape)}, not of {list(whole.shape)}")
        whole.narrow(side, 0, tensor.shape[side]).copy_(tensor)
        found[name] = whole
    return found


def check_factors(like: Tensors, weights: Tensors) -> None:
    """Illegal unless factors are such as `like`, and each product is within LARGEST, so that a base stays finite."""
    check_weights(like, weights)
    for layer, place in places(like).items():
        size = float(weights[place.left].float().norm()) * float(weights[place.right].float().norm())
        if not size <= LARGEST:
            raise Illegal(f"the product of {layer} is beyond {LARGEST:g}")
