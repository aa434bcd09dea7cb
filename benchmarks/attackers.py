"""What hostile clients do to a run, and what each defence leaves of it: final losses, a line of JSON a run.

    python benchmarks/attackers.py --out FILE.jsonl [--methods ...] [--attacks ...] [--defences ...]
                                   [--attackers 0 2 4] [--seeds 0 1 2] [--rounds 3]
    python benchmarks/attackers.py --out FILE.jsonl --table

Twenty clients share 1,200 rows of the film desk, all in each round, on MiniLM with a fresh head; 64 rows are the
server's, 400 are held out. Products are in bfloat16 where the processor has those. The first clients are hostile:

    flip      what they have learnt, backwards
    scale     the same a hundred times as long
    noise     normal numbers, ten times as long as what they have learnt
    labels    honest work on rows whose labels are the wrong ones
    little    "a little is enough" (Baruch et al. 2019, arXiv:1902.06156): the honest clients' mean less one deviation

`little` knows all honest replies of the round. Runs that the file has are not done again, so it goes on where it was;
cells are done seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from cells import read
from torch import Tensor

from thinwire import assemble, config
from thinwire.compress.entropy.packing import to_tensor
from thinwire.core import Averaged, Method
from thinwire.data.bundled import film_desk
from thinwire.keys import Key
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.methods.onebit import NUMBERS, OneBit
from thinwire.records import Record, append, read_records
from thinwire.runtime.course import Course, Job, Watch
from thinwire.runtime.round import Reply, Round, Transport, run_round
from thinwire.train.versions import coded
from thinwire.wire import Frame, decode, encode

Tensors = Mapping[str, Tensor]
CLIENTS, ROWS, PUBLIC, HELDOUT = 20, 1200, 64, 400
LORA = {"kind": "lora", "rank": 8, "alpha": 16.0, "targets": ["query", "value"]}
STEPS: dict[str, Any] = {"steps": 4, "batch_size": 8, "weighting": "uniform"}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the method, and the view that it trains
    "fedavg": ({"name": "fedavg", "lr": 2e-4, **STEPS, "steps": 2}, {"kind": "full"}),
    "fedit": ({"name": "fedavg", "lr": 4e-3, **STEPS}, LORA),
    "fedkseed": (
        {
            "name": "fedkseed",
            "lr": 0.3,
            "eps": 1e-3,
            "seeds": 1024,
            "shared": True,  # or there is no number that two clients have measured
            "steps": 16,
            "batch_size": 8,
            "weighting": "uniform",
        },
        {"kind": "filter", "parts": ["classifier"]},  # of whose directions so few steps find one that helps
    ),
    "gradualdiff": ({"name": "gradualdiff", "lr": 2e-4, "start": "shared", **STEPS, "steps": 2}, {"kind": "full"}),
    "onebit": (
        {"name": "onebit", "lr": 9e-3, "schedule": "constant", **STEPS},
        {"kind": "tied", "numbers": 32768, "targets": ["query", "key", "value", "dense"]},
    ),
}
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {"kind": "mean"},
    "clipped": {"kind": "clipped"},
    "median": {"kind": "median"},
    "trimmed": {"kind": "trimmed", "share": 0.2},
    "trimmed-30": {"kind": "trimmed", "share": 0.3},
    "krum": {"kind": "krum", "attackers": 4, "keep": 12},
    "krum-16": {"kind": "krum", "attackers": 4, "keep": 16},
    "clipped-median": {"kind": "clipped", "then": {"kind": "median"}},
    "vote": {"kind": "vote"},
    "gated": {"kind": "gated", "bound": 0.05},
}
ATTACKS = ("flip", "scale", "noise", "labels", "little")
LENGTHS = {"flip": -1.0, "scale": 100.0}
LARGEST = 6e4  # that a reply's number may be
ALL = cache(film_desk)
WHAT = ("method", "attack", "attackers", "defence", "seed")


def changes_of(method: Averaged, state: Any, server: Any, client: int, up: Any) -> Tensors:
    """What a reply changes, by name; of FedKSeed its scalars."""
    if isinstance(method, FedKSeed):
        return {"scalars": up.scalars.float().nan_to_num()}
    update, origin = method.update_of(state, server, client, up).tensors, method.origin(state)
    return {name: tensor.float() - (origin[name].float() if name in origin else 0) for name, tensor in update.items()}


def reply_of(method: Averaged, state: Any, server: Any, up: Any, changes: Tensors) -> Any:
    """The same reply with these changes, in the form in which an honest one travels."""
    if isinstance(method, FedKSeed):
        return replace(up, scalars=changes["scalars"].clamp(-LARGEST, LARGEST).to(up.scalars.dtype))
    if isinstance(method, OneBit):
        code, key = method.code.code(), server.key.fold("code").word()
        return replace(up, change=to_tensor(code.encode(changes[NUMBERS], key)))
    new = {name: (old.float() + changes[name]).to(old.dtype) for name, old in state.weights.items()}
    if isinstance(method, GradualDiff):
        return replace(up, changes={name: coded(tensor, state.weights[name]) for name, tensor in new.items()})
    return replace(up, weights=new)


class Hostile:
    """A transport some of whose clients forge what they have learnt, once all replies of the round are in."""

    def __init__(self, inner: Transport, method: Averaged, state: Any, at: Round, attack: str, hostile: range) -> None:
        self.inner, self.method, self.state, self.at = inner, method, state, at
        self.attack, self.hostile = attack, hostile

    def again(self, client: int, frame: Frame) -> Reply:
        """See round.Transport."""
        return self.inner.again(client, frame)

    def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
        """See round.Transport."""
        replies = list(self.inner.exchange(frames, action))
        little = self._little(replies) if self.attack == "little" else None
        for reply in replies:
            if reply.client in self.hostile and reply.frame is not None and reply.frame.header().kind != "Stale":
                reply = replace(reply, frame=self._forged(reply.client, reply.frame, little))
            yield reply

    def _forged(self, client: int, frame: Frame, little: Tensors | None) -> Frame:
        header, up = frame.header(), decode(self.method.Up, frame)
        changes = little if little is not None else self._changes(client, up)
        if self.attack in LENGTHS:
            changes = {name: LENGTHS[self.attack] * tensor for name, tensor in changes.items()}
        elif self.attack == "noise":
            length = math.sqrt(sum(float(tensor.square().sum()) for tensor in changes.values()))
            each = 10 * length / math.sqrt(sum(tensor.numel() for tensor in changes.values()))
            draw = torch.Generator().manual_seed(1000 * header.round + client)
            changes = {name: each * torch.randn(tensor.shape, generator=draw) for name, tensor in changes.items()}
        forged = reply_of(self.method, self.state, self.at.server, up, changes)
        where = {"run": header.run, "round": header.round, "client": client, "held": header.held}
        made = encode(forged, **where, spool=self.at.spool)
        frame.remove()
        return made

    def _changes(self, client: int, up: Any) -> Tensors:
        return changes_of(self.method, self.state, self.at.server, client, up)

    def _little(self, replies: Iterable[Reply]) -> Tensors:
        """The honest clients' mean less their deviation, number by number."""
        sums: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        count = 0
        for reply in replies:
            if reply.client in self.hostile or reply.frame is None:
                continue
            count += 1
            for name, tensor in self._changes(reply.client, decode(self.method.Up, reply.frame)).items():
                sums[name] = sums.get(name, 0) + tensor.double()
                squares[name] = squares.get(name, 0) + tensor.double().square()
        means = {name: total / count for name, total in sums.items()}
        return {
            name: (mean - (squares[name] / count - mean.square()).clamp_(min=0).sqrt()).float()
            for name, mean in means.items()
        }


def files_of(folder: Path) -> dict[str, str]:
    """The clients', the server's and the held-out rows as files: no row is in two of them."""
    rows = ALL()
    order = Key.root(7).permutation(len(rows))
    found, start = {}, 0
    for name, count in (("path", ROWS), ("public", PUBLIC), ("heldout", HELDOUT)):
        found[name] = str(folder / f"{name}.jsonl")
        chosen = [rows[i].fields for i in order[start : start + count]]
        Path(found[name]).write_text("".join(json.dumps(dict(fields)) + "\n" for fields in chosen))
        start += count
    return found


def job_of(folder: Path, cell: Mapping[str, Any], rounds: int) -> Job:
    """The run of a cell, its hostile clients among the others."""
    method, view = METHODS[cell["method"]]
    data = {**files_of(folder), "clients": CLIENTS, "partition": "dirichlet", "column": "output", "alpha": 10.0}
    tree = {
        "seed": cell["seed"],
        "rounds": rounds,
        "model": {"path": "minilm", "view": view, "autocast": True},
        "data": data | {"minimum": 20, "max_length": 32},
        "method": method | {"aggregation": DEFENCES[cell["defence"]]},
        "eval": {"rows": HELDOUT, "batch_size": 64, "every": rounds},
    }
    run = config.parse(tree, "the benchmark")
    place = folder / "run"
    place.mkdir()
    job = assemble.begin(*assemble.prepared(run)).job(place, Watch())
    hostile = range(cell["attackers"])
    if cell["attack"] == "labels":
        clients = [wrong(data) if i in hostile else data for i, data in enumerate(job.clients)]
        return replace(job, clients=clients)

    def round(method: Method, state: Any, at: Round) -> Any:
        assert isinstance(method, Averaged)
        at.transport = Hostile(at.transport, method, state, at, cell["attack"], hostile)
        return run_round(method, state, at)

    return replace(job, round=round)


def wrong(data: Any) -> Any:
    """A client's rows with each label the other one."""
    examples = [replace(example, choice=1 - example.choice) for example in data.examples]
    return replace(data, examples=examples)


def measured(cell: Mapping[str, Any], rounds: int) -> Record:
    """The line of a cell: the loss and accuracy on held-out rows at the start and at the end."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        course = Course(job_of(Path(folder), cell, rounds))
        course.begin()
        error = None
        try:
            while not course.ended:
                course.round()
        except RuntimeError as wrong:  # weights or a loss that are no longer numbers: that is a result too
            error = str(wrong)
        scores = [row for row in read_records(course.evals) if row["split"] == "heldout"]
        left_out = [len([c for c in row["clients"] if "left_out" in c]) for row in read_records(course.rounds)]
    return {
        **cell,
        "rounds": rounds,
        "start": scores[0]["loss"],
        "loss": scores[-1]["loss"] if error is None else None,
        "accuracy": scores[-1].get("accuracy") if error is None else None,
        "left_out": left_out,
        "seconds": time.perf_counter() - began,
        **({"error": error} if error is not None else {}),
    }


def cells(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is asked for, seed by seed: without attackers one run a defence."""
    for seed, method in product(asked.seeds, asked.methods):
        for attackers, attack, defence in product(asked.attackers, asked.attacks, asked.defences):
            if (attackers == 0 and attack != asked.attacks[0]) or (defence == "vote" and method != "onebit"):
                continue
            named = attack if attackers else "nobody"
            yield dict(zip(WHAT, (method, named, attackers, defence, seed), strict=True))


def table(records: Iterable[Record]) -> Iterator[str]:
    """Markdown: of each method a row a defence, a column an attack; the mean loss over the seeds and its spread."""
    losses: dict[tuple[Any, ...], list[float | None]] = {}
    for row in records:
        losses.setdefault(tuple(row[key] for key in WHAT[:-1]), []).append(row["loss"])
    for method in dict.fromkeys(key[0] for key in losses):
        found = {key[1:3] for key in losses if key[0] == method}
        heads = sorted(found, key=lambda head: (head[1], [*ATTACKS, head[0]].index(head[0])))
        calm = losses.get((method, "nobody", 0, "none"))
        yield f"\n**{method}**\n"
        yield "| defence | " + " | ".join(f"{attack}, {count}" if count else attack for attack, count in heads) + " |"
        yield "| --- |" + " --- |" * len(heads)
        for defence in DEFENCES:
            found = [losses.get((method, *head, defence)) for head in heads]
            if any(found):
                yield f"| {defence} | " + " | ".join(shown(each, calm) for each in found) + " |"


def shown(each: Sequence[float | None] | None, calm: Sequence[float | None] | None) -> str:
    """A mean and its spread, in bold where it is within a tenth of the undisturbed one."""
    if not each:
        return "-"
    found = [loss for loss in each if loss is not None]
    if len(found) < len(each):
        return "lost"  # weights or losses are no longer numbers
    text = f"{fmean(found):.3f}" + (f" ± {stdev(found):.3f}" if len(found) > 1 else "")
    usual = fmean(loss for loss in calm if loss is not None) if calm else 0.0
    return f"**{text}**" if fmean(found) <= 1.1 * usual else text


def main() -> None:
    """Do what is missing, or print the table of what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    for name, known in (("methods", METHODS), ("attacks", ATTACKS), ("defences", DEFENCES)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--attackers", nargs="+", type=int, default=[0, 2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    done = read(asked.out)
    if asked.table:
        print("\n".join(table(done)))  # noqa: T201
        return
    known = {tuple(row[key] for key in (*WHAT, "rounds")) for row in done}
    for cell in cells(asked):
        if (*(cell[key] for key in WHAT), asked.rounds) not in known:
            record = measured(cell, asked.rounds)
            append(asked.out, record)
            print(json.dumps(record), file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
