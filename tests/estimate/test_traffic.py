"""Bytes estimated before a run, against the bytes of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHOICES, tiny_encoder, tiny_folder, tiny_rows, write_jsonl

from thinwire import assemble, config, wire
from thinwire.config import Run
from thinwire.costs.frames import Span
from thinwire.estimate.costs import estimate
from thinwire.estimate.traffic import Traffic, verdict
from thinwire.methods.fedavg import Weights
from thinwire.runtime.course import Watch, train

LORA: dict[str, Any] = {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}
ON_FACTORS: dict[str, dict[str, Any]] = {  # how a method on the view of LORA is set
    "rolora": {},
    "fedex": {"lr": 1e-2, "steps": 3},  # after one small step nothing is lacking, and nothing of the base is sent
    "flora": {"ranks": {"1": 1}},
    "flexlora": {"ranks": {"1": 1}},
    "slora": {"first": 0.5},
}
TIED: dict[str, Any] = {"kind": "tied", "numbers": 3000, "targets": ["q_proj", "v_proj"]}
CORE: dict[str, Any] = {"kind": "core", "rank": 4, "targets": ["q_proj", "v_proj"]}
PROMPT: dict[str, Any] = {"kind": "prompt", "tokens": 4}
EXACT: dict[str, dict[str, Any]] = {
    "fedavg": {"method": {"name": "fedavg", "steps": 1}},
    "fedit": {
        "method": {"name": "fedavg", "steps": 1},
        "model": {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}},
    },
    "fedavg, a factor of which stays": {
        "method": {"name": "fedavg", "steps": 1},
        "model": {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"], "keep": ["*.B"]}},
    },
    "ffa-lora": {
        "method": {"name": "fedavg", "steps": 1},
        "model": {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"], "freeze_a": True}},
    },
    **{name: {"method": {"name": name, "steps": 1, **fields}, "model": LORA} for name, fields in ON_FACTORS.items()},
    "fedavg on a tied view": {"method": {"name": "fedavg", "steps": 1}, "model": {"view": TIED}},
    "fedavg on cores": {"method": {"name": "fedavg", "steps": 1}, "model": {"view": CORE}},
    "fedavg on a prompt": {"method": {"name": "fedavg", "steps": 1}, "model": {"view": PROMPT}},
    "fedpeptao": {
        "method": {"name": "fedpeptao", "steps": 1, "share": 0.5},
        "model": {"view": PROMPT | {"deep": True}},
    },
    "onebit": {"method": {"name": "onebit", "steps": 1}, "model": {"view": TIED}},
    "onebit, merged": {"method": {"name": "onebit", "steps": 1, "merge_every": 1}, "model": {"view": TIED}},
    "onebit, probed": {"method": {"name": "onebit", "steps": 1, "gradient": {"1": "probe"}}, "model": {"view": TIED}},
    "onebit over all weights": {
        "method": {"name": "onebit", "steps": 1, "code_down": {"name": "blocks", "bits": 4}},
        "model": {"dtype": "bfloat16", "view": {"kind": "tied", "numbers": 3000, "over": "weights"}},
    },
    "fedelmy": {"method": {"name": "fedelmy", "steps": 1}},
    "scaffold": {"method": {"name": "scaffold", "steps": 1}},
    "fedobd in 32 bits": {"method": {"name": "fedobd", "steps": 1, "codec": "none", "dropout": 0.0}},
    "fedzo": {"method": {"name": "fedzo", "steps": 2, "law": "sign"}},
    "fedkseed on the paper's wire": {
        "method": {"name": "fedkseed", "seeds": 64, "steps": 3, "wire": "paper", "pro": True}
    },
}
LOSSY: dict[str, Any] = {"lr": 1e-3, "steps": 2, "dtype": "bfloat16", "start": "shared"}
CODECS = (("lowrank", 4), ("blocks", 8), ("eden", 1), ("topk", 4))
CODED: dict[str, dict[str, Any]] = {
    "components": {},
    "EDEN, down too": {"codec": "eden", "downlink": "coded"},
    "none": {"codec": "none"},
}
AROUND: dict[str, dict[str, Any]] = {
    "exact": {"around": "exact"},
    "7bit": {"dtype": "bfloat16"},
    "8bit, raw": {"coded": False, "around": "8bit"},
    "alone": {"common": 0, "coded": False},
    "4bit, shared": {"around": "4bit", "start": "shared"},
}
RANGE: dict[str, dict[str, Any]] = {
    "fedkseed": {"method": {"name": "fedkseed", "lr": 1e-5, "seeds": 512, "steps": 30}},
    "fedkseed, pro": {"method": {"name": "fedkseed", "lr": 1e-5, "seeds": 512, "steps": 30, "pro": True}},
    "fedkseed, tied": {"method": {"name": "fedkseed", "lr": 1e-5, "seeds": 512, "steps": 30, "law": "tied"}},
    "feedsign": {"method": {"name": "feedsign", "steps": 20}},
    "ferret": {"method": {"name": "ferret", "lr": 1e-3, "steps": 1, "seeds": 50, "coordinates": 300}},
    "onebit, ternary": {
        "method": {"name": "onebit", "steps": 1, "code": {"name": "ternary", "part": 0.5}},
        "model": {"view": TIED},
    },
    "fedpeptao, its share unknown": {
        "method": {"name": "fedpeptao", "steps": 1, "lanczos": 2},
        "model": {"view": PROMPT | {"deep": True}},
    },
    "feddm": {"method": {"name": "feddm", "steps": 1, "server_steps": 1}},
    "feddm on factors": {"method": {"name": "feddm", "steps": 1, "server_steps": 1}, "model": LORA},
    "hetlora": {"method": {"name": "hetlora", "steps": 1, "ranks": {"1": 1}, "keep": 0.7}, "model": LORA},
    "fedobd": {"method": {"name": "fedobd", "lr": 1e-3, "steps": 2, "dropout": 0.4}},
    "fedobd, two stages": {
        "method": {"name": "fedobd", "lr": 1e-4, "steps": 2, "stage_one": 2, "down": "weights", "unsent": "senders"}
    },
    "fedobd, blocks in 32 bits": {"method": {"name": "fedobd", "steps": 1, "codec": "none"}},
    "gradualdiff": {"method": {"name": "gradualdiff", "lr": 1e-4, "steps": 2, "dtype": "bfloat16"}},
    "gradualdiff, shared": {"method": {"name": "gradualdiff", "lr": 1e-3, "steps": 2, "start": "shared"}},
    **{
        f"gradualdiff, {codec}": {"method": {"name": "gradualdiff", **LOSSY, "codec": codec, "bits": bits}}
        for codec, bits in CODECS
    },
    "gradualdiff, lowrank, down at twice the rank": {
        "method": {"name": "gradualdiff", **LOSSY, "codec": "lowrank", "rank": 4, "down_rank": 8}
    },
    **{
        f"fedcybgd, {name}": {"method": {"name": "fedcybgd", "lr": 1e-4, "steps": 2, "blocks": 2, **fields}}
        for name, fields in AROUND.items()
    },
    **{
        f"cgfed, {name}": {"method": {"name": "cgfed", "steps": 2, **fields}, "model": {"lora": {"rank": 2}}}
        for name, fields in CODED.items()
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traffic")
    tiny_folder(folder / "model")
    write_jsonl(folder / "rows.jsonl", tiny_rows(300, closed=True))
    return folder


def run_of(place: Path, changes: dict[str, Any], **fields: Any) -> Run:
    tree: dict[str, Any] = {
        "rounds": 4,
        "threads": 1,
        "cohort": {"kind": "uniform", "n": 2},
        "model": {"path": str(place / "model"), **changes.get("model", {})},
        "data": {
            "path": str(place / "rows.jsonl"),
            "partition": "dirichlet",
            "clients": 3,
            "prompt": "{input}: it was",
            "answer": " {output}",
            "choices": list(CHOICES),
            "max_length": 64,
        },
        "method": changes["method"],
        "eval": {"rows": 2},
    }
    return config.parse(tree | fields)


def bytes_of(run: Run, folder: Path) -> tuple[int, int]:
    train(assemble.begin(*assemble.prepared(run)).job(folder, Watch()))
    summary = json.loads((folder / "summary.json").read_text())
    return summary["bytes_down"], summary["bytes_up"]


@pytest.mark.parametrize("name", EXACT)
def test_frames_of_fixed_size_are_known_to_the_byte(place: Path, tmp_path: Path, name: str) -> None:
    run = run_of(place, EXACT[name])
    estimated = estimate(run).traffic
    assert estimated is not None
    assert all(span.exact for span in estimated.total)
    assert (estimated.total[0].least, estimated.total[1].least) == bytes_of(run, tmp_path / "run")


@pytest.mark.parametrize("lora", [None, {"rank": 2, "targets": ["query", "value"]}])
@pytest.mark.parametrize("at_hand", [True, False])
def test_a_classifiers_frames_are_known_too(place: Path, tmp_path: Path, lora: Any, at_hand: bool) -> None:
    tiny_encoder(tmp_path / "encoder")
    run = run_of(place, EXACT["fedavg"] | {"model": {"path": str(tmp_path / "encoder"), "lora": lora}})
    update = {"choices": None if at_hand else CHOICES, "prompt": None, "answer": None}
    run = run.model_copy(update={"data": run.data.model_copy(update=update)})
    estimated = estimate(run)
    assert estimated.traffic is not None
    settled = assemble.prepared(run)[0]
    assert (estimated.traffic.total[0].least, estimated.traffic.total[1].least) == bytes_of(settled, tmp_path / "run")
    assert estimated.trained == sum(p.numel() for _, p in assemble.net_of(settled).parameters())
    assert estimated.flops > 0


@pytest.mark.parametrize("view", [TIED, CORE, PROMPT], ids=lambda view: view["kind"])
def test_what_stands_beside_layers_and_is_not_trained_is_counted(place: Path, view: Any) -> None:
    run = run_of(place, {"method": {"name": "fedavg", "steps": 1}, "model": {"view": view}})
    estimated, net = estimate(run), assemble.net_of(assemble.prepared(run)[0])
    assert estimated.trained == net.size
    assert estimated.parameters == sum(p.numel() for p in net.model.parameters())


@pytest.mark.parametrize("name", RANGE)
def test_what_is_entropy_coded_is_within_its_range(place: Path, tmp_path: Path, name: str) -> None:
    run = run_of(place, RANGE[name])
    estimated = estimate(run).traffic
    assert estimated is not None
    down, up = bytes_of(run, tmp_path / "run")
    assert estimated.total[0].holds(down), (estimated.total[0], down)
    assert estimated.total[1].holds(up), (estimated.total[1], up)


def test_without_the_rows_the_counts_of_examples_are_a_range(place: Path) -> None:
    run = run_of(place, EXACT["fedavg"])
    data = run.data.model_copy(update={"path": str(place / "absent.jsonl")})
    estimated = estimate(run.model_copy(update={"data": data}))
    assert estimated.traffic is not None
    down, up = estimated.traffic.total
    assert down.exact
    assert up.most - up.least == 2 * estimated.traffic.visits  # a count takes one byte to three
    assert any("not at hand" in text for text in estimated.assumed)


def test_the_length_of_a_frame_needs_no_numbers() -> None:
    real = {"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.bfloat16)}
    hollow = {name: tensor.to("meta") for name, tensor in real.items()}
    where = {"run": 1 << 31, "round": 300, "client": 5, "held": "x"}
    assert wire.frame.length(Weights(hollow, 0.5), **where) == len(wire.encode(Weights(real, 0.5), **where))


def test_the_verdict_is_a_hit_or_by_how_much_it_was_missed() -> None:
    estimated = Traffic((Span(1, 1),) * 2, (Span(1, 1),) * 2, (Span(100, 200), Span(50, 50)), 1)
    assert verdict(estimated, 150, 50) == "bytes against the estimate: down hit (range 1 to 2.0), up hit"
    assert verdict(estimated, 220, 40) == "bytes against the estimate: down missed by +10.0%, up missed by -20.0%"
