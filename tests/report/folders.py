"""Run folders as the runtime leaves them, written by hand: no model is needed to report on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SECRET = "the patient of room 12"  # stands in held-out rows, and nowhere else


def run_folder(path: Path, name: str = "fedavg", seed: int = 0, rounds: int = 4, **eval: Any) -> Path:
    """A run of two clients whose loss falls from 2; `eval` are fields of its table [eval]."""
    path.mkdir(parents=True)
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in eval.items())
    (path / "run.toml").write_text(
        f'name = "{name}"\nseed = {seed}\nrounds = {rounds}\n'
        f'[model]\npath = "tiny"\n[data]\npath = "rows.jsonl"\n[method]\nname = "{name}"\nlr = 0.001\n[eval]\n{table}'
    )
    lines = [
        {
            "round": round,
            "clients": [
                {
                    "id": i,
                    "name": f"site-{i}",
                    "bytes_down": 500,
                    "bytes_up": 300,
                    "seconds": 1.0,
                    "loss": 2.0 / round + i,
                }
                for i in range(2)
            ],
            "bytes_down": 1000,
            "bytes_up": 600,
            "seconds": 2.5,
            "peak_memory_bytes": 30_000_000,
            "metrics": {"loss": 2.0 / round},
        }
        for round in range(1, rounds + 1)
    ]
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evals = [
        {
            "round": round,
            "split": "heldout",
            "loss": 2.0 / (1 + round),
            "perplexity": None,
            "accuracy": 0.5 + round / 10,
            "rouge_l": None,
            "bleu": None,
            "rows": 8,
            "samples": [{"prompt": SECRET, "expected": "well", "answer": f"answer {round}"}],
            "public": [{"prompt": "How are </script> you?", "answer": f"<b>fine</b> {round}"}],
        }
        for round in (0, rounds)
    ]
    (path / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evals))
    return path


def agreed_folder(path: Path, clients: int = 6) -> Path:
    """A run under an agreement, with scores of each client but for one that withholds them, and contributions."""
    run_folder(path, "agreed", rounds=4)
    rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    names = ["north", "south", "the-hospital-with-a-long-name.example", *(f"site-{i}" for i in range(3, clients))]
    shares = [0.4, 0.25, 0.15, *[0.2 / (clients - 3)] * (clients - 3)]
    for record in rounds:
        visit = record["clients"][0]
        record["clients"] = [
            visit | {"id": i, "name": names[i], "examples": 100 * (i + 1), "loss": 1.0 + i / record["round"]}
            for i in range(clients)
        ]
        for i, each in enumerate(record["clients"]):
            each |= {"share": shares[i], "why": "by examples, capped from 0.61, leant from 0.4 by a loss of 2.313"}
    gone = rounds[1]["clients"][1]
    gone["error"] = "the engine did not answer"
    del gone["share"], gone["why"]
    (path / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rounds))
    with (path / "evals.jsonl").open("a") as file:
        for round in (0, 2, 4):
            each = [
                {"id": i, "name": names[i], "rows": 10 + i, "loss": 3.0 - round / 4 + i / 5, "accuracy": 0.5}
                for i in range(clients)
                if i != 3
            ]
            line = {"round": round, "split": "sites", "loss": 3.0 - round / 4, "accuracy": 0.5, "rows": 60}
            more = {"sites": clients, "samples": [], "each": each, "withheld": [names[3], names[1]][:1]}
            file.write(json.dumps(line | more) + "\n")
    worth = {
        str(i): {"name": name, "leave_one_out": 0.01 * i, "shapley": 0.02 * i - 0.03, "error": 0.004}
        for i, name in enumerate(names)
    }
    found = {"round": 4, "rows": 8, "orders": 50, "before": 2.0, "after": 1.9, "clients": worth}
    (path / "contributions.json").write_text(json.dumps(found))
    losses: dict[str, list[float | None]] = {
        name: [2.0 + abs(i - j) / 5 if j != 3 else None for j in range(clients)] for i, name in enumerate(names)
    }
    each_alone = {str(i): {"name": name, "losses": losses[name]} for i, name in enumerate(names)}
    matrix = {"round": 4, "rows": dict.fromkeys(names, 10), "together": losses[names[0]], "clients": each_alone}
    (path / "cross.json").write_text(json.dumps(matrix))
    summary = {"rounds": 4, "ended": "the loss on heldout is 0.4000", "kept": {"round": 3, "on": "selection"}}
    (path / "summary.json").write_text(json.dumps(summary))
    return path
