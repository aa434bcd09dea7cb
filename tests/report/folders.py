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
