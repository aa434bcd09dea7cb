"""The two-sided probe L(w + eps z), L(w - eps z), which never writes to the weights.

Each module that owns parameters computes with perturbed ones for the length of its own forward pass. Where the law is
low-rank, a linear layer or an embedding adds the perturbation to its output, x B A^T, and no copy of a weight is made;
everything else is given perturbed copies in one buffer that all modules share, and its own tensors back just after. So
the weights are bit-identical after a probe in every dtype, and the memory above plain inference is that of the largest
single module, or less. It rests on a parameter being used only within the forward pass of a module that owns it: what
does not keep to this, `check` refuses before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thinwire.data.batch import Batch, Example, collate
from thinwire.model import classifier, embedder
from thinwire.model.errors import ModelError, first_line
from thinwire.model.net import Net
from thinwire.model.trial import reads_of, tokens_of
from thinwire.perturb.directions import Directions
from thinwire.train.objective import example_losses, losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Probe:
    """A context in which `losses` may be called; leaving it removes every trace from the model.

    `together`: the rows of a batch pass once for each sign and direction, in one forward pass that so much more
    memory, instead of in a pass of their own. The losses are then the same up to the rounding of matrix products.
    """

    def __init__(self, net: Net, directions: Directions, together: bool = False) -> None:
        self.net, self.directions, self.together = net, directions, together
        self._names = {id(parameter): name for name, parameter in net.parameters()}
        self._added = _ADDED if directions.law == "lowrank" else {}
        self._steps: list[tuple[int, float]] = []  # (seed, step) of each group of rows in the present pass
        self._scales = torch.ones(0)  # of each group's added outputs: its step over sqrt(r)
        self._rows, self._met = 0, set[str]()
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}  # of the directions of the present pass, by parameter
        self._factors_of: list[int] = []
        self._stack = ExitStack()
        owners = [(module, self._own(module)) for module in net.model.modules()]
        self._owners = [(module, own) for module, own in owners if own]
        if together and any(any(module.children()) for module, _ in self._owners):
            raise ValueError("method.together: a module of this model holds both parameters and modules")
        # Modules that hold others keep their copies while those run, so only the leaves can share buffers.
        self._scratch: Tensor | None = None

    def _own(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters(recurse=False) if id(p) in self._names]

    def __enter__(self) -> Probe:
        for module, own in self._owners:
            inner = module.forward
            module.forward = self._outer(module, own, inner)
            # an instance attribute shadows the class's method, unless there was one before
            self._stack.callback(_restore, module, inner)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self._stack.close()

    def losses(self, batch: Batch, seeds: Sequence[int], eps: float, sides: int = 2) -> list[tuple[float, float]]:
        """(L(w + eps z), L(w - eps z)) for direction z of each seed; not finite where the model's loss is not.

        sides=1: (L(w + eps z), L(w)), the latter measured once.
        """
        steps = [(seed, sign * eps) for seed in seeds for sign in (1, -1)]
        if sides == 1:
            steps = [*((seed, eps) for seed in seeds), (seeds[0], 0.0)]
        found = [value for part in self._passes(losses, batch, steps) for value in part.tolist()]
        if sides == 1:
            return [(plus, found[-1]) for plus in found[:-1]]
        return list(zip(found[::2], found[1::2], strict=True))

    def pairs(self, batch: Batch, seeds: Sequence[int], eps: float) -> Tensor:
        """The same of each example, as train.objective.example_losses has it: float64 [seeds, 2, examples]."""
        steps = [(seed, sign * eps) for seed in seeds for sign in (1, -1)]
        parts = self._passes(example_losses, batch, steps)
        return torch.cat([part.double().cpu() for part in parts]).view(len(seeds), 2, batch.examples)

    @torch.no_grad()
    def _passes(
        self, measure: Callable[[Any, Batch, int], Tensor], batch: Batch, steps: list[tuple[int, float]]
    ) -> list[Tensor]:
        """What is measured at each (seed, step) in turn, [sides, ...] for the sides of one pass."""
        self._rows = len(batch.input_ids)
        found: list[Tensor] = []
        for group in [steps] if self.together else [[step] for step in steps]:
            self._steps = group
            self._scales = torch.tensor([step for _, step in group]).view(-1, 1, 1) / self.directions.rank**0.5
            self._draw([seed for seed, _ in group])
            found.append(measure(self.net.model, batch, len(group)))
        if len(self._met) < len(self._names):
            missed = sorted(set(self._names.values()) - self._met)
            raise RuntimeError(f"no forward pass met {missed[0]} (of {len(missed)}): this model cannot be probed")
        return found

    def _outer(self, module: nn.Module, own: list[nn.Parameter], inner: Callable[..., Any]) -> Callable[..., Any]:
        added = self._added.get(type(module))

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._met.update(self._names[id(p)] for p in own)
            if added is not None or len(self._steps) > 1:
                args = tuple(map(self._for_each_row, args))
            if added is not None:
                return self._add(module, own, added, inner(*args, **kwargs), *args, **kwargs)
            if len(self._steps) == 1:
                return self._swapped(module, own, inner, *self._steps[0], args, kwargs)
            groups = [_group(args, kwargs, g, len(self._steps), self._rows) for g in range(len(self._steps))]
            parts = [
                self._swapped(module, own, inner, *step, *group)
                for step, group in zip(self._steps, groups, strict=True)
            ]
            return torch.cat(parts)

        return forward

    def _swapped(
        self,
        module: nn.Module,
        own: list[nn.Parameter],
        inner: Callable[..., Any],
        seed: int,
        step: float,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The module's forward pass on perturbed copies of its parameters."""
        weights = [p.data for p in own]
        room = self._room(own) if not any(module.children()) else None
        offset = 0
        try:
            for parameter, weight in zip(own, weights, strict=True):
                out = None
                if room is not None and (weight.dtype, weight.device) == (room.dtype, room.device):
                    out = room[offset : offset + weight.numel()].view(weight.shape)
                    offset += weight.numel()
                name = self._names[id(parameter)]
                parameter.data = self.directions.apply(weight, name, [seed], [step], out=out)
            return inner(*args, **kwargs)
        finally:
            for parameter, weight in zip(own, weights, strict=True):
                parameter.data = weight

    def _for_each_row(self, value: Any) -> Any:
        """What a model gives once for all rows, such as the numbers of positions: to each group it means another."""
        rows = len(self._steps) * self._rows
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == 1 < rows:
            return value.expand(rows, *value.shape[1:])
        return value

    def _room(self, own: list[nn.Parameter]) -> Tensor:
        """The shared buffer, as large as the largest leaf so far has needed."""
        size = sum(p.numel() for p in own)
        there = self._scratch
        if there is None or there.numel() < size or there.device != own[0].device:  # a model may span several GPUs
            there = self._scratch = torch.empty(size, dtype=own[0].dtype, device=own[0].device)
        return there

    def _add(self, module: nn.Module, own: list[nn.Parameter], added: Added, out: Tensor, x: Tensor) -> Tensor:
        """out + step z(x) for each group of rows: float [rows, ..., width] as out is, which is written in place."""
        groups = len(self._steps)
        if len(x) != groups * self._rows:
            raise RuntimeError(f"{type(module).__name__} was given {len(x)} rows, not {groups} x {self._rows}")
        y = out.view(groups, -1, out.shape[-1])
        for parameter in own:
            name = self._names[id(parameter)]
            if parameter.dim() == 1:  # a bias
                for g, (seed, step) in enumerate(self._steps):
                    y[g].add_(self.directions.direction(name, parameter.shape, seed).to(y), alpha=step)
                continue
            left, right = (factor.to(y) for factor in self._factors[name])
            rows = x.reshape(groups, -1, *x.shape[x.dim() - x.is_floating_point() :])
            added(rows, left, right * self._scales.to(y), y)
        return out

    def _draw(self, seeds: list[int]) -> None:
        """The factors of all matrices whose perturbation is added to an output; they serve both signs of a direction.

        In one piece of memory: many small ones that stay would keep an allocator from giving room back in between.
        """
        if not self._added or seeds == self._factors_of:
            return
        matrices = {
            self._names[id(p)]: p.shape
            for module, own in self._owners
            if type(module) in self._added
            for p in own
            if p.dim() > 1
        }
        sizes = [self.directions.rank * (shape.numel() // shape[-1] + shape[-1]) for shape in matrices.values()]
        places = torch.split(torch.empty(sum(sizes) * len(seeds)), [size * len(seeds) for size in sizes])
        self._factors_of = seeds
        self._factors = {
            name: self.directions.factors(name, shape, seeds, place.view(-1, len(seeds)))
            for (name, shape), place in zip(matrices.items(), places, strict=True)
        }


Added = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def _linear(x: Tensor, left: Tensor, right: Tensor, y: Tensor) -> None:
    """y += (x B) A^T: x [groups, n, in], A = left [groups, out, r], B = right [groups, in, r]."""
    _added(torch.bmm(x, right), left.transpose(1, 2), y)


def _transposed(x: Tensor, left: Tensor, right: Tensor, y: Tensor) -> None:
    """The same for a layer that holds [in, out]."""
    _linear(x, right, left, y)


def _embedding(ids: Tensor, left: Tensor, right: Tensor, y: Tensor) -> None:
    """y += A[ids] B^T: ids [groups, n]."""
    picked = torch.stack([table[row] for table, row in zip(left, ids, strict=True)])
    _added(picked, right.transpose(1, 2), y)


def _added(u: Tensor, v: Tensor, y: Tensor) -> None:
    """y += u v, in place; at rank one by elements, which takes half the time of a product with one inner element."""
    if u.shape[-1] == 1:
        y.addcmul_(u, v)
    else:
        y.baddbmm_(u, v)


# by exact type: a subclass may do more with its weight than this
_ADDED: dict[type[nn.Module], Added] = {nn.Linear: _linear, Conv1D: _transposed, nn.Embedding: _embedding}


def check(net: Net, directions: Directions, together: bool, method: str) -> None:
    """Raise ModelError, which names the method, for a net whose probes would not be L(w + eps z), or cannot be made.

    Its forward pass reads a perturbed parameter past its module; or, where outputs are perturbed or several sides pass
    together, the losses of a few tokens are then others than with perturbed weights, one side at a time.
    """
    check_read(net.model, net.names, method)
    if not together and directions.law != "lowrank":
        return
    row, classifies = tuple(tokens_of(net.model, 8)), classifier.is_classifier(net.model)
    rows = [(row, ()), (row[::-1], ())] if classifies else [(row[:-3], row[-3:]), (row[:1:-1], row[:2])]
    scale = 20.0 if embedder.is_embedder(net.model) else None
    batch = collate([Example(*each, choice=0) for each in rows], 0, [(), ()] if classifies else None, scale=scale)
    try:
        with Probe(net, directions, together) as probe:
            found = probe.losses(batch, [0], 0.02)[0]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        field, value = ("method.together", "true") if together else ("method.law", '"lowrank"')
        why = first_line(error).removeprefix(f"{field}: ")
        raise ModelError(f"{field}: {method} with {field[7:]} = {value} cannot probe this model: {why}") from error
    by_weights = Probe(net, directions)
    by_weights._added = {}
    with by_weights:
        right = by_weights.losses(batch, [0], 0.02)[0]
    close = 1e-3 if net.dtype == torch.float32 else 0.1
    if not all(math.isclose(a, b, rel_tol=close) for a, b in zip(found, right, strict=True) if math.isfinite(b)):
        raise ModelError(
            f"method: {method} finds {found[0]:g} and not {right[0]:g} for the loss of this model beside it"
        )


def check_read(model: PreTrainedModel, names: Iterable[str], method: str) -> None:
    """Raise ModelError where a forward pass reads one of the parameters past the module that holds it, or not."""
    past, called = reads_of(model)
    if found := [name for name in names if name in past or name not in called]:
        raise ModelError(
            f"method: {method} perturbs the weights of a layer while it is called, and {type(model).__name__} does not "
            f"call the layer of {found[0]} ({len(found)} such weights); fedavg trains such a model"
        )


def _group(
    args: tuple[Any, ...], kwargs: dict[str, Any], g: int, groups: int, rows: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of group g: its rows of every tensor that has the rows of all groups."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == groups * rows:
            return value[g * rows : (g + 1) * rows]
        return value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def _restore(module: nn.Module, forward: Callable[..., Any]) -> None:
    if getattr(type(module), "forward", None) is getattr(forward, "__func__", None):
        del module.forward  # the class's own method shows again
    else:
        module.forward = forward
