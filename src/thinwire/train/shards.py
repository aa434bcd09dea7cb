"""A model in shards over a client's processes while it trains: of weights, gradients and moments each holds a part.

torch's FSDP (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv:2304.11277): a layer's weights are whole
while the layer computes, and its gradients are summed into shards as they are made. Between visits each process has the
client's whole weights again, for those are what methods write, hash and send. While a visit's steps last the trained
ones have no other memory than their shards, in float32; so of N processes each needs a copy of the model in its own
dtype before and after, and 16 bytes a trained number divided by N during AdamW's steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from thinwire.model.errors import ModelError
from thinwire.train.kept import Kept
from thinwire.train.parallel import ask_shards, ranks, whole


class Spread:
    """The sharded twin of a model: `model`, and `weights`, float32, in the order of the parameters that it stands for.

    From its making to `gather` the parameters are without memory. Each method is called by all processes together.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """ModelError: the parameters are not the model's own, or of several dtypes."""
        self._parameters = parameters
        names = {id(p): name for name, p in model.named_parameters()}
        if not all(id(p) in names for p in parameters) or len({p.dtype for p in parameters}) != 1:
            raise ModelError("model.shards: what is trained has to be the model's own weights, of one dtype")
        self._mesh = init_device_mesh(parameters[0].device.type, (ranks()[1],))
        self.model = self._twin(model, {id(p) for p in parameters}, parameters[0].dtype)
        self.weights = [self.model.get_parameter(names[id(p)]) for p in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)

    def _twin(self, model: nn.Module, trained: set[int], dtype: torch.dtype) -> nn.Module:
        held = {id(p): p for p in model.parameters()}
        empty = {key: nn.Parameter(p.detach().to("meta"), p.requires_grad) for key, p in held.items()}
        twin = copy.deepcopy(model, dict(empty))
        ask_shards(twin, False)
        source = {id(stand_in): key for key, stand_in in empty.items()}
        made: dict[int, nn.Parameter] = {}
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in _units(twin):
            for module in unit.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if (key := source.get(id(parameter))) is None:  # sharded with a layer already
                        continue
                    if key not in made:
                        weight = held[key].detach()
                        made[key] = nn.Parameter(weight.float() if key in trained else weight, key in trained)
                    setattr(module, name, made[key])
            fully_shard(unit, mesh=self._mesh, mp_policy=policy)
            sharded = cast("FSDPModule", unit)
            sharded.set_gradient_divide_factor(1.0)  # a process's loss is its share of the batch's already
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
        return twin

    @torch.no_grad()
    def gather(self) -> None:
        """Give the parameters what their shards hold, rounded to their dtype."""
        for parameter, weight in zip(self._parameters, self.weights, strict=True):
            parameter.data = whole(weight).to(parameter.dtype)


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, laid out as `like` is."""
    assert isinstance(like, DTensor)
    there = tensor.to(like.device)
    found: Tensor = distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
    return found


def on_whole(adjust: Callable[[Sequence[Tensor]], None], weights: Sequence[Tensor]) -> None:
    """A hand on the weights that finds them whole, and their gradients, at each process: it may index and reduce."""
    wholes = [whole(weight.detach()) for weight in weights]
    for full, weight in zip(wholes, weights, strict=True):
        full.grad = None if weight.grad is None else whole(weight.grad)
    adjust(wholes)
    for full, weight in zip(wholes, weights, strict=True):
        weight.grad = None if full.grad is None else shard(full.grad, weight)


class KeptInShards(Kept):
    """Moments that are whole in the client's memory, and in shards while the steps last."""

    def restore(self, optimiser: torch.optim.Optimizer, weights: Sequence[Tensor]) -> int:
        taken = super().restore(optimiser, weights)
        for weight, held in optimiser.state.items():
            held.update({key: shard(moment, weight) for key, moment in held.items() if moment.shape == weight.shape})
        return taken

    def keep(self, optimiser: torch.optim.Optimizer, weights: Sequence[Tensor], steps: int) -> None:
        for held in optimiser.state.values():
            held.update({key: whole(moment).cpu() for key, moment in held.items()})
        super().keep(optimiser, weights, steps)


@contextmanager
def spread(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[Spread]:
    """A model's twin for the length of a block; behind it the parameters have memory, and what the twin has learnt.

    After an error they are undefined: processes that did not all fail could not agree on more.
    """
    twin = Spread(model, parameters)
    try:
        yield twin
    except BaseException:
        for parameter in parameters:
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        raise
    twin.gather()


def _units(model: nn.Module) -> list[nn.Module]:
    """What is whole at a time: each transformer layer, and the model with what is in none."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    within = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    return [*(layer for layer in layers if id(layer) not in within), model]
