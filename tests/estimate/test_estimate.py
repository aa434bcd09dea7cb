"""Memory, operations and large models: what is estimated from a config alone."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_folder
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from thinwire import config
from thinwire.cli import app
from thinwire.compare import measure
from thinwire.config import Lora, Run
from thinwire.estimate.costs import estimate
from thinwire.estimate.sketch import Live, one_pass, sketch
from thinwire.model.net import Net
from thinwire.model.quantised import quantised_layers
from thinwire.model.views import AnyView, Core

SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
MIDDLE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}


def config_folder(path: Path, **fields: Any) -> Path:
    """A folder with a config.json and nothing else."""
    LlamaConfig(vocab_size=32000, **({"num_key_value_heads": 8} | fields)).save_pretrained(path)
    return path


def run_of(model: Path, method: dict[str, Any], **data: Any) -> Run:
    table = {"path": "absent.jsonl", "clients": 4, "max_length": 64} | data
    return config.parse({"model": {"path": str(model)}, "data": table, "method": method, "rounds": 3})


def test_a_preference_costs_two_rows(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", **SEVEN)
    one, two = (estimate(run_of(folder, {"name": "fedavg", "steps": 3}, loss=loss)) for loss in ("answer", "dpo"))
    assert two.flops == pytest.approx(2 * one.flops)
    assert one.client is not None
    assert two.client is not None
    assert two.client.total > one.client.total
    assert two.batch == one.batch


@pytest.mark.parametrize(
    ("fields", "size"), [(SEVEN | {"num_key_value_heads": 32}, 6_738_415_616), (SEVENTY, 68_976_648_192)]
)
def test_a_large_model_needs_its_config_alone(tmp_path: Path, fields: dict[str, Any], size: int) -> None:
    found = estimate(run_of(config_folder(tmp_path / "model", **fields), {"name": "fedavg", "batch_size": 1}))
    assert (found.parameters, found.trained) == (size, size)
    assert found.client is not None
    assert found.traffic is not None
    assert (found.client.weights, found.client.gradients, found.client.optimiser) == (4 * size, 4 * size, 8 * size)
    assert 0 < found.traffic.newcomer[0].least - 4 * size < 1e5
    # six operations a weight and token, forward and backward, but for the embedding's, and the scores of attention
    assert found.flops == pytest.approx(6 * size * 10 * 64, rel=0.08)
    low, high = found.link_seconds(100) or (0.0, 0.0)
    assert low == pytest.approx(8 * 8 * size / 1e8, rel=0.01)
    assert high - low < 1e-5


@pytest.mark.parametrize(
    ("fields", "replies"),
    [
        ({"aggregation": "mean"}, 0),
        ({"aggregation": {"kind": "clipped", "bound": 1.0}}, 0),
        ({"aggregation": "median"}, 4),
        ({"aggregation": "clipped", "cohort": {"kind": "uniform", "n": 3}}, 3),
        ({"federation": {"weights": {"cap": 0.5}}}, 4),
        ({"federation": {"weights": {"by": "equal"}}}, 0),
    ],
)
def test_replies_that_are_read_side_by_side_stay_until_the_round_has_ended(
    fields: dict[str, Any], replies: int, tmp_path: Path
) -> None:
    method = {"name": "fedavg", "batch_size": 1} | {n: v for n, v in fields.items() if n == "aggregation"}
    run = run_of(config_folder(tmp_path / "model", **MIDDLE), method)
    others = {name: value for name, value in fields.items() if name != "aggregation"}
    run = config.parse(tomllib.loads(run.to_toml()) | others)
    found = estimate(run)
    assert found.kept is not None
    assert found.kept == pytest.approx(replies * 4 * found.trained, rel=1e-3)


def loss_of(model: Any) -> torch.Tensor:
    """At eight positions of three rows of forty tokens."""
    ids, mask = torch.zeros((3, 40), dtype=torch.int64), torch.ones((3, 40), dtype=torch.int64)
    mask[0, 0] = 0  # batches are padded; where nothing is, torch takes a leaner way
    positions, kept = torch.arange(40).expand(3, 40), torch.arange(31, 39)
    out = model(ids, mask, position_ids=positions, use_cache=False, logits_to_keep=kept).logits
    return torch.nn.functional.cross_entropy(out.float().flatten(0, 1), torch.zeros(24, dtype=torch.int64))


def test_the_pass_of_a_deep_model_is_that_of_two_layers_drawn_out(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", num_hidden_layers=5)
    run = run_of(tmp_path / "model", {"name": "fedavg"})
    estimated = one_pass(sketch(run), 3, 40, 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    live = Live(list(model.parameters()))
    with live, FlopCounterMode(display=False) as counter:
        loss = loss_of(model)
        assert live.now == pytest.approx(estimated.kept, rel=0.02)
    assert loss.item() > 0
    assert counter.get_total_flops() == estimated.flops


def test_factors_have_the_names_and_shapes_of_a_view(tmp_path: Path) -> None:
    from thinwire import assemble

    tiny_folder(tmp_path / "model")
    run = run_of(tmp_path / "model", {"name": "fedavg"})
    run = run.model_copy(update={"model": run.model.model_copy(update={"lora": Lora(rank=3), "view": Lora(rank=3)})})
    net: Net = assemble.net_of(run)
    assert {n: p.shape for n, p in net.parameters()} == {n: t.shape for n, t in sketch(run).trained.items()}
    frozen, whole = one_pass(sketch(run), 2, 40, 8, run.model.view.factors), one_pass(sketch(run), 2, 40, 8)
    assert frozen.kept < whole.kept


@pytest.mark.parametrize(
    "view", [Lora(rank=3), Lora(rank=3, freeze_a=True), Core(rank=3, targets=("q_proj", "v_proj"))]
)
def test_a_factor_that_stays_as_it_is_is_in_memory_and_asks_for_no_activations(view: AnyView, tmp_path: Path) -> None:
    """FFA-LoRA's A, and both sides of a core: counted as weights, and no gradient of theirs needs what goes in."""
    from thinwire import assemble

    tiny_folder(tmp_path / "model")
    run = run_of(tmp_path / "model", {"name": "fedavg"})
    run = run.model_copy(update={"model": run.model.model_copy(update={"view": view})})
    net, model = assemble.net_of(run), sketch(run)
    assert {n: p.shape for n, p in net.parameters()} == {n: t.shape for n, t in model.trained.items()}
    assert model.weight_bytes == sum(p.nbytes for p in net.model.parameters())
    live = Live(list(net.model.parameters()))
    with live:
        loss = loss_of(net.model)
        assert live.now == pytest.approx(one_pass(model, 3, 40, 8, view.factors).kept, rel=0.02)
    assert loss.item() > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_weighs_what_it_says(tmp_path: Path, bits: int) -> None:
    from thinwire import assemble

    tiny_folder(tmp_path / "model", hidden_size=64, num_attention_heads=4)
    run = run_of(tmp_path / "model", {"name": "fedavg"})
    run = run.model_copy(
        update={"model": run.model.model_copy(update={"lora": Lora(rank=3), "view": Lora(rank=3), "bits": bits})}
    )
    net: Net = assemble.net_of(run)
    there = sum(p.nbytes for p in net.model.parameters())
    for layer in quantised_layers(net.model).values():
        if bits == 4:
            there += layer.weight.quant_state.absmax.nbytes
    assert sketch(run).weight_bytes == there


def test_the_command_says_it_as_tables_and_as_json(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", **MIDDLE)
    (tmp_path / "run.toml").write_text(run_of(folder, {"name": "fedkseed", "seeds": 64}).to_toml())
    shown = CliRunner().invoke(app, ["estimate", str(tmp_path / "run.toml"), "method.steps=5"])
    assert shown.exit_code == 0, shown.output
    for word in ("a newcomer's visit", "100 Mbit/s", "activations", "TFLOP", "assumed"):
        assert word in shown.output
    printed = CliRunner().invoke(app, ["estimate", str(tmp_path / "run.toml"), "--json"])
    found = json.loads(printed.output)
    parts = ("weights", "gradients", "optimiser", "activations", "runtime")
    assert found["client"]["total"] == sum(found["client"][part] for part in parts)
    wrong = CliRunner().invoke(app, ["estimate", str(tmp_path / "run.toml"), "model.path=/nowhere"])
    assert wrong.exit_code == 2
    assert wrong.output.startswith("thinwire: model.path: no config at /nowhere")
    assert wrong.output.count("\n") == 1


def test_of_a_users_own_method_nothing_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "silent.py").write_text(
        "from thinwire.core import Method\nfrom thinwire.wire import Stale\n"
        "class Silent(Method):\n    Down = Up = State = Stale\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = estimate(run_of(config_folder(tmp_path / "model", **MIDDLE), {"path": "silent:Silent"}))
    assert (found.traffic, found.client, found.server) == (None, None, None)
    assert found.plain()["flops"] is None


def errors(cases: dict[str, Run], folder: Path) -> list[float]:
    """Print the table of the estimate against what is measured; the relative errors."""
    found = []
    for name, run in cases.items():
        cost, estimated = measure.measure(run, [0], folder / name.replace(" ", "-")), estimate(run)
        for side, measured in (("client", cost.client_memory), ("server", cost.server_memory)):
            memory = getattr(estimated, side)
            found.append(memory.total / measured - 1)
            print(  # noqa: T201
                f"{name:32} {side} {memory.total / 1e6:8.1f} MB, measured {measured / 1e6:8.1f}: {found[-1]:+.1%}"
            )
    return [abs(error) for error in found]


def test_memory_against_measurement(tmp_path: Path) -> None:
    from tiny import tiny_rows, write_jsonl

    fields = MIDDLE | {"num_key_value_heads": 8, "vocab_size": 32000}
    tiny_folder(tmp_path / "model", **fields)
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(24))
    tree: dict[str, Any] = {
        "rounds": 2,
        "threads": 1,
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": str(rows), "clients": 1, "heldout": 0, "max_length": 64},
    }
    case = config.parse(tree | {"method": {"name": "fedavg", "steps": 2, "batch_size": 4}})
    assert max(errors({"fedavg": case}, tmp_path)) < 0.25


@pytest.mark.long
@pytest.mark.real
def test_memory_against_measurement_on_the_real_model(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from estimate import MODEL, cases, write_rows  # type: ignore[attr-defined]

    from thinwire.model.errors import ModelError
    from thinwire.model.resolve import resolve

    try:
        resolve(MODEL)
    except ModelError as error:
        pytest.skip(str(error))
    found = sorted(errors(cases(MODEL, write_rows(tmp_path / "rows.jsonl")), tmp_path))
    assert found[len(found) // 2] < 0.15
    assert found[-1] < 0.25
