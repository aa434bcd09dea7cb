"""What only a pass over a few tokens shows of a model: whether its positions see what follows them, and which of its
weights are read past the module that holds them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from thinwire.model.classifier import is_classifier
from thinwire.model.embedder import is_embedder
from thinwire.model.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH, CUT = 21, 13  # tokens of a row, and the first that is another one; odd, so that it lies at no chunk's edge
VIRTUAL = "virtual_tokens"  # of the transformer: what stands in front of every row, see views.virtual


@torch.no_grad()
def check_causal(model: PreTrainedModel, path: str) -> None:
    """Raise ModelError for a model whose logits depend on tokens that follow: it would be trained on what it reads.

    Three rows: one, one that ends otherwise, one that begins otherwise. What the ending changes before it is held
    against what the beginning changes behind it; rounding is below both that and a share of the logits.
    """
    tokens, other = tokens_of(model, LENGTH), tokens_of(model, LENGTH, 1)
    cut = len(tokens) * CUT // LENGTH
    if not 0 < cut < len(tokens) - 1:
        return  # a context of a token or two
    rows = [tokens, tokens[:cut] + other[cut:], other[: len(tokens) - cut] + tokens[len(tokens) - cut :]]
    try:
        logits = _forward(model, rows).float()
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"{path}: {type(model).__name__} cannot read a row of tokens: {first_line(error)}") from error
    if not torch.isfinite(logits).all():
        raise ModelError(f"{path}: the logits of {type(model).__name__} in {model.dtype} are not finite")
    ahead = (logits[0, :cut] - logits[1, :cut]).abs().max().item()
    behind = (logits[0, len(tokens) - cut :] - logits[2, len(tokens) - cut :]).abs().max().item()
    rounding = (1e-5 if model.dtype == torch.float32 else 2e-2) * logits.abs().max().item()
    if ahead > max(rounding, 0.02 * behind):
        raise ModelError(
            f"{path}: the positions of {type(model).__name__} see what follows them (another ending moves the logits "
            f"before it by {ahead:.2g}), so it is not causal: its loss would be of answers that it has read"
        )


@torch.no_grad()
def reads_of(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """The parameters that a forward pass reads past the modules that hold them, and those whose modules it calls.

    What is put in place of a module's weights, or added to its output, for the length of its call does not reach the
    first.
    """
    reads = _Reads(model)
    with ExitStack() as stack:
        reads.wrap(stack)
        with reads:
            _forward(model, [tokens_of(model, LENGTH)] * 2)
    return reads.past, reads.called


class _Reads(TorchFunctionMode):
    """Inside, notes which parameters are given to an operation while none of their modules is at work."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.owners = [(m, [id(p) for p in m.parameters(recurse=False)]) for m in model.modules()]
        self.at_work: Counter[int] = Counter()
        self.past: set[str] = set()
        self.called: set[str] = set()

    def wrap(self, stack: ExitStack) -> None:
        for module, own in self.owners:
            if own:
                before = vars(module).get("forward")
                module.forward = self._noted(module.forward, own)
                stack.callback(_put_back, module, before)

    def _noted(self, inner: Callable[..., Any], own: list[int]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.at_work.update(own)
            self.called.update(self.names[parameter] for parameter in own)
            try:
                return inner(*args, **kwargs)
            finally:
                self.at_work.subtract(own)

        return forward

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        # what gives no tensor, as a dtype or a shape, reads no weights
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.names and not self.at_work[id(leaf)]:
                    self.past.add(self.names[id(leaf)])
        return out


def _put_back(module: nn.Module, before: Any) -> None:
    if before is None:
        del module.forward  # the class's own method shows again
    else:
        module.forward = before


def tokens_of(model: PreTrainedModel, length: int, start: int = 0) -> list[int]:
    """Tokens that mean nothing special, as many as fit; from another start, another one everywhere."""
    config = model.config.get_text_config()
    rows: int = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    room = positions(model)
    spread = range(0, rows, max(1, rows // 97))
    plain = [token for token in spread if token not in special] or [0]
    return [plain[(start + i) % len(plain)] for i in range(length if room is None else min(length, room))]


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a row may have, behind a prompt that stands in front; None where the model sets no end."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:  # -1 is XLNet's word for no end
        return None
    embeddings = getattr(model.base_model, "embeddings", None)
    counted = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    # RoBERTa and its kin count positions from the one after the padding's
    room = found if counted is None else found - counted - 1
    front = getattr(model.base_model, VIRTUAL, None)
    return room if front is None else room - cast(int, front.count)


def _forward(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """The logits as training asks for them; of a model without a head each position's vector."""
    accepted = inspect.signature(model.forward).parameters
    ids = torch.tensor(rows, device=next(model.parameters()).device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    whole = is_embedder(model) or is_classifier(model)  # positions are then the model's own affair
    if "position_ids" in accepted and not whole:
        options["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
    if "use_cache" in accepted:
        options["use_cache"] = False
    out = model(input_ids=ids, **options)
    found: Tensor = out.last_hidden_state if is_embedder(model) else out.logits
    return found
