"""A net's parameters in blocks that train in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.model.anatomy import Layout
from thinwire.model.blocks import blocks_of, layer_of, layers_of
from thinwire.model.classifier import is_classifier
from thinwire.model.errors import ModelError
from thinwire.model.net import Net


@dataclass(frozen=True)
class Blocks:
    """Where a model's layers are; each block's run of them; what trains in each turn, extra blocks last, and in all."""

    layout: Layout
    layers: tuple[tuple[int, ...], ...]
    names: tuple[tuple[str, ...], ...]
    each: frozenset[str] = frozenset()

    @classmethod
    def whole(cls, net: Net, place: str | None) -> Blocks:
        """One block of all of the net; ModelError where it has no layers at `place`, or none are found."""
        layout = Layout.of(net.model, layers_of(net.model, place))
        return cls(layout, (tuple(range(len(layout.layers))),), (net.names,))

    @classmethod
    def of(cls, net: Net, place: str | None, count: int, common: int, extra: Sequence[str]) -> Blocks:
        """Of the net's parameters; ModelError where it has no layers, or fewer than there are to be blocks."""
        path = layers_of(net.model, place)
        layout = Layout.of(net.model, path)
        depth, of = len(layout.layers), {name: layer_of(name, path) for name in net.names}
        try:
            runs = tuple(tuple(run) for run in blocks_of(depth, count))
        except ValueError as error:
            raise ModelError(f"method.blocks: {error}") from None
        first = next(i for i, name in enumerate(net.names) if of[name] is not None)
        after = tuple(name for name in net.names[first:] if of[name] is None)
        if common > count:
            raise ModelError(f"method.common: there are {count} blocks, not {common}")
        head = {*after} if is_classifier(net.model) else set[str]()
        last = {layer for run in runs[len(runs) - common :] for layer in run}
        each = frozenset(head).union(name for name in net.names if of[name] in last)
        blocks = [{name for name in net.names if of[name] in run} for run in runs]
        for part in extra:
            if part == "head" and head:
                raise ModelError("method.extra: a classifier's head trains with every block, and is none of its own")
            before = tuple(name for name in net.names[:first] if of[name] is None)
            if not (own := before if part == "embeddings" else after):
                raise ModelError(f"method.extra: the model has no parameters that are its {part} alone")
            blocks.append({*own})
        names = tuple(tuple(name for name in net.names if name in own or name in each) for own in blocks)
        return cls(layout, runs, names, each)

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len(self.layout.layers)

    def layer(self, name: str) -> int | None:
        """Which layer a parameter belongs to."""
        return layer_of(name, self.layout.path)

    def trained(self, block: int) -> set[int]:
        """The layers that train in a block's turn."""
        return {layer for name in self.names[block] if (layer := self.layer(name)) is not None}
