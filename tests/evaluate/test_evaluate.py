"""Losses, accuracy, Rouge-L and answers on the tiny model."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EOS, PAD, tiny_folder

from thinwire.data.batch import Dataset, Example, collate
from thinwire.evaluate.choice import accuracy
from thinwire.evaluate.loss import mean_loss
from thinwire.evaluate.splits import Score, Split, answers, evaluate
from thinwire.evaluate.text import bleu, exact_match, generate, references, rouge_l
from thinwire.model.net import Net
from thinwire.train.objective import loss, scores


def tokens(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


TEXTS = [("copy: heron", "heron"), ("first: a b", "a"), ("x", "a longer answer"), ("upper: kelp kelp kelp", "KELP")]
OPEN = Dataset(tuple(Example(tokens(p), (*tokens(a), EOS), references=(a, "another")) for p, a in TEXTS), pad=PAD)
CLOSED = Dataset(
    tuple(Example(tokens(p), tokens("no yes"[3 * (i % 2) :][:3]), choice=i % 2) for i, (p, _) in enumerate(TEXTS)),
    pad=PAD,
    candidates=(tokens("no"), tokens("yes")),
    choices=("no", "yes"),
)
SINGLE = replace(CLOSED, candidates=(tokens("n"), tokens("y")))


@pytest.fixture
def net(tmp_path: Path) -> Net:
    return Net.open(str(tiny_folder(tmp_path / "m")))


@pytest.fixture
def parrot(net: Net) -> Net:
    """The net, forced: after a byte c comes the byte c + 1; after "e" the end."""

    def force(_module: object, _args: object, given: dict[str, Any], output: Any) -> Any:
        keep = given.get("logits_to_keep", 0)
        ids = given["input_ids"][:, slice(-keep, None) if isinstance(keep, int) else keep]
        follow = torch.where(ids == ord("e"), EOS, (ids + 1) % 256)
        output.logits = 50.0 * torch.nn.functional.one_hot(follow, output.logits.shape[-1]).float()
        return output

    net.model.register_forward_hook(force, with_kwargs=True)
    return net


def test_the_open_loss_is_the_mean_over_tokens_whatever_the_batches(net: Net) -> None:
    with torch.no_grad():
        expected = loss(net.model, collate(OPEN.examples, PAD)).item()
    count = sum(len(e.answer) for e in OPEN.examples)
    for size in (1, 3, 8):
        value, seen = mean_loss(net.model, OPEN, size)
        assert seen == count
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("data", [CLOSED, SINGLE])
def test_accuracy_and_the_closed_loss(net: Net, data: Dataset) -> None:
    with torch.no_grad():
        batch = collate(data.examples, PAD, data.candidates)
        best = scores(net.model, batch).argmax(1).tolist()
        expected = loss(net.model, batch).item()
    for size in (1, 3, 8):
        right, value, predictions = accuracy(net.model, data, size)
        assert predictions == best
        assert right == sum(b == e.choice for b, e in zip(best, data.examples, strict=True)) / 4
        assert value == pytest.approx(expected, abs=1e-5)
        assert mean_loss(net.model, data, size) == (value, 4)


def test_the_same_example_twice_is_predicted_twice(net: Net) -> None:
    twice = replace(SINGLE, examples=SINGLE.examples + SINGLE.examples[:1])
    predictions = accuracy(net.model, twice, 2)[2]
    assert len(predictions) == 5
    assert predictions[0] == predictions[4]


def test_generation_does_not_depend_on_batches_and_keeps_the_order(net: Net) -> None:
    alone = [generate(net.model, net.tokenizer, replace(OPEN, examples=(e,)), 6, 1)[0] for e in OPEN.examples]
    assert generate(net.model, net.tokenizer, OPEN, 6, 3) == alone
    assert generate(net.model, net.tokenizer, OPEN, 6, 3, limit=2) == alone[:2]


def test_a_forced_answer_stops_at_the_end_token(parrot: Net) -> None:
    data = Dataset(
        (
            Example(tokens("xyza"), tokens("bcde"), references=("nothing", "BCDE")),
            Example(tokens("d"), (), references=("e",)),
        ),
        pad=PAD,
    )
    assert generate(parrot.model, parrot.tokenizer, data, 10, 2) == ["bcde", "e"]
    assert generate(parrot.model, parrot.tokenizer, data, 3, 2) == ["bcd", "e"]
    nothing = replace(data, examples=(Example(tokens("e"), tokens("b")),))
    assert generate(parrot.model, parrot.tokenizer, nothing, 10, 2) == [""]


def test_generation_stops_where_the_chat_template_ends_answers(parrot: Net) -> None:
    parrot.tokenizer.add_special_tokens({"additional_special_tokens": ["d"]})  # a byte's token is the byte
    data = Dataset((Example(tokens("a"), ()),), pad=PAD, ends=(" d",))
    assert generate(parrot.model, parrot.tokenizer, data, 10, 1) == ["bc"]


def test_an_end_that_is_a_text_is_cut_off(parrot: Net) -> None:
    data = Dataset((Example(tokens("a"), ()), Example(tokens("d"), ())), pad=PAD, ends=("de",))
    assert generate(parrot.model, parrot.tokenizer, data, 10, 2) == ["bc", "e"]
    assert generate(parrot.model, parrot.tokenizer, data, 3, 2) == ["bc", "e"]  # no room for all of the end
    assert generate(parrot.model, parrot.tokenizer, data, 2, 2) == ["bc", "e"]


def test_what_is_accepted_is_the_references_or_the_answer(parrot: Net) -> None:
    examples = (Example(tokens("x"), tokens("bcde"), references=("one", "two")), Example(tokens("x"), tokens("bc")))
    assert references(parrot.tokenizer, examples) == [("one", "two"), ("bc",)]


def test_rouge_is_of_the_best_reference_and_of_whole_words() -> None:
    assert rouge_l(["bcde", "e"], [("nothing", "BCDE"), ("e",)]) == 1.0
    assert rouge_l(["bcd", "e"], [("nothing", "BCDE"), ("e",)]) == 0.5
    assert rouge_l([""], [("b",)]) == 0.0
    assert rouge_l(["a b c"], [("a c",)]) == pytest.approx(0.8)  # 2 of 3 words, 2 of 2: 2 * 2/3 / (5/3)


def test_exact_match_is_of_any_reference_but_for_space() -> None:
    assert exact_match(["a  b", "B"], [("x", "a b "), ("b",)]) == 0.5
    assert exact_match([""], [("b",)]) == 0
    with pytest.raises(ValueError, match="at least one"):
        exact_match([], [])


def test_bleu_is_of_all_answers_at_once() -> None:
    text = "the cat sat on the mat today"
    assert bleu([text], [(text,)]) == pytest.approx(100)
    # 7, 6, 5 and 4 of as many n-grams, then half of each beside an answer of which nothing is right
    assert bleu([text, "x y z u v w q"], [(text,), ("some other words that never match here",)]) == pytest.approx(50)
    assert bleu([text, text], [("nothing", text), (text,)]) == pytest.approx(100)
    # a brevity penalty: every n-gram is right, and a half is missing
    assert bleu(["the cat sat on"], [("the cat sat on the mat today sir",)]) == pytest.approx(100 * math.exp(-1))
    assert bleu([""], [("b",)]) == 0


def test_a_right_model_has_perfect_scores(parrot: Net) -> None:
    data = Dataset((Example(tokens("a"), (*tokens("bcde"), EOS), references=("bcde",)),), pad=PAD)
    score = evaluate(parrot, Split("heldout", data, generate=5), max_new_tokens=8)
    assert score == Score("heldout", score.loss, math.exp(score.loss), None, 1.0, 0.0, 1, 1.0)
    assert score.loss == pytest.approx(0.0, abs=1e-6)
    closed = Dataset(
        (Example(tokens("a"), (), choice=1), Example(tokens("xm"), (), choice=0)),
        pad=PAD,
        candidates=(tokens("no"), tokens("bc")),
        choices=("no", "bc"),
    )
    score = evaluate(parrot, Split("train", closed, generate=5))
    assert (score.accuracy, score.rouge_l, score.bleu, score.rows) == (1.0, None, None, 2)
    assert score.loss == pytest.approx(0.0, abs=1e-6)
    assert answers(parrot, closed, 2) == ["bc", "no"]
    assert answers(parrot, replace(closed, choices=()), 1) == ["bc"]
    assert answers(parrot, data, 5, max_new_tokens=8) == ["bcde"]
    assert answers(parrot, data, 0) == []


def test_perplexity_overflows_to_infinity(parrot: Net) -> None:
    def louder(_module: object, _args: object, output: Any) -> Any:
        output.logits = 100 * output.logits
        return output

    parrot.model.register_forward_hook(louder)
    score = evaluate(parrot, Split("wrong", Dataset((Example(tokens("a"), tokens("a")),), pad=PAD)))
    assert score.loss > 1000
    assert score.perplexity == math.inf


def test_evaluation_repeats_and_touches_neither_generators_nor_the_net(
    net: Net, capfd: pytest.CaptureFixture[str]
) -> None:
    net.model.generation_config.do_sample = True
    net.model.generation_config.temperature = 0.7
    net.model.generation_config.repetition_penalty = 3.0
    own = net.model.generation_config
    net.model.train()
    state = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    before = net.state_sha256()
    split = Split("heldout", OPEN, generate=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = evaluate(net, split, batch_size=2, max_new_tokens=5)
        assert evaluate(net, split, batch_size=2, max_new_tokens=5) == first
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002
    assert random.getstate() == state[2]
    assert net.state_sha256() == before
    assert net.model.training
    assert net.model.generation_config is own
    assert own.temperature == 0.7
    assert all(p.requires_grad for _, p in net.parameters())
    loss(net.model, collate(OPEN.examples, PAD)).backward()
    assert capfd.readouterr().err == ""


def test_generation_ends_where_the_positions_end(tmp_path: Path) -> None:
    net = Net.open(str(tiny_folder(tmp_path / "m", max_position_embeddings=24)))
    seen: list[int] = []
    net.model.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["attention_mask"].shape[1]), with_kwargs=True
    )
    answers(net, OPEN, 4, max_new_tokens=100)
    assert max(seen) == 23  # the last of the 24 tokens is made from those before it


def test_nothing_to_evaluate_is_refused(net: Net) -> None:
    for data in (replace(OPEN, examples=()), replace(CLOSED, examples=())):
        with pytest.raises(ValueError, match=r"no answer tokens|at least one"):
            evaluate(net, Split("empty", data))
    with pytest.raises(ValueError, match="at least one"):
        rouge_l([], [])
    with pytest.raises(ValueError, match="at least one"):
        bleu([], [])
    with pytest.raises(ValueError, match="closed"):
        accuracy(net.model, OPEN, 2)
