"""Virtual tokens in front of every row that a model reads: in training, in scores and in generation alike.

A row gets as many tokens that mean nothing where its first token stood, and the hooks below put the trained rows in
their places: the first layer's where the embedding has been looked up, a deeper layer's where that layer begins. So
masks, positions and whatever else a model makes of token numbers are those of a row that is so much longer, wherever
its padding is; and logits of the places in front are cut away, so that who calls the model sees rows as they were. A
pass that goes on from a cache finds the places in there, and gets no second ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thinwire.model.errors import ModelError
from thinwire.model.trial import VIRTUAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHES = ("past_key_values", "cache_params", "state", "mems")  # what models call what they go on from
IGNORE = -100


class Front(nn.Module):
    """The rows that one layer finds in front: [tokens, width]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, rows: Tensor) -> Tensor:
        """The same in front of each of `rows`, a column of what is theirs: [rows, tokens, width]."""
        return self.weight.repeat(len(rows), 1, 1)  # a copy: a probe takes the memory of its weights back


class Virtual(nn.Module):
    """The fronts of layer 0 (behind the embedding) and, of a deep prompt, of the others; `present`: unless put aside.

    `filler` is the token that stands in their places.
    """

    def __init__(self, weights: Sequence[Tensor], filler: int) -> None:
        super().__init__()
        self.count, self.filler, self.present = weights[0].shape[0], filler, True
        for layer, weight in enumerate(weights):
            self.add_module(str(layer), Front(weight))
        self._starts: Tensor | None = None  # of the pass that is on, where each row's front begins; None: it has none
        self._length = 0

    def stand_before(self, model: PreTrainedModel, layers: str | None) -> None:
        """Become the model's, and that of the layers in its list at `layers` where each has a front of its own."""
        setattr(model.base_model, VIRTUAL, self.eval())
        embedding: Any = model.get_input_embeddings()
        model.register_forward_pre_hook(self.enter, with_kwargs=True)
        model.register_forward_hook(self.leave, with_kwargs=True)
        embedding.register_forward_hook(self.embedded)
        stack: Any = [] if layers is None else model.get_submodule(layers)
        for layer, module in enumerate(stack):
            if layer:
                module.register_forward_pre_hook(partial(self.below, layer), with_kwargs=True)

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What a forward pass of the model begins with: its arguments for the longer rows."""
        self._starts = None
        if not self.present:
            return args, kwargs
        given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        if given.get("input_ids") is None:
            raise ModelError("model.view: a prompt stands in front of tokens, and not of embeddings in their place")
        ids, mask, positions = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
        real = torch.ones_like(ids) if mask is None else mask
        starts = (real.cumsum(1) == 0).sum(1, keepdim=True)  # after what is padding
        if mask is not None:
            given["attention_mask"] = self._longer(mask, starts, 1)
        if any(_holds_something(given.get(name)) for name in CACHES):
            if positions is not None:
                given["position_ids"] = positions + self.count
            return (), given
        if positions is not None:
            if mask is None and bool((positions[:, 1:] == 0).any()):
                raise ModelError("data.pack: a prompt stands in front of a row, and not of each example; leave it out")
            counted = torch.arange(self.count, device=positions.device)
            given["position_ids"] = self._longer(positions + self.count * (real > 0), starts, counted)
        for name, fill in (("input_ids", self.filler), ("token_type_ids", 0), ("labels", IGNORE)):
            tensor = given.get(name)
            if isinstance(tensor, Tensor) and tensor.shape == ids.shape:
                given[name] = self._longer(tensor, starts, fill)
        if isinstance(given.get("logits_to_keep"), Tensor):
            given["logits_to_keep"] = given["logits_to_keep"] + self.count
        self._starts, self._length = starts, ids.shape[1] + self.count
        return (), given

    def embedded(self, embedding: nn.Module, args: Any, out: Tensor) -> Tensor:
        """What the embedding gives, with the first layer's front in its places."""
        return out if self._starts is None or out.shape[1] != self._length else self._placed(0, out)

    def below(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A deeper layer's arguments, with its own front in the places."""
        if self._starts is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[:2] != (len(self._starts), self._length):
            raise ValueError(f"layer {layer} is given {list(hidden.shape)}, and not rows of {self._length} tokens")
        hidden = self._placed(layer, hidden)
        return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})

    def leave(self, model: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """What the pass gives, without logits of the places in front."""
        if self._starts is not None and out.logits.ndim == 3 and out.logits.shape[1] == self._length:
            out.logits = out.logits[:, self.count :]  # behind the padding all places are moved by as many
        self._starts = None
        return out

    def _longer(self, tensor: Tensor, starts: Tensor, fill: Tensor | int) -> Tensor:
        """[rows, n + count]: what is in front is `fill`, a number or one for each place."""
        within = torch.arange(tensor.shape[1] + self.count, device=tensor.device) - starts
        places = torch.where(within < 0, within, within - self.count) + starts
        filled = fill[within.clamp(0, self.count - 1)] if isinstance(fill, Tensor) else torch.full_like(within, fill)
        inside = (within >= 0) & (within < self.count)
        own = tensor.expand(len(starts), -1).gather(1, places.clamp(min=0))
        return torch.where(inside, filled.to(tensor.dtype), own)

    def _placed(self, layer: int, hidden: Tensor) -> Tensor:
        assert self._starts is not None
        starts = self._starts.to(hidden.device)
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        front = self.get_submodule(str(layer))(starts).to(hidden)
        return hidden.index_put((rows, starts + torch.arange(self.count, device=hidden.device)), front)


def of(model: PreTrainedModel) -> Virtual | None:
    """The model's, if there is one in front."""
    found: Virtual | None = getattr(model.base_model, VIRTUAL, None)
    return found


def _holds_something(cache: Any) -> bool:
    """Whether a pass goes on from it."""
    if cache is None:
        return False
    try:
        return bool(cache.get_seq_length() > 0)
    except (AttributeError, ValueError):  # recurrent states count no tokens
        seen = getattr(cache, "has_previous_state", None)
        return bool(seen()) if callable(seen) else True
