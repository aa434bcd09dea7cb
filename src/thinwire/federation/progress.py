"""A line a round for people, read from the run's folder: the loop itself writes files and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from thinwire.runtime.loop import Record, read_records


class Progress:
    """Says each round and evaluation of a folder once, as they come."""

    def __init__(self, folder: Path, rounds: int, say: Callable[[str], None]) -> None:
        self.folder, self.rounds, self.say = folder, rounds, say
        self.sizes = {"rounds.jsonl": 0, "evals.jsonl": 0}
        self.said = {"rounds.jsonl": 0, "evals.jsonl": 0}

    def tick(self) -> None:
        """Say what is new."""
        for name, tell in (("evals.jsonl", self._evaluation), ("rounds.jsonl", self._round)):
            path = self.folder / name
            size = path.stat().st_size if path.exists() else 0
            if size == self.sizes[name]:
                continue
            records = read_records(path)
            for record in records[self.said[name] :]:
                tell(record)
            self.sizes[name], self.said[name] = size, len(records)

    def _round(self, record: Record) -> None:
        absent = [f"{c['name']} ({c['error']})" for c in record["clients"] if "error" in c]
        tail = f"; absent: {', '.join(absent)}" if absent else ""
        carried = f"{record['bytes_down']:,} bytes down, {record['bytes_up']:,} up"
        self.say(f"round {record['round']} of {self.rounds}: {carried}, {record['seconds']:.1f} s{tail}")

    def _evaluation(self, record: Record) -> None:
        right = record.get("accuracy")
        tail = "" if right is None else f", accuracy {right:.3f}"
        self.say(f"after round {record['round']}: {record['split']} loss {record['loss']:.4f}{tail}")
