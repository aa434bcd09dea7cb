"""Runs on pairs: an encoder's embeddings under methods of every kind, what is carried away, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WORDS, tiny_encoder, tiny_folder
from transformers import AutoModel, AutoTokenizer

from thinwire import assemble, config
from thinwire.assemble import adapters, thin
from thinwire.config import ConfigError
from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.estimate.costs import estimate
from thinwire.evaluate.splits import Split, answers, evaluate
from thinwire.leaks.audit import Size, check
from thinwire.model import numbers
from thinwire.model.errors import ModelError
from thinwire.runtime.course import Watch, read_records, train
from thinwire.train import parallel
from thinwire.train.objective import embeddings, loss

LOCAL: dict[str, Any] = {"lr": 3e-3, "steps": 6, "batch_size": 8}
LORA = {"lora": {"rank": 4, "targets": ["query", "value"]}}
TIED = {"view": {"kind": "tied", "numbers": 256, "rank": 2, "targets": ["query", "value", "dense"]}}
FEDKSEED = {"name": "fedkseed", "seeds": 64, "lr": 3e-3, "steps": 12, "batch_size": 8}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedavg": ({"name": "fedavg", **LOCAL}, {}),
    "recomputing": ({"name": "fedavg", **LOCAL, "recompute": True}, {}),
    "fedit": ({"name": "fedavg", **LOCAL, "lr": 1e-2}, LORA),
    "onebit": ({"name": "onebit", **LOCAL, "lr": 0.02}, TIED),
    "gradualdiff": ({"name": "gradualdiff", **LOCAL}, {}),
    "fedkseed": (FEDKSEED, {}),
    "fedkseed, both sides in a pass": ({**FEDKSEED, "together": True, "law": "lowrank"}, {}),
    "fedzo": ({"name": "fedzo", "lr": 3e-3, "steps": 12, "batch_size": 8}, {}),
    "scaffold": ({"name": "scaffold", **LOCAL, "lr": 0.05}, {}),
    "private of a client": ({"name": "fedavg", **LOCAL}, {}),
}
PRIVACY = {"level": "client", "epsilon": 1e4, "delta": 1e-3, "clip": 1.0, "noise": 0.01}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("embeddings") / "encoder")


def rows(negatives: bool = False, lacking: int | None = None) -> assemble.Rows:
    """Two clients whose words have a partner each, and a split of the same."""
    each = []
    for i in range(24):
        word, other, third = (WORDS[(7 * i + k) % 12] for k in (0, 5, 2))
        fields = {"anchor": f"{word}, {i}", "positive": f"the {other} of {i}"}
        fields |= {"negative": f"the {third} of {i}"} if negatives else {}
        if i + 1 == lacking:
            del fields["positive"]
        each.append(Row(fields, "pairs.jsonl", i + 1))
    return assemble.Rows({"north": each[:12], "south": each[12:]}, {"heldout": each[4:16]})


def run_of(path: Path, method: dict[str, Any], model: dict[str, Any] | None = None, **tables: Any) -> config.Run:
    data = {"path": "none", "loss": "contrastive", "max_length": 48} | tables.pop("data", {})
    table = {"path": str(path), **(model or {})}
    return config.parse({"model": table, "data": data, "method": method, "rounds": 2} | tables)


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_trains_embeddings(kind: str, place: Path, tmp_path: Path) -> None:
    method, view = METHODS[kind]
    run = run_of(place, method, view, **({"privacy": PRIVACY} if kind.startswith("private") else {}))
    start = assemble.begin(*assemble.prepared(run, rows(negatives=kind == "fedavg")))
    job = start.job(tmp_path, Watch())
    assert not any(name.startswith("pooler") for name in start.net.names)
    summary = train(job)
    assert not [c["error"] for r in read_records(tmp_path / "rounds.jsonl") for c in r["clients"] if "error" in c]
    (before,), (after,) = summary["first"], summary["final"]
    assert after["loss"] < before["loss"] - 1e-3
    assert after["mrr"] > before["mrr"]
    assert 0 <= after["accuracy"] <= after["mrr"] <= 1
    assert after["recall_10"] >= after["accuracy"]
    carried_away(tmp_path / "model", place, start, after["loss"])


def carried_away(folder: Path, place: Path, start: assemble.Start, ended: float) -> None:
    """A folder of Hugging Face's, whose vectors are those of the net, and which starts a run of its own."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [row.fields["anchor"] for row in start.rows.splits["heldout"]]
    taken = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden, mask = model(**taken).last_hidden_state, taken["attention_mask"][..., None]
    means = (hidden * mask).sum(1) / mask.sum(1)
    again = run_of(folder, {"name": "fedavg"})
    net = assemble.net_of(again)
    (split,) = assemble.splits_of(again, start.rows, net)
    assert evaluate(net, split).loss == pytest.approx(ended, rel=1e-4)
    words = {e.text: i for i, e in enumerate(split.data.examples)}
    vectors = torch.nn.functional.normalize(means, dim=-1)
    batch = split.data.collated(split.data.examples)
    with torch.no_grad():
        mine = embeddings(net.model, batch)[:: batch.candidates]
    torch.testing.assert_close(mine[[words[text] for text in texts]], vectors, atol=1e-5, rtol=1e-4)
    kept, old = load_file(folder / "model.safetensors"), load_file(place / "model.safetensors")
    assert torch.equal(kept["pooler.dense.weight"], old["pooler.dense.weight"])
    assert [each["type"].rpartition(".")[2] for each in json.loads((folder / "modules.json").read_text())] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]


def test_a_thin_file_is_put_back_on_the_encoder(place: Path, tmp_path: Path) -> None:
    start = assemble.begin(*assemble.prepared(run_of(place, *METHODS["onebit"]), rows()))
    summary = train(start.job(tmp_path, Watch()))
    net = start.net
    found = thin.of(assemble.net_of(start.run), numbers.change(net), start.run, None, None, None)
    thin.write(tmp_path / "model.thin", found)
    shelf = thin.Shelf([tmp_path / "model.thin"])
    again, _ = shelf.use("model")
    (split,) = assemble.splits_of(start.run, start.rows, again)
    assert evaluate(again, split).loss == pytest.approx(summary["final"][0]["loss"], rel=1e-4)
    assert shelf.data.loss == "contrastive"


def test_factors_are_an_adapter_for_peft(place: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    method, view = METHODS["fedit"]
    start = assemble.begin(*assemble.prepared(run_of(place, method, view), rows()))
    train(start.job(tmp_path, Watch()))
    alone = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(place), tmp_path / "model" / "adapter")
    whole = AutoModel.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(
            alone(input_ids=ids).last_hidden_state, whole(input_ids=ids).last_hidden_state, atol=1e-5, rtol=1e-4
        )


def test_adapters_of_two_runs_are_merged(place: Path, tmp_path: Path) -> None:
    method, view = METHODS["fedit"]
    nets = [assemble.net_of(run_of(place, method, view, seed=seed)) for seed in (0, 1)]
    for net in nets:
        with torch.no_grad():
            for name, p in net.parameters():
                if "lora_B" in name:
                    p.copy_(torch.full_like(p, 0.1 if net is nets[0] else -0.05))
    adapters.merge([adapters.of_net(tmp_path, net) for net in nets], [1.0, 1.0], tmp_path / "merged")
    plain, whole = AutoModel.from_pretrained(place), AutoModel.from_pretrained(tmp_path / "merged")
    name = "encoder.layer.0.attention.self.query.weight"
    moved = whole.get_parameter(name) - plain.get_parameter(name)
    each = [net.model.get_submodule(name.removesuffix(".weight")).delta() for net in nets]
    torch.testing.assert_close(moved, (each[0] + each[1]) / 2, atol=1e-6, rtol=1e-5)
    assert moved.abs().sum() > 0
    assert (tmp_path / "merged" / "modules.json").exists()


def test_what_is_shown_of_a_row_is_the_nearest_text(place: Path) -> None:
    run = run_of(place, FEDKSEED)
    net = assemble.net_of(run)
    (split,) = assemble.splits_of(run, rows(), net)
    found = answers(net, split.data, 3)
    assert len(found) == 3
    assert {*found} <= {e.references[0] for e in split.data.examples}


def test_columns_of_ones_own(place: Path) -> None:
    """The same tokens from format strings as from the columns' usual names, with and without a negative."""
    own = {"prompt": "{anchor}", "answer": "{positive}"}
    run = run_of(place, FEDKSEED)
    net = assemble.net_of(run)
    usual = assemble.client_data(run, rows(negatives=True).clients["north"], net)
    with_it = run_of(place, FEDKSEED, data={**own, "rejected": "{negative}"})
    without = run_of(place, FEDKSEED, data=own)
    found = assemble.client_data(with_it, rows(negatives=True).clients["north"], net)
    assert found.examples == usual.examples
    assert (usual.scale, usual.beta) == (20.0, None)
    assert {len(e.rejected) for e in assemble.client_data(without, rows(True).clients["north"], net).examples} == {0}


def test_a_decoder_is_refused_in_a_line(tmp_path: Path) -> None:
    run = run_of(tiny_folder(tmp_path / "model"), FEDKSEED)
    for refuse in (lambda: assemble.net_of(run), lambda: assemble.prepared(run, rows()), lambda: estimate(run)):
        with pytest.raises(
            ModelError,
            match=r'^data\.loss: "contrastive" trains an encoder, and the LlamaForCausalLM in [^\n]* is none$',
        ):
            refuse()


def test_a_model_that_pools_otherwise_is_refused(place: Path, tmp_path: Path) -> None:
    other = tiny_encoder(tmp_path / "other")
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    modules += [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (other / "modules.json").write_text(json.dumps(modules))
    (other / "1_Pooling").mkdir()
    (other / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "word_embedding_dimension": 32}')
    with pytest.raises(ModelError, match=r"takes the mean over tokens, and the model in [^\n]* has cls$"):
        assemble.net_of(run_of(other, FEDKSEED))
    (other / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assemble.net_of(run_of(other, FEDKSEED))
    (other / "modules.json").write_text(json.dumps([*modules, {"type": "x.models.Dense", "path": "2_Dense"}]))
    with pytest.raises(ModelError, match=r"has Dense, mean$"):
        assemble.net_of(run_of(other, FEDKSEED))


def test_an_encoder_without_a_pooler_is_as_good(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "bare")
    file = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "pooler" not in n}, file, metadata={"format": "pt"})
    for hollow in (False, True):
        net = assemble.net_of(run_of(folder, {"name": "fedavg"}), hollow=hollow)
        assert not [name for name, _ in net.model.named_parameters() if "pooler" in name]


def test_a_row_without_a_positive_is_named(place: Path) -> None:
    run = run_of(place, FEDKSEED)
    with pytest.raises(DataError, match=r"^pairs\.jsonl:6: field 'positive' is missing \(present: anchor\)$"):
        assemble.clients_data(run, rows(lacking=6), assemble.net_of(run))


@pytest.mark.parametrize("method", [{"name": "fedcybgd", "blocks": 2}, {"name": "feddm"}])
def test_methods_that_do_not_fit_are_refused(method: dict[str, Any], place: Path) -> None:
    run = run_of(place, method)
    with pytest.raises(ConfigError, match=rf"^data\.(loss|choices): [^\n]*{method['name']}[^\n]*$"):
        assemble.clients_data(run, rows(), assemble.net_of(run))


def test_a_batch_in_which_nothing_is_told_apart_is_refused(place: Path) -> None:
    alone = run_of(place, {"name": "fedavg", "batch_size": 1})
    net = assemble.net_of(alone)
    with pytest.raises(ConfigError, match=r"^method\.batch_size: a batch of one pair has no other"):
        assemble.clients_data(alone, rows(), net)
    assert assemble.clients_data(alone, rows(negatives=True), net)
    held = rows()
    held.clients["south"] = held.clients["south"][:1]
    with pytest.raises(DataError, match=r"^pairs\.jsonl:13: the client's only pair"):
        assemble.clients_data(run_of(place, FEDKSEED), held, net)


def test_several_processes_share_directions_and_no_batch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, zeroth = run_of(place, {"name": "fedavg"}), run_of(place, FEDKSEED)
    net = assemble.net_of(first)
    monkeypatch.setattr("thinwire.assemble.datasets.ranks", lambda: (0, 2))
    with pytest.raises(ConfigError, match=r'^data\.loss: "contrastive" is for a client of one process'):
        assemble.clients_data(first, rows(), net)
    assert assemble.clients_data(zeroth, rows(), net)
    assert parallel.ranks() == (0, 1)


def test_an_audit_of_pairs_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.loss: the audit looks for each row's own loss"):
        check(run_of(place, {"name": "fedavg"}), Size())


def test_the_estimate_counts_what_is_trained(place: Path) -> None:
    run = run_of(place, {"name": "fedavg", **LOCAL})
    assert estimate(run).trained == assemble.net_of(run).size


def test_positives_of_a_run_are_scored_as_one_batch(place: Path) -> None:
    """Whatever the size of the batches in which they are read."""
    run = run_of(place, FEDKSEED)
    net = assemble.net_of(run)
    (split,) = assemble.splits_of(run, rows(negatives=True), net)
    with torch.no_grad():
        whole = loss(net.model, split.data.collated(split.data.examples)).item()
    for size in (1, 5, 64):
        assert evaluate(net, Split("heldout", split.data), size).loss == pytest.approx(whole, rel=1e-5)
