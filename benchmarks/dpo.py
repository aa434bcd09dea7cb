"""DPO against trl's DPOTrainer: the losses of one client's steps in float32, on the same rows in the same order.

    python benchmarks/dpo.py [model.path=FOLDER] [data.rows=100 ...] [--lr 1e-5] [--steps 20] [--json FILE]

It needs trl, which thinwire does not: pip install --no-deps --target FOLDER trl, and PYTHONPATH=FOLDER.

Rows and model are those of recipes/dpo-movie-reviews.toml, but all parameters are trained: AdamW without decay, at a
constant rate, gradients of norm 1 at most, no dropout. trl makes its own tokens, and holds a second model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

from rows import Row, finish

from thinwire import assemble, config
from thinwire.data.batch import Dataset
from thinwire.keys import Key
from thinwire.model.net import Net
from thinwire.model.resolve import resolve
from thinwire.train.local import Rule, train_locally

RECIPE = Path(__file__).parent.parent / "recipes" / "dpo-movie-reviews.toml"
SIZE, CLIP = 4, 1.0


def ours(net: Net, data: Dataset, steps: int, lr: float) -> list[float]:
    """The losses of our steps, whose batches take the rows in order, pass after pass."""
    found: list[float] = []
    places = (range(at * SIZE, (at + 1) * SIZE) for at in count())
    batches = (data.collated([data.examples[i % len(data)] for i in place]) for place in places)
    train_locally(
        net.model, [p for _, p in net.parameters()], batches, Rule("adamw", lr, steps, clip=CLIP), losses=found
    )
    return found


def theirs(folder: Path, data: Dataset, beta: float, steps: int, lr: float) -> tuple[list[float], list[float], Any]:
    """The losses of trl's steps, the reference margins that it computes, and the rows as it has them."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        {"prompt": e.text, "chosen": tokenizer.decode(e.answer), "rejected": tokenizer.decode(e.rejected)}
        for e in data.examples
    ]
    found: list[float] = []

    class Watched(DPOTrainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            found.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
            return loss

    with tempfile.TemporaryDirectory() as place:
        settings = DPOConfig(
            place,
            beta=beta,
            max_steps=steps,
            per_device_train_batch_size=SIZE,
            learning_rate=lr,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            train_sampling_strategy="sequential",
            precompute_ref_log_probs=True,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = datasets.Dataset.from_list(texts)
        trainer = Watched(model, args=settings, train_dataset=rows, processing_class=tokenizer)
        held = trainer.train_dataset
        references = [row["ref_chosen_logps"] - row["ref_rejected_logps"] for row in held]
        trainer.train()
    return found, references, held


def main() -> None:
    """All rows."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--steps", type=int, default=20)
    asked.add_argument("--lr", type=float, default=1e-5)
    asked.add_argument("--json")
    known, words = asked.parse_known_args()
    run = config.load(RECIPE, ["data.clients=1", "data.heldout=0", "data.rows=100", *words])
    plain = run.model_copy(update={"model": run.model.model_copy(update={"lora": None, "view": config.Full()})})
    net = assemble.net_of(plain)
    rows = next(iter(assemble.rows_of(run.data, Key.root(run.seed)).clients.values()))
    order = Key.root(run.seed).fold("benchmark").permutation(len(rows))  # the set has all its positive rows first
    data = assemble.client_data(plain, [rows[i] for i in order], net)
    began = time.perf_counter()
    mine = ours(net, data, known.steps, known.lr)
    middle = time.perf_counter()
    their, references, held = theirs(resolve(run.model.path), data, run.data.beta, known.steps, known.lr)
    ended = time.perf_counter()
    for row, example in zip(held, data.examples, strict=True):
        tokens = (example.prompt, example.answer, example.rejected)
        assert tokens == tuple(tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")), example.place
    apart = [abs(e.reference - other) for e, other in zip(data.examples, references, strict=True)]
    lines = [Row(f"loss, step {i}", a, b, "nats") for i, (a, b) in enumerate(zip(mine, their, strict=True), 1)]
    most = max(abs(line.ours - line.reference) for line in lines)
    lines.append(Row("largest difference of the losses, of 1e-4 allowed", most, 1e-4, "nats"))
    lines.append(Row("largest difference of the references", max(apart), 1e-3, "nats"))
    lines.append(Row("seconds", middle - began, ended - middle, "s"))
    finish(lines)
    if most > 1e-4:
        raise SystemExit("the losses differ by more than 1e-4")


if __name__ == "__main__":
    main()
