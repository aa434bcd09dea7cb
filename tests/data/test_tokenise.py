"""Tokens: what is cut, what is added, and closed answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import BOS, CHOICES, EOS, PAD, tiny_model, tiny_rows, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from thinwire.data.batch import Dataset, Example, collate
from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.data.templates import NAMED, Template
from thinwire.data.tokenise import shuffle_answers, tokenise
from thinwire.keys import Key
from thinwire.train.objective import token_losses

PLAIN, WITH_BOS = tiny_tokenizer(), tiny_tokenizer(bos=True)
JOINED = Template("{input}", "{output}")
SENTIMENT = Template("{input} It was", " {output}")


def row(**fields: Any) -> Row:
    return Row(fields, "train.jsonl", 17)


def one(prompt: str, answer: str, tokenizer: Any = PLAIN, **options: Any) -> Example:
    options = {"max_length": 64} | options
    return tokenise([row(input=prompt, output=answer)], JOINED, tokenizer, **options).examples[0]


def ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def test_prompt_and_answer_are_tokens_of_their_own() -> None:
    data = tokenise([row(input="fine", output="great")], SENTIMENT, PLAIN, max_length=64)
    expected = Example(ids("fine It was"), (*ids(" great"), EOS), None, ("great",), "fine It was")
    assert data == Dataset((expected,), pad=PAD)


def test_eos_and_bos_stand_where_they_belong_and_once() -> None:
    assert one("ab", "cd", eos=False).answer == ids("cd")
    assert one("ab", "cd", WITH_BOS).prompt == (BOS, *ids("ab"))
    assert one("<bos>ab", "cd", WITH_BOS).prompt == (BOS, *ids("ab"))
    assert one("ab", "cd", WITH_BOS).answer == (*ids("cd"), EOS)


def test_no_prompt_is_empty() -> None:
    assert one("", "a").prompt == (BOS,)
    assert one("", "a", WITH_BOS).prompt == (BOS,)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert one("", "a", tokenizer).prompt == (EOS,)
    tokenizer.eos_token = None
    assert one("x", "a", tokenizer, eos=False).prompt == ids("x")
    with pytest.raises(DataError, match=r"^a prompt is empty, and the tokenizer has neither"):
        one("", "a", tokenizer, eos=False)
    with pytest.raises(DataError, match=r"^the tokenizer has no eos token"):
        one("x", "a", tokenizer)


def test_a_long_prompt_loses_its_beginning_and_keeps_bos() -> None:
    assert one("0123456789", "abc", max_length=8).prompt == ids("6789")
    assert one("0123456789", "abc", max_length=8).answer == (*ids("abc"), EOS)
    assert one("0123456789", "abc", WITH_BOS, max_length=8).prompt == (BOS, *ids("789"))
    assert one("0123456789", "abc", WITH_BOS, max_length=2).prompt == ids("9")


def test_a_long_answer_loses_its_end() -> None:
    cut = one("01", "abcdefghij", max_length=8)
    assert (cut.prompt, cut.answer) == (ids("01"), ids("abcdef"))
    both = one("0123456789", "abcdefghij", max_length=8)
    assert (both.prompt, both.answer) == (ids("6789"), ids("abcd"))
    with pytest.raises(DataError, match=r"^max_length is 1; prompt and answer need a token each$"):
        one("a", "b", max_length=1)


@given(
    st.text(st.characters(codec="ascii"), max_size=20),
    st.text(st.characters(codec="ascii"), max_size=20).filter(str.strip),
    st.integers(2, 48),
    st.booleans(),
)
def test_lengths(prompt: str, answer: str, length: int, bos: bool) -> None:
    example = one(prompt, answer, WITH_BOS if bos else PLAIN, max_length=length)
    assert example.prompt
    assert example.answer
    total = max(1, len(prompt) + bos) + len(answer) + 1
    assert len(example.prompt) + len(example.answer) == min(total, length)
    assert (*ids(answer), EOS)[: len(example.answer)] == example.answer


def test_references_and_chat() -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    data = tokenise([row(messages=talk, references=["Hey"])], NAMED["chat"], WITH_BOS, max_length=64)
    assert data.examples[0].prompt == (BOS, *ids("<user>Hi\n<assistant>"))
    assert data.examples[0].references == ("Yo", "Hey")


def test_closed_answers() -> None:
    rows = tiny_rows(6, closed=True)
    data = tokenise(rows, SENTIMENT, PLAIN, max_length=64, choices=CHOICES)
    assert data.candidates == (ids(" great"), ids(" terrible"))
    assert data.choices == CHOICES
    assert [data.choices[e.choice] for e in data.examples if e.choice is not None] == [r.fields["output"] for r in rows]
    assert all(e.choice is not None and e.answer == data.candidates[e.choice] for e in data.examples)


def test_every_candidate_fits_behind_a_cut_prompt() -> None:
    data = tokenise([row(input="0123456789", output=1)], JOINED, PLAIN, max_length=6, choices=["1", "no"])
    assert data.examples[0].prompt == ids("6789")
    assert data.candidates == (ids("1"), ids("no"))
    with pytest.raises(DataError, match=r"^the choice 'never' has 5 tokens; max_length 5 leaves no prompt$"):
        tokenise([row(input="x", output="no")], JOINED, PLAIN, max_length=5, choices=["no", "never"])


def test_closed_answers_of_other_shapes() -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}]
    chat = tokenise([row(messages=talk)], NAMED["chat"], PLAIN, max_length=64, choices=["yes", "no"])
    assert chat.examples[0].choice == 1
    pair = Template("{a}", "{b} {c}")
    with pytest.raises(DataError, match=r"^the answer template '\{b\} \{c\}' must name one \{column\} here, not 2$"):
        tokenise([row(a=1, b=2, c=3)], pair, PLAIN, max_length=64, choices=["2", "3"])


def test_choices_that_cannot_be_used() -> None:
    for choices, problem in (
        (["great"], "choices lists fewer than two answers"),
        (["great", ""], "the choice '' is empty"),
        (["great", "bad", "great"], "the choices 'great' and 'great' have the same tokens"),
        (["good", "bad"], "train.jsonl:17: the answer 'great' is not one of the choices: good, bad"),
    ):
        with pytest.raises(DataError) as caught:
            tokenise([row(input="x", output="great")], SENTIMENT, PLAIN, max_length=64, choices=choices)
        assert str(caught.value) == problem


def test_rows_that_cannot_be_used() -> None:
    with pytest.raises(DataError, match=r"^there are no rows$"):
        tokenise([], SENTIMENT, PLAIN, max_length=64)
    with pytest.raises(DataError, match=r"^train.jsonl:17: field 'output' is missing \(present: input\)$"):
        tokenise([row(input="x")], SENTIMENT, PLAIN, max_length=64)


def test_shuffled_answers_are_the_same_answers_elsewhere() -> None:
    rows = [
        Row({"input": i, "output": f"a{i}", "references": [f"b{i}"] if i % 2 else None}, "train.jsonl", i + 1)
        for i in range(40)
    ]
    before = [dict(r.fields) for r in rows]
    shuffled = shuffle_answers(rows, Key.root(1))
    assert [r.fields for r in rows] == before
    assert [(r.fields["input"], r.line) for r in shuffled] == [(r.fields["input"], r.line) for r in rows]
    outputs = [r.fields["output"] for r in shuffled]
    assert Counter(outputs) == Counter(r.fields["output"] for r in rows)
    assert sum(new == old.fields["output"] for new, old in zip(outputs, rows, strict=True)) < 10
    for r in shuffled:
        number = int(r.fields["output"][1:])
        assert r.fields.get("references") == ([f"b{number}"] if number % 2 else None)
    assert shuffle_answers(rows, Key.root(1)) == shuffled
    assert shuffle_answers(rows, Key.root(2)) != shuffled


def test_answers_are_shuffled_in_every_shape() -> None:
    rows = [
        row(prompt="p", completion="one"),
        row(messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "two"}]),
        row(instruction="i", output="three"),
    ]
    keys = [Key.root(seed) for seed in range(20)]
    results = [shuffle_answers(rows, key) for key in keys]
    found = [(r[0].fields["completion"], r[1].fields["messages"][1]["content"], r[2].fields["output"]) for r in results]
    assert all(sorted(answers) == ["one", "three", "two"] for answers in found)
    assert len(set(found)) > 1
    assert all(r[1].fields["messages"][0] == {"role": "user", "content": "q"} for r in results)
    labelled = [row(input=str(i), label=i, output="same") for i in range(9)]
    moved = shuffle_answers(labelled, Key.root(0), column="label")
    assert sorted(r.fields["label"] for r in moved) == list(range(9))
    with pytest.raises(DataError, match=r"^train.jsonl:17: field 'output' is missing \(present: input\)$"):
        shuffle_answers([row(input="x")], Key.root(0))


def test_rows_that_are_too_long_are_dropped_on_demand() -> None:
    rows = [Row({"input": "x" * n, "output": "y"}, "a.jsonl", n) for n in (3, 30, 5)]
    template = Template("{input}", "{output}")
    data = tokenise(rows, template, tiny_tokenizer(), max_length=10, too_long="drop")
    assert [len(e.prompt) for e in data.examples] == [3, 5]
    assert [e.place for e in data.examples] == ["a.jsonl:3", "a.jsonl:5"]
    assert (data.cut, data.dropped) == (0, 1)
    with pytest.raises(DataError, match=r"a.jsonl: none of 1 rows fits into 10 tokens"):
        tokenise(rows[1:2], template, tiny_tokenizer(), max_length=10, too_long="drop")


def test_rows_that_are_cut_are_counted() -> None:
    rows = [Row({"input": "x" * n, "output": "y" * n}, "a.jsonl", n) for n in (3, 9, 5, 4)]
    data = tokenise(rows, JOINED, PLAIN, max_length=10)
    assert (data.cut, data.dropped, len(data)) == (2, 0, 4)
    assert tokenise(rows[:1], JOINED, PLAIN, max_length=10).cut == 0


def test_the_answer_alone_may_be_cut() -> None:
    cut = one("01234567", "abc", max_length=10, too_long="answer")
    assert (cut.prompt, cut.answer) == (ids("01234567"), ids("ab"))
    assert one("012345678", "abc", max_length=10, too_long="answer").answer == ids("a")
    for prompt, options in (("0123456789", {}), ("0123456", {"choices": ["a", "abcd"]})):
        with pytest.raises(DataError) as caught:
            one(prompt, "a", max_length=10, too_long="answer", **options)
        room = f"the prompt has {len(prompt)} tokens, which leaves no room for the answer within data.max_length 10"
        assert str(caught.value).startswith(f"train.jsonl:17: {room} (")
    assert one("012345", "a", max_length=10, too_long="answer", choices=["a", "abcd"]).prompt == ids("012345")


LETTERS = ("<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz\n?.:|0[]/INST", "▁y", "▁yes")


def prefixing(kind: str) -> Any:
    """A token a letter, and one for " yes", of the kinds of tokenizers that write a space before a text."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    if kind.startswith("byte"):
        vocabulary |= {letter: len(LETTERS) + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    space = decoders.Replace("▁", " ")
    core.decoder = decoders.Sequence([space, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind == "prepended":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind.startswith("byte"):
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        core.decoder = decoders.ByteLevel()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    core.add_special_tokens(["<s>", "</s>", "<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = ("prepended", "always", "first", "bytes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("is it?", " yes"), ("is it?\n\n", "yes"), ("is it?", "\nyes"), ("it:", "yes.\nno"), ("a", "|.:\n0"), ("", "yes")],
)
def test_no_space_is_put_before_an_answer(kind: str, prompt: str, answer: str) -> None:
    tokenizer = prefixing(kind)
    example = one(prompt, answer, tokenizer)
    whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    read = list(example.prompt) if prompt else []
    assert [*read, *example.answer] == [*whole, tokenizer.eos_token_id]
    assert read == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_closed_answers_have_the_space_that_they_are_given(kind: str) -> None:
    tokenizer = prefixing(kind)
    rows = [row(input="is it?", output="yes")]
    with_space = tokenise(rows, SENTIMENT, tokenizer, max_length=64, choices=["yes", "no"])
    assert tokenizer.decode([*tokenizer("a")["input_ids"], *(with_space.candidates or ())[0]]).strip() == "a yes"
    without = tokenise(rows, JOINED, tokenizer, max_length=64, choices=["yes", "no"])
    assert tokenizer.decode([*tokenizer("a")["input_ids"], *(without.candidates or ())[0]]).strip() == "ayes"


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_template_is_tokenised_whole(kind: str) -> None:
    tokenizer = prefixing(kind)
    for template in (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}",
        "{% for m in messages %}<unk>{{ m.content }}</s>{% endfor %}",
    ):
        tokenizer.chat_template = template
        for answer in ("yes", "no", ".no"):
            talk = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": answer}]
            (example,) = tokenise([row(messages=talk)], NAMED["chat"], tokenizer, max_length=64).examples
            assert [*example.prompt, *example.answer] == tokenizer.apply_chat_template(talk)["input_ids"]
            assert 0 < len(example.answer) <= len(answer) + 3


def test_an_answer_that_would_melt_into_the_prompt_is_tokenised_apart() -> None:
    core = Tokenizer(models.BPE(vocab={"a": 0, ">": 1, "=": 2, ">=": 3}, merges=[(">", "=")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}>{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "=a"}]
    (example,) = tokenise([row(messages=talk)], NAMED["chat"], tokenizer, max_length=64).examples
    assert (example.prompt, example.answer) == ((1, 0, 1), (2, 0, tokenizer.eos_token_id))


@pytest.mark.parametrize("answer", ["yes", "no", "-5"])
def test_a_space_before_an_answer_is_where_its_words_have_it(answer: str) -> None:
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab={**vocabulary, "Ġy": 256}, merges=[("Ġ", "y")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}</s>"
    talk = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": answer}]
    (example,) = tokenise([row(messages=talk)], NAMED["chat"], tokenizer, max_length=64).examples
    assert [*example.prompt, *example.answer] == tokenizer.apply_chat_template(talk)["input_ids"]
    assert example.prompt[-1] == vocabulary["]"]


@pytest.mark.parametrize("bos", [True, False])
def test_of_a_plain_text_every_token_is_trained_on(bos: bool) -> None:
    """Behind the token that begins texts; the first of them too, and the end."""
    data = tokenise([Row({"text": "abc"}, "t", 1)], NAMED["text"], tiny_tokenizer(bos=bos), max_length=16)
    (example,) = data.examples
    assert (example.prompt, example.answer) == ((BOS,), (*b"abc", EOS))
    losses, counts = token_losses(tiny_model(), collate([example], data.pad))
    with torch.no_grad():
        logs = tiny_model()(torch.tensor([[BOS, *b"abc", EOS]])).logits[0].log_softmax(-1)
    assert counts.tolist() == [4]
    assert losses.item() == pytest.approx(-sum(float(logs[i, t]) for i, t in enumerate((*b"abc", EOS))), abs=1e-4)
