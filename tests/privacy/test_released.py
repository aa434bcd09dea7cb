"""In a private run nothing leaves that its method has not spoken for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from federation import Federation, tiny_net
from numpy.typing import NDArray
from torch import Tensor

from thinwire import wire
from thinwire.core import Client, Method
from thinwire.methods.fedavg import FedAvg
from thinwire.privacy.protection import Level, Protection
from thinwire.privacy.released import Released
from thinwire.privacy.secrets import SystemSecrets
from thinwire.runtime.endpoint import serve


@dataclass(frozen=True)
class Ask:
    scale: float


@dataclass(frozen=True)
class Answer:
    total: Tensor = field(metadata={"release": True})
    examples: int | None = None
    names: list[str] = field(default_factory=list)
    extra: Tensor | None = None


class Noisy(Method):
    """Answers with the number of its rows, noised; `careless` gives what is to be absent."""

    careless: str = ""
    states: Mapping[str, str] | None = {"total": "noised", "examples": "absent", "names": "absent", "extra": "public"}

    Down: ClassVar[type] = Ask
    Up: ClassVar[type] = Answer
    State: ClassVar[type] = Ask

    def client_update(self, down: Ask, client: Client) -> Answer:
        noise = client.secrets.normal((2,), down.scale)
        careless: dict[str, Any] = {"": {}, "examples": {"examples": 3}, "names": {"names": ["a"]}}[self.careless]
        return Answer(len(client.data) + noise, **careless)

    def released(self, level: Level) -> Released | None:
        assert level == "record"
        return self.states  # type: ignore[return-value]


class Known:
    """Secrets that repeat."""

    def normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.full(shape, scale, dtype=torch.float64)

    def sampled(self, count: int, rate: float) -> NDArray[np.int64]:
        return np.arange(count)

    def integers(self, count: int, deviation: int) -> NDArray[np.int64]:
        return np.zeros(count, np.int64)


def answer(method: Method, folder: Path, protection: Protection | None) -> Answer:
    client = Federation(FedAvg(), tiny_net(folder), folder / "run").client(0, 1)
    assert isinstance(client.secrets, SystemSecrets)
    client.secrets, client.protection = Known(), protection
    frame = wire.encode(Ask(0.5), run=1, round=1, client=0)
    found: Answer = wire.decode(Answer, serve(method, frame, client))
    assert torch.equal(found.total, len(client.data) + torch.full((2,), 0.5, dtype=torch.float64))
    return found


PRIVATE = Protection("record", 1.0, 1.0)


def test_what_is_spoken_for_leaves(tmp_path: Path) -> None:
    assert answer(Noisy(), tmp_path, PRIVATE).examples is None


def test_without_privacy_all_leaves(tmp_path: Path) -> None:
    assert answer(Noisy(careless="examples"), tmp_path, None).examples == 3


@pytest.mark.parametrize("name", ["examples", "names"])
def test_what_is_to_be_absent_is_absent(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=rf"Answer\.{name} is to be absent in a private run, and it is not"):
        answer(Noisy(careless=name), tmp_path, PRIVATE)


@pytest.mark.parametrize("states", [None, {}, {"examples": "absent"}, {"total": "noise"}])
def test_what_no_method_speaks_for_does_not_leave(states: Mapping[str, str] | None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Answer\.total would leave a private run, and its method names no state"):
        answer(Noisy(states=states), tmp_path, PRIVATE)


def test_no_method_offers_privacy_by_itself() -> None:
    assert FedAvg().released(PRIVATE) is None
