"""A line a round for people, read from the run's folder: the loop itself writes files and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from thinwire.records import Record, lines
from thinwire.runtime.round import shown

MOST = 1 << 20  # bytes of a file of notices, which then begins anew
LONGEST = 4000  # characters of a line


class Progress:
    """Reports each round and evaluation of a folder once, as they come, in a line; or `record` is given both."""

    def __init__(
        self,
        folder: Path,
        rounds: int,
        report: Callable[[str], None],
        record: Callable[[str, Record], None] | None = None,
    ) -> None:
        self.folder, self.rounds, self.report, self.record = folder, rounds, report, record
        self.sizes = {"evals.jsonl": 0, "rounds.jsonl": 0}
        self.counts = dict.fromkeys(self.sizes, 0)
        self.notices = Notices(notices_of(folder))

    def skip(self) -> None:
        """Take what is there for reported: a run that goes on."""
        for name in self.sizes:
            path = self.folder / name
            self.sizes[name] = path.stat().st_size if path.exists() else 0
            self.counts[name] = sum(line.endswith(b"\n") for line, _ in lines(path))

    def tick(self) -> None:
        """Report what is new; a record that is not as the loop writes it costs a line, whatever it holds."""
        for line in self.notices.new():
            self.report(line)
        for name, line_of in (("evals.jsonl", self._evaluation), ("rounds.jsonl", self._round)):
            path = self.folder / name
            size = path.stat().st_size if path.exists() else 0
            if size == self.sizes[name]:
                continue
            found = [record for line, record in lines(path) if line.endswith(b"\n")]  # one without is being written
            self.counts[name] = min(self.counts[name], len(found))  # rounds that are done again are new
            for number, record in enumerate(found[self.counts[name] :], self.counts[name] + 1):
                if self.record is not None and isinstance(record, dict):
                    self.record(name, record)
                    continue
                try:
                    text = line_of(record) if isinstance(record, dict) else f"{path}: record {number} is {record}"
                except (LookupError, TypeError, ValueError, ArithmeticError):
                    text = f"{path}: record {number} is not as it was written"
                self.report(shown(text, LONGEST))
            self.sizes[name], self.counts[name] = size, len(found)

    def _round(self, record: Record) -> str:
        absent = [f"{c['name']} ({c['error']})" for c in record["clients"] if "error" in c]
        without = [f"{c['name']} ({c['left_out']})" for c in record["clients"] if "left_out" in c]
        tail = f"; absent: {', '.join(absent)}" if absent else ""
        tail += f"; left out: {', '.join(without)}" if without else ""
        carried = f"{record['bytes_down']:,} bytes down, {record['bytes_up']:,} up"
        return f"round {record['round']} of {self.rounds}: {carried}, {record['seconds']:.1f} s{tail}"

    def _evaluation(self, record: Record) -> str:
        loss, right = record["loss"], record.get("accuracy")
        tail = "" if right is None else f", accuracy {right:.3f}"
        found = "loss not finite" if loss is None else f"loss {loss:.4f}"
        return f"after round {record['round']}: {record['split']} {found}{tail}"


def notices_of(folder: Path) -> Path:
    """The file of what the server's loop reports of a run."""
    return folder / "federation" / "notices.txt"


class Notices:
    """Lines of one process that another prints, in a file between them; none is passed on twice in a row."""

    def __init__(self, path: Path) -> None:
        self.path, self.read = path, path.stat().st_size if path.exists() else 0
        self.last = ""

    def add(self, line: str) -> None:
        """Pass on one line, cut where it is long, of what can be printed."""
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
