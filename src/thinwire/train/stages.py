"""Stages of a run: after each, factors go into the weights beside which they stand, and begin anew.

What a peer needs of a stage that is over are its numbers alone, the change of what was trained in it, in the levels
that all hold: from the start model and these each comes to the same weights, to the bit (see views.merging).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from thinwire.compress.catalogue import Plain
from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.entropy.packing import to_bytes, to_tensor
from thinwire.compress.feedback import DEBT, on_grid
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.numbers import fill
from thinwire.model.views import factors
from thinwire.model.views.merging import moved
from thinwire.train.kept import MOMENTS
from thinwire.wire import Illegal
from thinwire.wire.legal import LARGEST

LEVELS = Blocks(8, 1024)  # that all round numbers to, and a newcomer receives them in
STAGE = "stage"  # in a client's memory: how many were over when it was last written
Stages = Mapping[str, Tensor]  # "stage/0", ... -> the bytes of its numbers, uint8


def on_levels(numbers: Tensor, sent: Tensor) -> Tensor:
    """The numbers after a change, on the levels that they travel in: the same at all ends."""
    # whatever many legal replies add up to, or a hub makes up, they stay numbers
    after = (on_grid(numbers) + on_grid(sent)).float().clamp_(-LARGEST, LARGEST)
    return LEVELS.decode(LEVELS.encode(after, 0), after.shape, 0)


def name_of(stage: int) -> str:
    """Of a stage's numbers."""
    return f"stage/{stage}"


def grown(stages: Stages, numbers: Tensor, plain: bool) -> dict[str, Tensor]:
    """The stages with one more that is over; `plain`: its numbers are float32, and not on the levels."""
    code = Plain() if plain else LEVELS
    return {**stages, name_of(len(stages)): to_tensor(code.encode(numbers, 0))}


def numbers_of(stage: Tensor, size: int) -> Tensor:
    """A stage's numbers, float32 [size]; Illegal where they are none."""
    code = Plain() if stage.numel() == 4 * size else LEVELS
    try:
        found = code.decode(to_bytes(stage), (size,), 0)
    except ValueError as error:
        raise Illegal(f"the numbers of a stage: {error}") from None
    if not bool((found.abs() <= LARGEST * 1.01).all()):
        raise Illegal(f"a number of a stage is beyond {LARGEST:g}")
    return found


def check_stages(stages: Stages, size: int) -> None:
    """Illegal unless they are the numbers of one stage after the other, `size` each."""
    if {*stages} != {name_of(stage) for stage in range(len(stages))}:
        raise Illegal(f"stages {', '.join(sorted(stages)):.60}")
    for stage in stages.values():
        numbers_of(stage, size)


def settle(memory: MutableMapping[str, Tensor], over: int) -> None:
    """Drop a client's debt and its moments where they are of an earlier stage's numbers, which mean something else."""
    if int(memory.get(STAGE, torch.tensor(0))) == over:
        return
    for name in [name for name in memory if name == DEBT or name.startswith(MOMENTS)]:
        del memory[name]
    memory[STAGE] = torch.tensor(over)


@torch.no_grad()
def arrive(net: Net, stages: Stages, numbers: Tensor) -> None:
    """The net after these stages, with the numbers of the present one; what of it is there already stays."""
    wanted = [stages[name_of(stage)] for stage in range(len(stages))]
    names = tuple(hashlib.sha256(bytes(to_bytes(stage))).hexdigest() for stage in wanted)
    if net.merged != names[: len(net.merged)]:
        net.reset()
    for stage in range(len(net.merged), len(names)):
        fill(net, numbers_of(wanted[stage], net.size))
        net.view.refresh(net.model)
        net.merged = (*names[:stage], "")  # if this is interrupted, nothing half-merged passes for whole
        for name, place in factors.places(net.model).items():
            layer = net.model.get_submodule(name)
            assert isinstance(layer, factors.Factored)
            net.write(place.weight, moved(layer, net.model.get_parameter(place.weight)))
        net.restart(names[: stage + 1])
    fill(net, numbers)


def check_merges(net: Net, field: str) -> None:
    """ModelError, which names the field, for a net whose factors cannot be merged and begin anew."""
    layers = factors.places(net.model)
    if not layers:
        raise ModelError(f"{field}: only factors beside layers can be merged into weights, and this view has none")
    if net.personal:
        raise ModelError(f"{field}: goes with no model.view.keep: what stays at a client cannot go into all weights")
    if factors.head_of(net.model):
        raise ModelError(f"{field}: a classifier's view trains its head too, which cannot begin anew")
    for place in layers.values():
        try:
            net.base[place.weight]
        except ModelError as error:
            raise ModelError(f"{field}: weights are to change, and {error}") from None
