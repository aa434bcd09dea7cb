"""What a round leaves behind: its record, and a state and scores that are numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch

from thinwire.aggregate.mean import LENGTH, Metrics
from thinwire.errors import RunError
from thinwire.records import Record, visits
from thinwire.runtime.round import Round, Visit


def record_of(at: Round, names: Sequence[str], metrics: Metrics, seconds: float, peak: int) -> Record:
    """The line of rounds.jsonl. `names`: of all clients; `peak`: memory of this process in bytes."""
    return {
        "round": at.server.round,
        "clients": [_client(visit, names) | counted(at, visit.client) for visit in at.visits.values()],
        "bytes_down": at.ledger.bytes_down,
        "bytes_up": at.ledger.bytes_up,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "metrics": metrics,
    } | ({"bytes_keys": at.ledger.bytes_keys} if at.ledger.keys else {})


ABSENT = ("error", "left_out", "late", "bytes_keys")  # of a visit, where there is none


def _client(visit: Visit, names: Sequence[str]) -> Record:
    record = {"id": visit.client, "name": names[visit.client], **asdict(visit)}
    del record["client"]
    return {name: value for name, value in record.items() if value is not None or name not in ABSENT}


def counted(at: Round, client: int) -> Record:
    """How much of the round its reply was, and why, where it was averaged; its hash, where those are kept."""
    found = at.server.weighing.shares.get(client)
    digest = {"sha256": at.ledger.digests[client]} if client in at.ledger.digests else {}
    return digest if found is None else {"share": found.share, "why": found.why} | digest


def loss_on(rows: Sequence[Record], split: str) -> float | None:
    """The loss of a split of an evaluation, if it is a number; of the clients' own rows, whichever those are."""
    names = (split, f"{split}_train") if split == "sites" else (split,)
    loss = next((row["loss"] for row in rows if row["split"] in names), None)
    return loss if loss is not None and math.isfinite(loss) else None


def first_examples(rounds: Sequence[Record]) -> dict[int, int]:
    """Client -> the examples of its first reply that counted."""
    first: dict[int, int] = {}
    for record in rounds:
        for visit in visits(record):
            if type(visit.get("examples")) is int:
                first.setdefault(visit["id"], visit["examples"])
    return first


def lengths_of(rounds: Sequence[Record]) -> list[float]:
    """Of each round that has it, the median of its updates' lengths."""
    return [record["metrics"][LENGTH] for record in rounds if LENGTH in record["metrics"]]


def check_state(state: Any, round: int) -> None:
    """RunError names a tensor of the state that is not finite."""
    for at in fields(state):
        value = getattr(state, at.name)
        tensors = value.items() if isinstance(value, Mapping) else [(at.name, value)]
        for name, tensor in tensors:
            if isinstance(tensor, torch.Tensor) and not _finite(tensor):
                raise RunError(
                    f"after round {round} {name} is not finite: the rate is too high, or a client has sent what is "
                    f"legal and wrong; no model is saved, and the checkpoint of round {round - 1} stays"
                )


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))  # no copy of it is made


def check_scores(own: Sequence[Record], round: int) -> None:
    """RunError names a split whose last loss is not finite."""
    for row in own:
        loss = row.get("loss", 0.0)
        if loss is None or not math.isfinite(loss):
            raise RunError(
                f"after the last round, {round}, the loss on {row['split']} is not finite; no model is saved, and the "
                f"checkpoint of round {round - 1} stays"
            )
