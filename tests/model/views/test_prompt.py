"""The prompt view: a virtual token at a word's embedding is that word in front, wherever a model reads rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import PROMPT as TEMPLATE
from federation import Federation, closed_data
from tiny import BOS, CHOICES, EOS, PAD, VOCABULARY, tiny_encoder, tiny_folder, tiny_model, tiny_rows, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from thinwire.core import Method
from thinwire.data.batch import Batch, Example, collate, collate_packed
from thinwire.data.classes import WHOLE, classify
from thinwire.data.tokenise import tokenise
from thinwire.evaluate.text import generate
from thinwire.keys import Key
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedzo import FedZO
from thinwire.model.blocks import layers_of
from thinwire.model.errors import ModelError
from thinwire.model.load import load
from thinwire.model.net import Net
from thinwire.model.numbers import digest
from thinwire.model.views import Lora, Prompt, Source, saved_in
from thinwire.model.views.virtual import of
from thinwire.train.objective import example_losses, loss, scores

IDS = torch.arange(24).view(2, 12) + 65
WORDS = (72, 105, 87)
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True, **GROUPED}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, **GROUPED}),
    "gemma3": ("gemma3_text", {"sliding_window": 64, **GROUPED}),  # scales its embeddings
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", {}),
    "bloom": ("bloom", {}),  # positions follow from the mask
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "mamba": ("mamba", {"state_size": 4}),  # no attention: its cache counts no tokens
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # so that what is in front matters
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def prompt_net(folder: Path, seed: int = 0, dtype: str = "float32", **settings: Any) -> Net:
    """The tiny model with virtual tokens in front; settings of the view, and of Net.open where it has none such."""
    if not (folder / "config.json").exists():
        tiny_folder(folder)
    fields = {name: settings.pop(name) for name in [*settings] if name in Prompt.model_fields}
    view = Prompt(**({"tokens": 3} | fields))
    return Net.open(str(folder), dtype, view=view, view_key=Key.root(seed), remember=True, **settings)


def put(net: Net, words: tuple[int, ...]) -> None:
    """The first layer's virtual tokens := the embeddings of these words."""
    (front, *_) = (p for name, p in net.parameters() if ".0.weight" in name)
    with torch.no_grad():
        front.copy_(net.model.get_input_embeddings()(torch.tensor(words)))


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found.double()


def behind(examples: tuple[Example, ...], words: tuple[int, ...]) -> tuple[Example, ...]:
    """The examples with words in front."""
    return tuple(replace(e, prompt=(*words, *e.prompt)) for e in examples)


def batches(net: Net, words: tuple[int, ...] = ()) -> dict[str, Batch]:
    """Rows of unequal lengths, of each kind that a model with logits for tokens reads."""
    opened = tokenise(tiny_rows(5), TEMPLATE, net.tokenizer, max_length=64)
    closed = closed_data(net, 5, 1)
    single = ((65,), (66,))
    return {
        "open": collate(behind(opened.examples, words), PAD),
        "choice": collate(behind(closed.examples, words), PAD, closed.candidates),
        "token": collate(tuple(replace(e, answer=()) for e in behind(closed.examples, words)), PAD, single),
    }


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of an architecture."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, fields = ARCHITECTURES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | fields))).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("words", [WORDS[:1], WORDS])
def test_virtual_tokens_at_words_are_these_words_in_front(folder: Path, words: tuple[int, ...]) -> None:
    """Losses, losses of examples and scores, of rows that padding makes equally long."""
    plain, net = Net.open(str(folder)), prompt_net(folder, tokens=len(words))
    put(net, words)
    for kind, batch in batches(net).items():
        right = batches(net, words)[kind]
        assert batch.input_ids.shape[1] + len(words) == right.input_ids.shape[1]
        assert not batch.attention_mask.all(), kind
        for measure in (loss, example_losses) if kind == "open" else (loss, example_losses, scores):
            with torch.no_grad():
                found, wanted, without = (
                    measure(*of) for of in ((net.model, batch), (plain.model, right), (plain.model, batch))
                )
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
            assert (without - wanted).abs().max() > 5e-5, kind  # the words do matter


def test_generation_sees_them_once_with_a_cache_and_without(folder: Path) -> None:
    plain, net = Net.open(str(folder)), prompt_net(folder, tokens=len(WORDS))
    put(net, WORDS)
    rows = tokenise(tiny_rows(5), TEMPLATE, net.tokenizer, max_length=64)
    longer = replace(rows, examples=behind(rows.examples, WORDS))
    wanted = generate(plain.model, plain.tokenizer, longer, 12, 4)
    assert generate(net.model, net.tokenizer, rows, 12, 4) == wanted
    if not folder.name.startswith(("bloom", "mamba")):  # which repeat one letter whatever they read
        assert generate(plain.model, plain.tokenizer, rows, 12, 4) != wanted
    batch = collate([Example(e.prompt, ()) for e in rows.examples], PAD)
    fields: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        made = [net.model.generate(**fields, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_classifier_reads_them_too_and_its_head_is_trained(decoder: bool, tmp_path: Path) -> None:
    """Padded on the right: BERT looks at the first place, a decoder at the last of the text."""
    (tiny_folder if decoder else tiny_encoder)(tmp_path)
    made: dict[str, Any] = {"classes": CHOICES, "head_key": Key.root(0)}
    plain, net = Net.open(str(tmp_path), **made), prompt_net(tmp_path, **made)
    assert len(net.names) > 1
    put(net, WORDS)
    rows = tiny_rows(5, closed=True)
    data = classify(rows, WHOLE, net.tokenizer, max_length=64, classes=CHOICES)
    for rowwise in (example_losses, scores):
        with torch.no_grad():
            found = rowwise(net.model, collate(data.examples, PAD, data.candidates))
            wanted = rowwise(plain.model, collate(behind(data.examples, WORDS), PAD, data.candidates))
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


def test_one_tensor_is_trained_and_begins_at_words_that_the_key_draws(tmp_path: Path) -> None:
    net = prompt_net(tmp_path)
    assert net.names == ("model.virtual_tokens.0.weight",)
    assert net.parameter(net.names[0]).shape == (3, 32)
    table = net.model.get_input_embeddings().weight
    found = [int((table == row).all(1).nonzero()[0, 0]) for row in net.parameter(net.names[0])]
    assert len(set(found)) == 3
    assert all(net.tokenizer.decode([token]).isalpha() for token in found)
    assert torch.equal(net.parameter(net.names[0]), prompt_net(tmp_path).parameter(net.names[0]))
    assert not torch.equal(net.parameter(net.names[0]), prompt_net(tmp_path, seed=1).parameter(net.names[0]))
    assert net.positions == 1024 - 3


@pytest.mark.parametrize("deep", [False, True])
def test_it_begins_at_a_text_or_at_normal_numbers(deep: bool, tmp_path: Path) -> None:
    net = prompt_net(tmp_path, init="text", text="Hi", tokens=5, deep=deep)
    table = net.model.get_input_embeddings().weight
    assert len(net.names) == (2 if deep else 1)
    assert all(torch.equal(p, table[[72, 105, 72, 105, 72]]) for _, p in net.parameters())
    drawn = prompt_net(tmp_path, init="normal", tokens=200).parameter(net.names[0]).detach()
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.1)
    assert abs(float(drawn.mean())) < 1e-3
    with pytest.raises(ModelError, match="no tokens"):
        Prompt(init="text", text="x").adapt(tiny_model(), Key.root(0), Source(_Empty(), tmp_path))  # type: ignore[arg-type]


class _Empty:
    """A tokenizer that finds no tokens."""

    def __call__(self, text: str, **fields: Any) -> dict[str, list[int]]:
        return {"input_ids": []}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_net_without_weights_has_the_same_tokens(architecture: str, deep: bool, tmp_path: Path) -> None:
    kind, fields = ARCHITECTURES[architecture]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | fields))).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    whole, hollow = prompt_net(tmp_path, deep=deep), prompt_net(tmp_path, deep=deep, hollow=True)
    assert hollow.names == whole.names
    assert all(torch.equal(hollow.base[name], whole.base[name]) for name in whole.names)
    assert digest(hollow) == digest(whole)
    empty, _, _ = load(str(tmp_path), empty=True)
    assert whole.view.trained(empty) == {name: tuple(p.shape) for name, p in whole.parameters()}


def test_the_base_is_untouched_after_a_run_and_reset_brings_the_start_back(tmp_path: Path) -> None:
    net = prompt_net(tmp_path / "start")
    start = net.state_sha256()
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    federation = Federation(FedAvg(lr=1e-2, steps=2, batch_size=4), net, tmp_path / "run", rounds=1).run()
    federation.method.materialise(federation.state, net)
    for name, parameter in net.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in net.names), name
    net.reset()
    assert net.state_sha256() == start


@pytest.mark.parametrize(
    "method",
    [
        FedKSeed(seeds=64, lr=1e-3, eps=1e-3, steps=2, law="lowrank", together=True),
        FedZO(seeds=64, lr=1e-3, eps=1e-3, steps=2),
    ],
    ids=lambda method: method.name,
)
def test_methods_that_probe_train_it(method: Method, tmp_path: Path) -> None:
    net = prompt_net(tmp_path / "start")
    method.fits(net)
    start = net.state_sha256()
    federation = Federation(method, net, tmp_path / "run", rounds=1, sizes=(8, 8)).run()
    method.materialise(federation.state, net)
    assert all(visit.error is None for at in federation.history for visit in at.visits.values())
    assert net.state_sha256() != start


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_peft_loads_what_is_saved_and_computes_the_same(tmp_path: Path, dtype: str) -> None:
    peft = pytest.importorskip("peft")
    net = prompt_net(tmp_path / "start", dtype=dtype)
    put(net, WORDS)
    with torch.no_grad():
        net.parameter(net.names[0]).add_(0.1)
    net.save(tmp_path / "saved")
    found, kind = logits(net.model), getattr(torch, dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=kind)
    assert not any("virtual" in name for name in plain.state_dict())
    assert all(torch.equal(p, net.model.get_parameter(name)) for name, p in plain.named_parameters())
    close = 1e-5 if dtype == "float32" else 3e-2
    assert (logits(plain) - found).abs().max() > 5 * close
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "saved" / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(adapted)[:, 3:], found, atol=close, rtol=0)
    if dtype == "float32":
        fields: dict[str, Any] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "do_sample": False}
        assert torch.equal(adapted.generate(**fields, max_new_tokens=5), net.model.generate(**fields, max_new_tokens=5))


@pytest.mark.parametrize("deep", [False, True])
def test_a_saved_folder_is_opened_with_its_prompt_or_not_at_all(deep: bool, tmp_path: Path) -> None:
    net = prompt_net(tmp_path / "start", deep=deep)
    with torch.no_grad():
        for _, parameter in net.parameters():
            parameter.add_(0.1)
    net.save(tmp_path / "saved")
    view = saved_in(tmp_path / "saved")
    assert view == Prompt(tokens=3, init="adapter", deep=deep)
    again = Net.open(str(tmp_path / "saved"), view=view)
    assert torch.equal(logits(again.model), logits(net.model))
    again.save(tmp_path / "again")  # and carried on
    assert torch.equal(logits(Net.open(str(tmp_path / "again"), view=view).model), logits(net.model))
    assert saved_in(tmp_path / "start") is None
    for wrong in ({}, {"view": Lora(rank=2)}):
        with pytest.raises(ModelError, match=r"model.view: the weights of .* go with the prompt in its folder adapter"):
            Net.open(str(tmp_path / "saved"), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="does not have 4 virtual tokens of 32 numbers for layer 0"):
        Net.open(str(tmp_path / "saved"), view=Prompt(tokens=4, init="adapter"))


def test_put_aside_it_is_the_plain_model(tmp_path: Path) -> None:
    net = prompt_net(tmp_path)
    prompt = of(net.model)
    assert prompt is not None
    prompt.present = False
    assert torch.equal(logits(net.model), logits(tiny_model()))
    prompt.present = True
    assert not torch.equal(logits(net.model), logits(tiny_model()))


def test_a_deep_prompt_of_what_layers_make_of_words_is_the_words(folder: Path) -> None:
    """And each layer's own are trained."""
    plain, net = Net.open(str(folder)), prompt_net(folder, deep=True)
    assert len(net.names) == 2
    second: Any = plain.model.get_submodule(f"{layers_of(plain.model)}.1")
    made: list[Tensor] = []
    hook = second.register_forward_pre_hook(lambda layer, args, kwargs: made.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        plain.model(input_ids=torch.tensor([WORDS]))
        net.parameter(net.names[1]).copy_(made[0][0])
    hook.remove()
    put(net, WORDS)
    batch, right = batches(net)["open"], batches(net, WORDS)["open"]
    torch.testing.assert_close(loss(net.model, batch), loss(plain.model, right), rtol=2e-6, atol=2e-6)
    loss(net.model, batch).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in net.parameters())
    with torch.no_grad():
        net.parameter(net.names[1]).add_(torch.linspace(-3, 3, 32))
        assert abs(loss(net.model, batch) - loss(plain.model, right)) > 1e-4


def test_packed_rows_are_refused(tmp_path: Path) -> None:
    net = prompt_net(tmp_path)
    row = [Example((65, 66, 67), (68,)), Example((69, 70), (71, 72))]
    with pytest.raises(ModelError, match=r"data.pack: a prompt stands in front of a row"):
        loss(net.model, collate_packed([row], PAD))


class Bare(LlamaForCausalLM):
    """A model that takes tokens alone."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **rest)


class Nowhere(LlamaForCausalLM):
    """A model that has no table of embeddings."""

    def get_input_embeddings(self) -> Any:
        raise NotImplementedError


class Twice(LlamaForCausalLM):
    """A model that looks at its tokens once more."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **rest: Any) -> Any:  # type: ignore[override]
        found = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **rest)
        found.logits = found.logits + (0 if input_ids is None else input_ids[..., None])
        return found


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (Bare, "takes no embeddings (inputs_embeds), so no prompt can stand among them"),
        (Nowhere, "has no input embeddings for a prompt to stand among"),
        (Twice, "computes from more of its tokens than their embeddings"),
    ],
)
def test_a_model_without_a_place_for_it_is_refused_in_a_line(form: type[LlamaForCausalLM], reason: str) -> None:
    model = tiny_model()
    model.__class__ = form
    with pytest.raises(ModelError) as refused:
        Prompt(init="normal").adapt(model, Key.root(0))
    assert str(refused.value) == f"model.view: {form.__name__} {reason}"


def test_settings_that_are_none_are_refused(tmp_path: Path) -> None:
    for wrong in ({"tokens": 0}, {"tokens": 1 << 13}, {"init": "zero"}, {"rank": 4}, {"text": "a"}, {"init": "text"}):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "init" not in wrong else "text|init"):
            Prompt.model_validate(wrong)
    with pytest.raises(ModelError, match=r"model.view.tokens: 1023 leave no room for a row in the 1024 positions"):
        prompt_net(tmp_path, tokens=1023)
    with pytest.raises(ModelError, match="nothing be shared"):
        prompt_net(tmp_path, keep=("*",))
