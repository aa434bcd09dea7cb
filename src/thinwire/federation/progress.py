"""A line a round for people, read from the run's folder: the loop itself writes files and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from thinwire.records import Record, read_records
from thinwire.runtime.round import shown

MOST = 1 << 20  # bytes of a file of notices, which then begins anew


class Progress:
    """Says each round and evaluation of a folder once, as they come."""

    def __init__(self, folder: Path, rounds: int, say: Callable[[str], None]) -> None:
        self.folder, self.rounds, self.say = folder, rounds, say
        self.sizes = {"rounds.jsonl": 0, "evals.jsonl": 0}
        self.said = {"rounds.jsonl": 0, "evals.jsonl": 0}
        self.notices = Notices(notices_of(folder))

    def tick(self) -> None:
        """Say what is new."""
        for line in self.notices.new():
            self.say(line)
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


def notices_of(folder: Path) -> Path:
    """The file of what the server's loop says of a run."""
    return folder / "federation" / "notices.txt"


class Notices:
    """Lines of one process that another prints, in a file between them; the same line is not said twice in a row."""

    def __init__(self, path: Path) -> None:
        self.path, self.read = path, path.stat().st_size if path.exists() else 0
        self.last = ""

    def add(self, line: str) -> None:
        """Say something: one line, cut where it is long, of what can be printed."""
        line = shown(line, 500)
        if line == self.last:
            return
        self.last = line
        if self.path.exists() and self.path.stat().st_size > MOST:
            self.path.write_text("")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def new(self) -> list[str]:
        """What was added since the last look."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self.read:
            self.read = 0
        if size == self.read:
            return []
        with self.path.open("rb") as file:
            file.seek(self.read)
            added = file.read(size - self.read)
        whole = added[: added.rfind(b"\n") + 1]
        self.read += len(whole)
        return whole.decode(errors="replace").splitlines()
