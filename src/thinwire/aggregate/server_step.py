"""How the server moves along the mean of the updates: by it, or by momentum, Adam or Yogi on it (Reddi et al. 2020).

    plain      s = eta D
    momentum   m <- b1 m + D            s = eta m
    nesterov   m <- b1 m + D            s = eta (b1 m + D)
    adam       m <- b1 m + (1 - b1) D   v <- b2 v + (1 - b2) D^2                    s = eta m / (sqrt(v) + tau)
    yogi       as adam, but             v <- v - (1 - b2) D^2 sign(v - D^2)

without bias correction; v begins at tau^2. What is remembered stands in one table, "first/NAME" and "second/NAME".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, ValidationError
from torch import Tensor

from thinwire.wire.payload import specs_of

Memory = Mapping[str, Tensor]


class ServerStep(BaseModel):
    """The move for one tensor's mean change `delta`, and what is then remembered of that tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: PositiveFloat = 1.0  # eta

    def __call__(self, memory: Memory, name: str, delta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """s(D), in delta's dtype and shape, and the tensor's entries of the memory after it."""
        raise NotImplementedError

    @property
    def plain(self) -> bool:
        """Whether the move is the mean itself."""
        return False


class Plain(ServerStep):
    """s = eta D."""

    kind: Literal["plain"] = "plain"

    def __call__(self, memory: Memory, name: str, delta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.lr * delta, {}

    @property
    def plain(self) -> bool:
        return self.lr == 1


class Momentum(ServerStep):
    """s = eta m."""

    kind: Literal["momentum"] = "momentum"
    momentum: float = Field(0.9, ge=0, lt=1)  # b1

    def __call__(self, memory: Memory, name: str, delta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first = self._first(memory, name, delta)
        return self.lr * first, {f"first/{name}": first}

    def _first(self, memory: Memory, name: str, delta: Tensor, share: float = 1.0) -> Tensor:
        before = memory.get(f"first/{name}")
        return share * delta if before is None else self.momentum * before + share * delta


class Nesterov(Momentum):
    """s = eta (b1 m + D)."""

    kind: Literal["nesterov"] = "nesterov"  # type: ignore[assignment]

    def __call__(self, memory: Memory, name: str, delta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first = self._first(memory, name, delta)
        return self.lr * (self.momentum * first + delta), {f"first/{name}": first}


class Adam(Momentum):
    """s = eta m / (sqrt(v) + tau)."""

    kind: Literal["adam"] = "adam"  # type: ignore[assignment]
    lr: PositiveFloat = 1e-3  # about what each weight moves by
    second_moment: float = Field(0.99, ge=0, lt=1)  # b2
    tau: PositiveFloat = 1e-5  # changes of fine-tuning are of this size; far above it Adam is but momentum

    def __call__(self, memory: Memory, name: str, delta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first = self._first(memory, name, delta, 1 - self.momentum)
        before = memory.get(f"second/{name}")
        second = self._second(torch.full_like(delta, self.tau**2) if before is None else before, delta.square())
        return self.lr * first / (second.sqrt() + self.tau), {f"first/{name}": first, f"second/{name}": second}

    def _second(self, second: Tensor, square: Tensor) -> Tensor:
        return self.second_moment * second + (1 - self.second_moment) * square


class Yogi(Adam):
    """Adam, whose v moves by what is new and not by how far it is away."""

    kind: Literal["yogi"] = "yogi"  # type: ignore[assignment]

    def _second(self, second: Tensor, square: Tensor) -> Tensor:
        return second - (1 - self.second_moment) * square * torch.sign(second - square)


# GradualDiff's run files of before: field -> the field of the server's step; and which of them each kind of step has
FLAT = {"server": "kind", "server_lr": "lr", "momentum": "momentum", "second_moment": "second_moment", "tau": "tau"}
KEPT = {"momentum": ("lr", "momentum")} | dict.fromkeys(("adam", "yogi"), ("lr", "momentum", "second_moment", "tau"))


def of_flat(values: Any) -> Any:
    """A method's fields, with those of the server's step, which stood flat among them once, in a table of their own.

    ValueError for a server that was never one, and for a number out of its range, also where its step does not use it.
    """
    if not isinstance(values, dict) or not (flat := {k: v for k, v in values.items() if k in FLAT}):
        return values
    given = _named(values.get("server_step", {}))
    if not isinstance(given, dict):
        raise ValueError(f"server_step is {given!r}, not a table")
    kind = flat.pop("server", given.get("kind", "average"))
    if kind not in ("average", "plain", "nesterov", *KEPT):
        raise ValueError(f"server is {kind!r}, not one of average, {', '.join(KEPT)}")
    try:
        Yogi.model_validate({FLAT[name]: value for name, value in flat.items()})
    except ValidationError as error:
        field, wrong = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        name = next(name for name, new in FLAT.items() if new == field)
        raise ValueError(f"{name} is {flat[name]!r}: {wrong}") from None
    kept = KEPT.get(kind, ("lr",))
    step = {"lr": 1.0} | given | {FLAT[name]: value for name, value in flat.items() if FLAT[name] in kept}
    rest = {name: value for name, value in values.items() if name not in FLAT}
    return rest | {"server_step": step | {"kind": "plain" if kind == "average" else kind}}


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyServerStep: TypeAlias = Annotated[
    Annotated[Plain | Momentum | Nesterov | Adam | Yogi, Field(discriminator="kind")], BeforeValidator(_named)
]


def stepped(
    step: ServerStep, weights: Mapping[str, Tensor], mean: dict[str, Tensor], memory: Memory | None
) -> tuple[dict[str, Tensor], Memory | None]:
    """The weights after the server's move to the mean of the clients' weights, and the memory after it.

    weights: any float dtypes, which stay; mean: float32, of the same names, taken out one by one. A plain whole step
    ends where the mean is, to the bit.
    """
    after: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    dtypes = {name: spec.dtype for name, spec in specs_of(weights).items()}
    for name in list(mean):
        if step.plain:
            after[name] = mean.pop(name).to(dtypes[name])
            continue
        old = weights[name]
        move, entries = step(memory or {}, name, mean.pop(name) - old.float())
        after[name] = (old.float() + move).to(old.dtype)
        kept |= entries
    return after, kept or None
