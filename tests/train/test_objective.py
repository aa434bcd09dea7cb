"""The objective against a slow oracle: each row alone, unpadded, with all logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import EOS, PAD, VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from thinwire.data.batch import IGNORE, Batch, Example, collate, collate_packed
from thinwire.train.objective import (
    cross_entropies,
    example_losses,
    keeps_apart,
    loss,
    losses,
    margins,
    scores,
    token_losses,
)

OPEN = [
    Example((1, 2, 3), (4, 5, EOS)),
    Example((9,), (8, 7, 6, 5, 4, EOS)),
    Example((10, 11, 12, 13, 14, 15, 16), (EOS,)),
    Example((20, 21), (22, EOS)),
]
CLOSED = [Example((1, 2, 3), (40,), choice=0), Example((9,), (41,), choice=1), Example((5,) * 9, (40,), choice=0)]
SEVERAL = [(40, 3), (41,), (42, 43, 44)]
SINGLE = [(40,), (41,), (42,)]
PREFERENCES = [
    replace(e, rejected=rejected, reference=reference)
    for e, rejected, reference in zip(
        OPEN, [(6, EOS), (8, EOS), (30, 31, 32, EOS), (23, EOS)], (1, -2, 0, 30), strict=True
    )
]


def gpt2() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=EOS)
        ).eval()


class Plain(nn.Module):
    """A model that computes all logits and knows neither positions nor caches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
        return SimpleNamespace(logits=out.logits)


@pytest.fixture(params=[tiny_model, gpt2, Plain])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


def oracle(model: nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """The cross-entropy of each answer token, from the whole row alone."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
    return F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="none")


def test_token_losses(model: nn.Module) -> None:
    with torch.no_grad():
        sums, counts = token_losses(model, collate(OPEN, PAD))
        alone = [oracle(model, e.prompt, e.answer) for e in OPEN]
    assert sums.dtype == torch.float32
    assert counts.tolist() == [len(e.answer) for e in OPEN]
    torch.testing.assert_close(sums.double(), torch.stack([a.sum() for a in alone]), rtol=1e-5, atol=1e-5)


def test_open_loss_and_its_gradient(model: nn.Module) -> None:
    value = loss(model, collate(OPEN, PAD))
    gradients = torch.autograd.grad(value, list(model.parameters()))
    slow = torch.cat([oracle(model, e.prompt, e.answer) for e in OPEN]).mean()
    expected = torch.autograd.grad(slow, list(model.parameters()))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), slow, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_preferences_loss_and_its_gradient(model: nn.Module) -> None:
    """-log sigmoid(beta (margin - reference)), each answer a row alone, in float64 but for the model's own products."""
    batch = collate(PREFERENCES, PAD, beta=0.3)
    value = loss(model, batch)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    logs = [[-oracle(model, e.prompt, tokens).sum() for tokens in (e.answer, e.rejected)] for e in PREFERENCES]
    slow = torch.stack([chosen - rejected for chosen, rejected in logs])
    torch.testing.assert_close(margins(model, batch).double(), slow, rtol=1e-5, atol=1e-4)
    references = torch.tensor([float(e.reference or 0) for e in PREFERENCES]).double()
    each = -torch.log(1 / (1 + torch.exp(-0.3 * (slow - references))))
    expected = torch.autograd.grad(each.mean(), list(model.parameters()))
    assert value.dtype == torch.float32
    torch.testing.assert_close(example_losses(model, batch)[0].double(), each, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value.double(), each.mean(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_where_the_start_model_is_the_loss_is_that_of_a_coin() -> None:
    model = tiny_model()
    with torch.no_grad():
        found = margins(model, collate(PREFERENCES, PAD, beta=0.1)).tolist()
        here = [replace(e, reference=margin) for e, margin in zip(PREFERENCES, found, strict=True)]
        assert loss(model, collate(here, PAD, beta=0.1)).item() == pytest.approx(math.log(2), abs=1e-7)


def test_without_a_reference_there_is_no_loss_of_preferences() -> None:
    batch = collate([*PREFERENCES, replace(PREFERENCES[0], reference=None)], PAD, beta=0.1)
    with pytest.raises(ValueError, match="reference"):
        loss(tiny_model(), batch)


@pytest.mark.parametrize("groups", [1, 3])
def test_preferences_in_groups_are_each_the_same(groups: int) -> None:
    model, seen = tiny_model(), list[Tensor]()
    batch = replace(collate(PREFERENCES, PAD, beta=0.3), seen=seen.append)
    found = example_losses(model, batch, groups)
    alone = torch.stack([loss(model, collate([e], PAD, beta=0.3)) for e in PREFERENCES])
    torch.testing.assert_close(found, alone.expand(groups, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.mean(1), losses(model, batch, groups))
    torch.testing.assert_close(seen[0], alone.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_an_examples_loss_is_its_own(model: nn.Module, groups: int) -> None:
    """As it is alone, differentiable, and the batch's loss is their mean, over the examples or over all tokens."""
    for candidates in (None, SINGLE, SEVERAL):
        examples = OPEN if candidates is None else CLOSED
        batch = collate(examples, PAD, candidates)
        found = example_losses(model, batch, groups)
        assert (found.dtype, found.shape, found.requires_grad) == (torch.float32, (groups, len(examples)), True)
        alone = torch.stack([loss(model, collate([e], PAD, candidates)) for e in examples])
        torch.testing.assert_close(found, alone.expand(groups, -1), rtol=1e-5, atol=1e-5)
        if candidates is None:
            tokens = torch.tensor([len(e.answer) for e in examples])
            mean = (found * tokens).sum(1) / tokens.sum()
            torch.testing.assert_close(mean, losses(model, batch, groups), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found.mean(1), losses(model, batch, groups))


def test_the_losses_of_packed_examples_are_kept_apart() -> None:
    model = tiny_model()
    rows = [[OPEN[0], OPEN[1]], [OPEN[2]], [OPEN[3], Example((7,), ()), OPEN[0]]]
    with torch.no_grad():
        found = example_losses(model, collate_packed(rows, PAD), 2)
        alone = [oracle(model, e.prompt, e.answer).mean() if e.answer else torch.zeros(()) for row in rows for e in row]
    torch.testing.assert_close(found.double(), torch.stack(alone).double().expand(2, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("candidates", [SINGLE, SEVERAL])
def test_closed_loss_and_its_gradient(model: nn.Module, candidates: list[tuple[int, ...]]) -> None:
    batch = collate(CLOSED, PAD, candidates)
    value = loss(model, batch)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    marks = torch.stack(
        [torch.stack([-oracle(model, e.prompt, tokens).sum() for tokens in candidates]) for e in CLOSED]
    )
    slow = F.cross_entropy(marks, torch.tensor([e.choice for e in CLOSED]))
    torch.testing.assert_close(value.double(), slow, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(slow, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    found = scores(model, batch).double()
    assert found.shape == (3, 3)
    torch.testing.assert_close(found.softmax(1), marks.softmax(1), rtol=1e-5, atol=1e-5)
    if candidates is SEVERAL:
        torch.testing.assert_close(found, marks, rtol=1e-5, atol=1e-5)


def test_one_token_candidates_score_as_longer_ones_do() -> None:
    model = tiny_model()
    rows = [Example(e.prompt, tokens) for e in CLOSED for tokens in SINGLE]
    long = collate(rows, PAD)
    spelled = Batch(
        "choice",
        long.input_ids,
        long.attention_mask,
        long.position_ids,
        long.labels,
        examples=len(CLOSED),
        candidates=len(SINGLE),
        choice=torch.tensor([e.choice for e in CLOSED]),
    )
    short = collate(CLOSED, PAD, SINGLE)
    assert short.candidate_ids is not None
    torch.testing.assert_close(loss(model, short), loss(model, spelled), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(model, short), F.log_softmax(scores(model, spelled), dim=1), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(model: nn.Module) -> None:
    batch = collate(OPEN, PAD)
    rows, more = len(OPEN), 5
    padded = Batch(
        "open",
        torch.cat([torch.full((rows, more), 77), batch.input_ids], 1),
        torch.cat([torch.zeros(rows, more, dtype=torch.int64), batch.attention_mask], 1),
        torch.cat([torch.zeros(rows, more, dtype=torch.int64), batch.position_ids], 1),
        torch.cat([torch.full((rows, 2), IGNORE), batch.labels], 1),
        rows,
    )
    with torch.no_grad():
        torch.testing.assert_close(loss(model, padded), loss(model, batch), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(token_losses(model, padded), token_losses(model, batch), rtol=1e-5, atol=1e-5)


def test_only_the_positions_that_count_reach_the_head() -> None:
    model = tiny_model()
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    loss(model, collate(OPEN, PAD))
    scores(model, collate(CLOSED, PAD, SINGLE))
    assert [shape[1] for shape in seen] == [6, 1]


def test_a_token_that_nothing_precedes_does_not_count() -> None:
    model = tiny_model()
    sums, counts = token_losses(model, collate([Example((), (4, 5)), Example((1, 2, 3), (4, 5))], PAD))
    assert counts.tolist() == [1, 2]
    torch.testing.assert_close(sums[0].double(), oracle(model, (4,), (5,)).sum(), rtol=1e-5, atol=1e-5)
    assert token_losses(model, collate([Example((), (4, 5))], PAD))[1].tolist() == [1]


def test_nothing_that_counts_is_no_loss(model: nn.Module) -> None:
    value = loss(model, collate([Example((1, 2), ()), Example((1,), ())], PAD))
    assert value.item() == 0.0
    value.backward()


def test_low_precision_logits_are_reduced_in_float32() -> None:
    model = tiny_model()
    exact = loss(model, collate(OPEN, PAD))
    value = loss(model.to(torch.bfloat16), collate(OPEN, PAD))
    assert value.dtype == torch.float32
    assert abs(value.item() - exact.item()) < 0.05


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, num_attention_heads=4))


def qwen() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2))


def gemma() -> nn.Module:
    # its first layer sees a window of four tokens only, which packing must leave as it is
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    layers = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **heads, **layers))


def eager() -> nn.Module:
    model = tiny_model()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("make", [tiny_model, eager, gpt2, neox, qwen, gemma])
def test_packed_examples_do_not_see_each_other(make: Callable[[], nn.Module]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().eval()
    rows = [OPEN[:2], OPEN[2:3], OPEN[3:]]
    packed, apart = collate_packed(rows, PAD), collate(OPEN, PAD)
    sums, counts = token_losses(model, packed)
    expected = [[oracle(model, e.prompt, e.answer) for e in row] for row in rows]
    for found, count, row in zip(sums, counts, expected, strict=True):
        assert int(count) == sum(map(len, row))
        torch.testing.assert_close(found.double(), torch.cat(row).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss(model, packed), loss(model, apart))
    torch.testing.assert_close(losses(model, packed, 2), loss(model, apart).expand(2))
    gradients = [torch.autograd.grad(loss(model, batch), [*model.parameters()]) for batch in (packed, apart)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert keeps_apart(model, OPEN[0], OPEN[1])


def test_a_model_that_would_mix_packed_examples_is_known() -> None:
    class Mixing(nn.Module):
        """Takes positions, and attends to all that stands before."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return self.inner(input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids)

    assert not keeps_apart(Mixing(), OPEN[0], OPEN[1])
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)).eval()
    assert not keeps_apart(bloom, OPEN[0], OPEN[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [50, 3000])
def test_cross_entropies_are_those_of_the_whole_matrix_to_the_bit(dtype: torch.dtype, width: int) -> None:
    """In one tile and in several, with labels that do not count, and no row at all."""
    generator = torch.Generator().manual_seed(0)
    for rows in (0, 1, 700):
        whole = (4 * torch.randn(rows, width, generator=generator)).to(dtype).requires_grad_()
        labels = torch.randint(0, width, (rows,), generator=generator)
        labels[::3] = IGNORE
        above = torch.rand(rows, generator=generator)
        expected = F.cross_entropy(whole.float(), labels, ignore_index=IGNORE, reduction="none")
        found = cross_entropies(whole, labels)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found, whole, above)[0], torch.autograd.grad(expected, whole, above)[0])
