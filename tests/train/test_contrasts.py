"""The loss of pairs against its plain definition: each text alone, each pair by itself, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EOS, PAD, VOCABULARY, tiny_encoder
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from thinwire.data.batch import Batch, Example, collate
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions
from thinwire.perturb.probe import Probe, check
from thinwire.train.objective import contrasts, embeddings, example_losses, loss, losses

TEXTS = [((1, 2, 3), (4, 5, EOS)), ((9,), (8, 7, 6, 5, 4)), ((10, 11, 12, 13, 14, 15), (7,)), ((20, 21), (22, 5, 9))]
PAIRS = [Example(anchor, positive, apart=True) for anchor, positive in TEXTS]
TRIPLES = [replace(e, rejected=(30 + i, 31, 2)[: i + 1]) for i, e in enumerate(PAIRS)]
FIELDS: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": PAD}
WIDE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert(folder: Path) -> nn.Module:
    return Net.open(tiny_encoder(folder), embeds=True).model


def roberta(folder: Path) -> nn.Module:
    """Which counts its positions from the padding's number."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return RobertaModel(RobertaConfig(**{**FIELDS, "pad_token_id": 1}, **WIDE)).eval()


def distilbert(folder: Path) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return DistilBertModel(DistilBertConfig(**FIELDS, dim=32, hidden_dim=64, n_layers=2, n_heads=4)).eval()


@pytest.fixture(params=[bert, roberta, distilbert])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    return request.param(tmp_path / "encoder")


def batch_of(examples: list[Example], model: nn.Module, scale: float = 20.0) -> Batch:
    return collate(examples, model.config.pad_token_id, scale=scale)


def vector(model: nn.Module, tokens: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([tokens])
    mean = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].double().mean(0)
    return mean / mean.square().sum().sqrt()


def oracle(model: nn.Module, examples: list[Example], scale: float) -> list[Tensor]:
    """-log of the share that exp(scale cos) of an anchor and its own positive has among all that is no anchor."""
    others = [vector(model, tokens) for e in examples for tokens in (e.answer, e.rejected) if tokens]
    each = []
    for e in examples:
        anchor = vector(model, e.prompt)
        whole = sum((scale * (anchor @ other)).exp() for other in others)
        each.append(torch.log(whole) - scale * (anchor @ vector(model, e.answer)))
    return each


@pytest.mark.parametrize("examples", [PAIRS, TRIPLES], ids=["pairs", "triples"])
@pytest.mark.parametrize("scale", [20.0, 3.0])
def test_the_loss_and_its_gradient_are_the_definition(model: nn.Module, examples: list[Example], scale: float) -> None:
    value = loss(model, batch_of(examples, model, scale))
    used = [p for name, p in model.named_parameters() if not name.startswith("pooler")]
    gradients = torch.autograd.grad(value, used)
    slow = torch.stack(oracle(model, examples, scale)).mean()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), slow, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(slow, used), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert sum(float(each.abs().sum()) for each in gradients) > 0


def test_where_all_is_alike_the_loss_is_that_of_a_guess() -> None:
    alike = torch.nn.functional.normalize(torch.ones(5, 3, 8), dim=-1)
    assert contrasts(alike, 20.0).tolist() == pytest.approx([math.log(10)] * 5, abs=1e-5)
    assert contrasts(alike[:, :2], 20.0).tolist() == pytest.approx([math.log(5)] * 5, abs=1e-5)


@torch.no_grad()
def test_vectors_have_nothing_of_the_padding(model: nn.Module) -> None:
    found = embeddings(model, batch_of(TRIPLES, model)).unflatten(0, (len(TRIPLES), 3))
    assert found.norm(dim=-1).flatten().tolist() == pytest.approx([1.0] * 12, abs=1e-6)
    for e, (anchor, positive, negative) in zip(TRIPLES, found, strict=True):
        for mine, tokens in ((anchor, e.prompt), (positive, e.answer), (negative, e.rejected)):
            torch.testing.assert_close(mine.double(), vector(model, tokens), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_groups_are_told_apart_in_themselves_alone(model: nn.Module) -> None:
    """As a probe has them: the same rows twice, and no more negatives than one group has."""
    batch = batch_of(PAIRS, model)
    assert losses(model, batch, 3).tolist() == pytest.approx([loss(model, batch).item()] * 3, rel=1e-5)


@pytest.mark.parametrize("law", ["sign", "lowrank"])
@pytest.mark.parametrize("together", [False, True])
def test_a_probe_has_the_losses_of_perturbed_weights(law: Any, together: bool, tmp_path: Path) -> None:
    net = Net.open(tiny_encoder(tmp_path / "encoder"), embeds=True)
    directions, batch = Directions(7, law), batch_of(TRIPLES, net.model)
    check(net, directions, together, "fedkseed")
    with Probe(net, directions, together) as probe:
        found = probe.losses(batch, [3], 1e-2)[0]
    before = {name: p.detach().clone() for name, p in net.parameters()}
    for sign, value in zip((1, -1), found, strict=True):
        with torch.no_grad():
            for name, p in net.parameters():
                p.copy_(directions.apply(before[name], name, [3], [sign * 1e-2]))
            assert loss(net.model, batch).item() == pytest.approx(value, abs=2e-4)
    assert abs(found[0] - found[1]) > 1e-3


def test_a_pair_has_no_loss_of_its_own(tmp_path: Path) -> None:
    model = bert(tmp_path / "encoder")
    with pytest.raises(ValueError, match="depends on the others"):
        example_losses(model, batch_of(PAIRS, model))
