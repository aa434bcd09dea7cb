"""The training loss of a batch, from the logits of the positions that count, or from the texts' vectors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.data.batch import IGNORE, Batch, Example, collate, collate_packed
from thinwire.model.autocast import passes

# about as many logits are float32 at a time: what a CPU's cache holds; a GPU has that memory, and launches cost it more
_TILE, _TILE_ELSEWHERE = 1 << 20, 1 << 26


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch: float32 scalar, differentiable.

    Open answers: the cross-entropy averaged over the tokens that count, 0 where none does. A closed set of
    answers: the cross-entropy of the right one over the candidates' scores, averaged over the examples. Preferences:
    -log sigmoid(beta (margin - reference)) averaged over the examples (DPO: Rafailov et al. 2023, arXiv:2305.18290).
    Pairs: the mean of `contrasts` over the batch's examples.
    """
    return losses(model, batch, 1)[0]


def losses(model: nn.Module, batch: Batch, groups: int) -> Tensor:
    """The batch's loss in one forward pass over its rows `groups` times, one after the other: float32 [groups].

    All are the same unless the model treats the groups differently, as a probe makes it do. Of a closed set of answers
    and of preferences they are the means of `example_losses`; open answers count by their tokens. Pairs: each group's
    examples are told apart from those of their own group alone.
    """
    if batch.kind == "pair":
        found = embeddings(model, batch.repeated(groups)).unflatten(0, (groups, batch.examples, batch.candidates))
        return torch.stack([contrasts(each, batch.scale).mean() for each in found])
    if batch.kind not in ("open", "packed"):
        return example_losses(model, batch, groups).mean(1)
    many = batch.repeated(groups)
    losses, counted = _each_token(model, many)
    if batch.seen is not None:
        _show(batch, _each_example(many, losses, counted).view(groups, -1))
    sums, counts = losses.sum(1), counted.sum(1)
    return sums.view(groups, -1).sum(1) / counts.view(groups, -1).sum(1).clamp(min=1)


def example_losses(model: nn.Module, batch: Batch, groups: int = 1) -> Tensor:
    """Each example's own loss, which no other example of the batch has a part in: float32 [groups, examples].

    Of an open answer the mean over its tokens that count, 0 where none does. Groups as for `losses`. ValueError: of
    preferences whose reference has not been measured, and of pairs, which have no such loss.
    """
    if batch.kind == "pair":
        raise ValueError("a pair's loss depends on the others of its batch")
    many = batch.repeated(groups)
    if many.choice is not None:
        found = scores(model, many)
        each = F.cross_entropy(found, many.choice.to(found.device), reduction="none").view(groups, -1)
    elif many.kind == "preference":
        if many.reference is None:
            raise ValueError("preferences without the start model's reference")
        found = margins(model, many)
        each = F.softplus(-many.beta * (found - many.reference.to(found.device))).view(groups, -1)
    else:
        each = _each_example(many, *_each_token(model, many)).view(groups, -1)
    _show(batch, each)
    return each


def _show(batch: Batch, each: Tensor) -> None:
    """Give the examples' losses, the mean over groups, to who wants to see them: see Batch."""
    if batch.seen is not None:
        batch.seen(each.detach().float().mean(0).cpu())


def _each_example(many: Batch, losses: Tensor, counted: Tensor) -> Tensor:
    """The mean loss of each example's tokens that count, 0 where none does."""
    if many.kind == "open":
        sums, counts = losses.sum(1), counted.sum(1)
    else:  # an example begins where the positions begin again
        begins = (many.position_ids == 0) & many.attention_mask.bool()
        number = (begins.flatten().cumsum(0) - 1).clamp(min=0).view(begins.shape).to(losses.device)
        # a loss stands at its label, and labels reach back from the last position
        number = number[:, number.shape[1] - losses.shape[1] :].flatten()
        sums, counts = (
            torch.zeros(many.examples, dtype=values.dtype, device=values.device).index_add(0, number, values.flatten())
            for values in (losses, counted.long())
        )
    return sums / counts.clamp(min=1)


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """The score of each candidate: float32 [examples, candidates], higher is likelier.

    A score is the sum of the log-probabilities of the candidate's tokens. Where each candidate is one token,
    the log-probabilities are taken among the candidates alone: that shifts a row's scores by one number,
    which changes neither their order nor their softmax, and leaves the whole vocabulary out. A classifier's scores are
    the log-probabilities of its classes.
    """
    if batch.kind == "class":
        return F.log_softmax(_class_logits(model, batch).float(), dim=-1)
    if batch.kind == "token":
        assert batch.candidate_ids is not None
        last = _logits(model, batch, 1)[:, -1]
        return F.log_softmax(last[:, batch.candidate_ids.to(last.device)].float(), dim=-1)
    sums, _ = token_losses(model, batch)
    return -sums.view(batch.examples, batch.candidates)


def margins(model: nn.Module, batch: Batch) -> Tensor:
    """Of preferences: the log-probability of the chosen answer less that of the rejected one, float32 [examples]."""
    chosen, rejected = scores(model, batch).unbind(1)
    return chosen - rejected


def embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """Of each row the mean of its tokens' vectors, of length 1: float32 [rows, width]."""
    device = next(model.parameters()).device
    mask = batch.attention_mask.to(device)
    with passes(model, device):
        hidden = model(input_ids=batch.input_ids.to(device), attention_mask=mask).last_hidden_state.float()
    counted = mask.to(hidden).unsqueeze(-1)
    return F.normalize((hidden * counted).sum(1) / counted.sum(1), dim=-1)


def contrasts(found: Tensor, scale: float) -> Tensor:
    """The loss of each pair among all of them: float32 [examples].

    found: vectors of length 1 [examples, texts, width], of each an anchor, its positive and maybe a negative. The
    cross-entropy of an anchor's own positive over `scale` times its cosines with all positives and negatives (InfoNCE:
    van den Oord et al. 2018, arXiv:1807.03748; MultipleNegativesRankingLoss: Henderson et al. 2017, arXiv:1705.00652).
    """
    anchors, others = found[:, 0], found[:, 1:].transpose(0, 1).flatten(0, 1)  # all positives, then all negatives
    own = torch.arange(len(found), device=found.device)
    return F.cross_entropy(scale * anchors @ others.T, own, reduction="none")


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """For each row, the sum of its tokens' cross-entropies (float32 [rows]) and how many count (int64 [rows]).

    A label counts unless it is IGNORE, or its token is the first of its row: nothing precedes it.
    """
    losses, counted = _each_token(model, batch)
    return losses.sum(1), counted.sum(1)


def _each_token(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The cross-entropies of the labels, 0 where one does not count (float32 [rows, width]), and whether it does."""
    length = batch.input_ids.shape[1]
    width = min(batch.labels.shape[1], length - 1)
    logits = _logits(model, batch, width, before=1)
    labels = batch.labels[:, batch.labels.shape[1] - width :]
    preceded = batch.attention_mask[:, length - 1 - width : length - 1].bool()
    labels = labels.masked_fill(~preceded, IGNORE).to(logits.device)
    return cross_entropies(logits.flatten(0, 1), labels.flatten()).view(labels.shape), labels != IGNORE


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Each row's cross-entropy in float32 [rows], 0 where the label is IGNORE; differentiable once.

    logits: any float dtype [rows, vocabulary]; labels: int64 [rows]. What `F.cross_entropy(logits.float(), ...)` gives,
    to the bit, and its gradient; but a tile of rows is float32 at a time, where that would keep three such matrices.
    """
    losses: Tensor = _CrossEntropies.apply(logits, labels)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropies(torch.autograd.Function):
    """The softmax is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return torch.cat([_of_tile(*tile) for tile in _tiles(logits, labels)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        found = torch.empty_like(logits)
        for part, own, above, out in _tiles(logits, labels, gradient, found):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                losses = _of_tile(leaf, own)
            out.copy_(torch.autograd.grad(losses, leaf, above)[0])
        return found, None


def _of_tile(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, a few at a time; the first one is the widest."""
    widest = tensors[0]
    rows = max(1, (_TILE if widest.device.type == "cpu" else _TILE_ELSEWHERE) // widest.shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


@torch.inference_mode()
def keeps_apart(model: nn.Module, first: Example, second: Example) -> bool:
    """Whether the loss of `second`, packed behind `first`, is what it is alone, and whatever `first` holds.

    transformers builds a block-diagonal mask from positions that begin again; a model that ignores them would let one
    example see another, and report nothing.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    tokens = (*first.prompt, *first.answer)
    unlearnt, other = (replace(first, prompt=ids, answer=()) for ids in (tokens, second.answer[:1] * len(tokens)))
    alone = token_losses(model, collate([second], 0))[0].item()
    behind, disturbed = (token_losses(model, collate_packed([[e, second]], 0))[0].item() for e in (unlearnt, other))
    return math.isclose(behind, disturbed, rel_tol=1e-6) and math.isclose(behind, alone, rel_tol=1e-2)


def _class_logits(model: nn.Module, batch: Batch) -> Tensor:
    """A classifier's logits [rows, classes]. Positions are the model's own affair: some begin to count above 0."""
    device = next(model.parameters()).device
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with passes(model, device):
        logits: Tensor = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), **options
        ).logits
    return logits


def _logits(model: nn.Module, batch: Batch, count: int, before: int = 0) -> Tensor:
    """The logits [rows, count, vocabulary] of the last `count` positions, or of those that end `before` earlier.

    Left padding puts every answer at the end, so one range of positions serves all rows and the head, the
    widest matrix of a small model, sees no others; a model that cannot keep a range computes all, and they
    are cut here.
    """
    device = next(model.parameters()).device
    length = batch.input_ids.shape[1]
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if batch.kind != "packed":  # else position_ids has it all, and a mask would hide it from the model
        options["attention_mask"] = batch.attention_mask.to(device)
    if "position_ids" in accepted:  # models without positions (ALiBi) have no such argument
        options["position_ids"] = batch.position_ids.to(device)
    if "use_cache" in accepted:
        options["use_cache"] = False
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = torch.arange(length - before - count, length - before, device=device)
    with passes(model, device):
        logits: Tensor = model(input_ids=batch.input_ids.to(device), **options).logits
    if logits.shape[1] != count:
        logits = logits[:, length - before - count : length - before]
    return logits
