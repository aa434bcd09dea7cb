"""Tokenised examples and the batches made of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from thinwire.data.lfr import Learnt
from thinwire.keys import Key

IGNORE = -100  # the label of a position that does not count in the loss
WINDOW = 8  # batches among which examples are sorted by length
Kind = Literal["open", "choice", "token", "class", "packed", "preference", "pair"]


@dataclass(frozen=True)
class Example:
    """One row after the prompt template and the tokenizer.

    `choice` is the index of the right answer among the data set's closed set of answers, None where answers are open.
    `references` are all answers that a score may accept; the first is the one trained on.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    choice: int | None = None
    references: tuple[str, ...] = ()
    text: str = ""  # the rendered prompt, for people
    place: str = field(default="", compare=False)  # file and line of the row
    rejected: tuple[int, ...] = ()  # of a preference: the answer that `answer` was preferred to
    # of a preference: by how much likelier the start model takes `answer` to be, in nats; None before it is measured
    reference: float | None = None
    apart: bool = False  # of a pair: anchor, positive and negative (in `prompt`, `answer`, `rejected`) are read apart

    def __len__(self) -> int:
        if self.apart:
            return max(len(self.prompt), len(self.answer), len(self.rejected))
        return len(self.prompt) + max(len(self.answer), len(self.rejected))


@dataclass(frozen=True)
class Batch:
    """Left-padded tokens whose answers all end at the last position.

    input_ids, attention_mask, position_ids: int64 [rows, length]. labels: int64 [rows, answer], the targets of the last
    `answer` positions of input_ids, IGNORE where nothing counts. What the rows are is its `kind`:

    open: an example each, with its answer; candidates is 1, choice None.
    choice: one for each (example, candidate), candidates fastest, `candidates` of them; `choice` is int64 [examples].
    token: each candidate is one token, and `candidate_ids` int64 [candidates] has them: a bare prompt for each example,
    labels int64 [rows, 0].
    class: candidates are a classifier's classes, without tokens: a bare text for each example, padded on the right.
    packed: several open examples, one after the other, and labels reaches back to the first answer of any row.
    position_ids begins at 0 with each example, and with the padding: by that alone a model must keep the examples of a
    row apart, so attention_mask, which distinguishes padding from tokens, is not for the model.
    preference: two candidates an example, the answer that was chosen and then the one that was rejected; `reference`,
    float32 [examples], is what the start model has for their difference, and `beta` what the loss multiplies by.
    pair: `candidates` texts an example, without labels and padded on the right: an anchor, its positive and, of all or
    none, a negative; `scale` is what the loss multiplies their cosines by.
    """

    kind: Kind

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    examples: int
    candidates: int = 1
    choice: Tensor | None = None
    candidate_ids: Tensor | None = None
    reference: Tensor | None = None
    beta: float = 0.0
    scale: float = 0.0
    # is given each example's own loss, float32 [examples], by whoever computes it
    seen: Callable[[Tensor], None] | None = field(default=None, compare=False)

    def repeated(self, times: int) -> Batch:
        """The batch's rows `times` times over."""
        if times == 1:
            return self
        return replace(
            self,
            input_ids=self.input_ids.repeat(times, 1),
            attention_mask=self.attention_mask.repeat(times, 1),
            position_ids=self.position_ids.repeat(times, 1),
            labels=self.labels.repeat(times, 1),
            examples=self.examples * times,
            choice=None if self.choice is None else self.choice.repeat(times),
            reference=None if self.reference is None else self.reference.repeat(times),
        )


def collate(
    examples: Sequence[Example],
    pad: int,
    candidates: Sequence[tuple[int, ...]] | None = None,
    beta: float | None = None,
    scale: float | None = None,
) -> Batch:
    """One batch of the examples; with `candidates` (the tokens of each closed answer) it scores those answers.

    With `beta` the examples are preferences, with `scale` pairs.
    """
    kind: Kind = "open"
    choice, single, reference = None, None, None
    rows = [(e.prompt, e.answer) for e in examples]
    if candidates is not None:
        choice = torch.tensor([e.choice for e in examples], dtype=torch.int64)
        kind = "class" if not any(candidates) else "token" if {*map(len, candidates)} == {1} else "choice"
        if kind == "token":
            single = torch.tensor([tokens[0] for tokens in candidates], dtype=torch.int64)
        rows = [(e.prompt, tokens) for e in examples for tokens in (candidates if kind == "choice" else [()])]
    elif scale is not None:
        kind, rows = "pair", [(tokens, ()) for e in examples for tokens in (e.prompt, e.answer, e.rejected) if tokens]
    elif beta is not None:
        kind, rows = "preference", [(e.prompt, tokens) for e in examples for tokens in (e.answer, e.rejected)]
        known = [e.reference for e in examples if e.reference is not None]
        reference = torch.tensor(known) if len(known) == len(examples) else None
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    width = max(len(answer) for _, answer in rows)
    input_ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    attention = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    for i, (prompt, answer) in enumerate(rows):
        tokens = (*prompt, *answer)
        start = 0 if kind in ("class", "pair") else length - len(tokens)  # encoders look at the first token
        input_ids[i, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        attention[i, start : start + len(tokens)] = 1
        if answer:
            labels[i, width - len(answer) :] = torch.tensor(answer, dtype=torch.int64)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    count = len(candidates) if candidates is not None else len(rows) // len(examples)
    parts = (input_ids, attention, positions, labels)
    return Batch(kind, *parts, len(examples), count, choice, single, reference, beta or 0.0, scale or 0.0)


def collate_packed(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    """One batch whose rows hold several examples of open answers each."""
    length = max(sum(map(len, row)) for row in rows)
    width = max(sum(map(len, row)) - len(row[0].prompt) for row in rows)
    input_ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    attention = torch.zeros((len(rows), length), dtype=torch.int64)
    positions = torch.arange(length).repeat(len(rows), 1)
    labels = torch.full((len(rows), length), IGNORE, dtype=torch.int64)
    for i, row in enumerate(rows):
        at = length - sum(map(len, row))
        attention[i, at:] = 1
        for example in row:
            answer, end = at + len(example.prompt), at + len(example)
            input_ids[i, at:end] = torch.tensor((*example.prompt, *example.answer), dtype=torch.int64)
            positions[i, at:end] = torch.arange(len(example))
            labels[i, answer:end] = torch.tensor(example.answer, dtype=torch.int64)
            at = end
    examples = sum(map(len, rows))
    return Batch("packed", input_ids, attention, positions, labels[:, length - width :], examples)


@dataclass(frozen=True)
class Dataset:
    """A client's examples, or a held-out split. `candidates` is set where answers are a closed set that is scored."""

    examples: tuple[Example, ...]
    pad: int = 0
    candidates: tuple[tuple[int, ...], ...] | None = None
    choices: tuple[str, ...] = field(default=())
    balanced: bool = False  # of a closed set: batches hold the answers in equal numbers
    pack: int = 0  # of open answers: the tokens of a row into which batches pack short examples; 0: they don't
    beta: float | None = None  # of preferences: see Batch; None: the answers are trained on as they are
    scale: float | None = None  # of pairs: see Batch
    focus: float | None = None  # of LFR: the share of the examples that every second pass is about; None: all always
    memory: MutableMapping[str, Tensor] | None = field(default=None, compare=False)  # where LFR keeps their losses
    cut: int = 0  # rows that lost tokens, to be short enough
    dropped: int = 0  # rows that were left out as too long
    ends: tuple[str, ...] = ()  # how answers end, where a chat template ends them: generation stops there
    asked: tuple[int, ...] = ()  # a chat template's generation prompt, with which the model is asked where it is served
    notes: tuple[str, ...] = field(default=(), compare=False)  # what people may not expect of the rows' text

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self, key: Key, size: int) -> Iterator[Batch]:
        """Batches without end: pass after pass, each in a fresh order from `key`, one short batch in a pass.

        Within a window of WINDOW batches, examples of like length share a batch: padding costs as much as tokens do.
        With `balanced` each batch holds as many of each answer that is here; the rarer ones come round more often.
        With `pack` a batch is up to `size` rows of up to `pack` tokens, filled with examples in random order.
        With `focus` and a memory, every second pass is about the examples of the highest losses (see data.lfr).
        """
        learnt = None if self.focus is None or self.memory is None else Learnt(self.memory, len(self.examples))
        for turn in itertools.count():
            here, places = key.fold("pass", turn), list(range(len(self.examples)))
            if learnt is not None and learnt.begin():
                places = learnt.hardest(self._groups(), self.focus or 1.0, here.fold("focus"))
            rows = self if learnt is None else replace(self, examples=tuple(self.examples[i] for i in places))
            for batch, picked in rows._packed(here, size) if self.pack else rows._pass(here, size):
                if learnt is not None:
                    batch = replace(batch, seen=partial(learnt.record, [places[i] for i in picked]))
                yield batch

    def remembered(self, memory: MutableMapping[str, Tensor]) -> Dataset:
        """These rows with a client's memory, if their order asks for one."""
        return self if self.focus is None else replace(self, memory=memory)

    def _pass(self, here: Key, size: int) -> Iterator[tuple[Batch, list[int]]]:
        """The batches of one pass, each with the places of its examples."""
        groups = self._groups()
        share = max(1, size // len(groups))
        longest = max(len(group) for group in groups)
        orders = [here.fold("order", g).permutation(len(group)) for g, group in enumerate(groups)]
        streams = [
            [group[order[i % len(order)]] for i in range(longest)] for group, order in zip(groups, orders, strict=True)
        ]
        for start in range(0, longest, WINDOW * share):
            windows = [
                sorted(stream[start : start + WINDOW * share], key=lambda i: len(self.examples[i]))
                for stream in streams
            ]
            for b in here.fold("window", start).permutation(-(-len(windows[0]) // share)):
                picked = [i for window in windows for i in window[b * share : (b + 1) * share]]
                yield self.collated([self.examples[i] for i in picked]), picked

    def _packed(self, here: Key, size: int) -> Iterator[tuple[Batch, list[int]]]:
        def batch() -> tuple[Batch, list[int]]:
            packed = collate_packed([[self.examples[i] for i in row] for row in rows], self.pad)
            return packed, [i for row in rows for i in row]

        rows: list[list[int]] = []
        free: list[int] = []
        for i in here.fold("order", 0).permutation(len(self.examples)).tolist():
            size_of = len(self.examples[i])
            at = next((at for at, room in enumerate(free) if room >= size_of), None)
            if at is None:
                if len(rows) == size:
                    yield batch()
                    rows, free = [], []
                at = len(rows)
                rows.append([])
                free.append(self.pack)
            rows[at].append(i)
            free[at] -= size_of
        yield batch()

    def _groups(self) -> list[list[int]]:
        """The places of the examples, of each answer apart where batches hold them in equal numbers."""
        places = range(len(self.examples))
        if not self.balanced:
            return [list(places)]
        choices = sorted({e.choice or 0 for e in self.examples})
        return [[i for i in places if self.examples[i].choice == c] for c in choices]

    def in_order(self, size: int) -> Iterator[tuple[Batch, tuple[Example, ...]]]:
        """Every example once, shortest first so that little is padded: for evaluation."""
        order = sorted(self.examples, key=len)
        for start in range(0, len(order), size):
            picked = tuple(order[start : start + size])
            yield self.collated(picked), picked

    def collated(self, examples: Sequence[Example]) -> Batch:
        """One batch of these of its examples."""
        return collate(examples, self.pad, self.candidates, self.beta, self.scale)
