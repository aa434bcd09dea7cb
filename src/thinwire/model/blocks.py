"""A model's stack of transformer layers: where it is, whose a parameter is, and how the stack falls into blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from thinwire.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layers_of(model: PreTrainedModel, path: str | None = None) -> str:
    """The dotted path of the list of transformer layers, such as `model.layers`.

    It is the longest list of modules that are all of one class and hold parameters; lists inside the members of such a
    list, as of experts, do not count. ModelError: there is none, or two are the longest, or `path` leads to no such
    list.
    """
    name, hint = type(model).__name__, "set method.layers to the dotted path of its transformer layers"
    if path is not None:
        if not _is_stack(dict(model.named_modules()).get(path)):
            raise ModelError(f"{name} has no list of layers of one class at {path!r}: {hint}")
        return path
    found: dict[str, int] = {}
    for at, module in model.named_modules():
        # an outer list comes before those inside it
        if _is_stack(module) and not any(at.startswith(f"{outer}.") for outer in found):
            found[at] = len(module)
    longest = [at for at, length in found.items() if length == max(found.values())]
    if not longest:
        raise ModelError(f"{name} has no list of layers of one class: {hint}")
    if len(longest) > 1:
        raise ModelError(f"{name} has {len(longest)} longest lists of layers, {' and '.join(longest)}: {hint}")
    return longest[0]


def layer_of(name: str, layers: str) -> int | None:
    """Which layer of the list at `layers` the parameter of that name belongs to; None: to none."""
    if not name.startswith(f"{layers}."):
        return None
    number = name.removeprefix(f"{layers}.").partition(".")[0]
    return int(number) if number.isdecimal() else None


def blocks_of(depth: int, count: int) -> tuple[range, ...]:
    """`depth` layers as `count` runs of consecutive ones, whose sizes differ by at most one, larger ones first.

    ValueError unless 1 <= count <= depth.
    """
    if not 1 <= count <= depth:
        raise ValueError(f"{depth} layers cannot make {count} blocks: there must be from 1 to {depth}")
    size, larger = divmod(depth, count)
    starts = [block * size + min(block, larger) for block in range(count + 1)]
    return tuple(range(low, high) for low, high in pairwise(starts))


def modules_of(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The parameters of each numbered layer, and of each module beside the layers, in their order.

    By their names alone: a layer is what they share up to their first number.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
        found.setdefault(name.rpartition(".")[0] if layer is None else layer[0], []).append(name)
    return [tuple(own) for own in found.values()]


def _is_stack(module: nn.Module | None) -> bool:
    """Whether it is a list of modules of one class that all hold parameters."""
    return (
        isinstance(module, nn.ModuleList)
        and len({type(member) for member in module}) == 1
        and all(next(member.parameters(), None) is not None for member in module)
    )
