"""What a site has answered, run by run, and the answers themselves for as long as they may be asked for again."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from thinwire import files
from thinwire.errors import Damaged
from thinwire.federation.asked import Refused
from thinwire.files import flush
from thinwire.records import read_json
from thinwire.wire import Frame, Illegal

LOST = "this site's record of what it has answered is damaged, and it answers nothing without it"


@dataclass(frozen=True)
class Entry:
    """Of a run: the hashes of its run files; for each action how many rounds were answered, and which was the last.

    `unmasked`: the last round whose sum this site has helped to unmask, and the hash of which sum.
    """

    files: tuple[str, ...]
    rounds: dict[str, tuple[int, int]]
    unmasked: tuple[int, str] | None = None


class Spent:
    """How much of a site's budget is gone: spent.json, which outlives the folders of runs.

    `damaged`: why it cannot be read. What was answered is then not known, so nothing is: Refused.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "spent.json"
        self.damaged: str | None = None
        self.runs: dict[str, Entry] = {}
        try:
            self.runs = read_json(dict[str, Entry], self.path) if self.path.exists() else {}
        except Damaged as error:
            self.damaged = str(error)

    def asks(self, run: str, settings: str, most: int) -> None:
        """A run file, by its hash, is about to be worked with; Refused where `most` were already."""
        known = self._known(run)
        if settings in known.files:
            return
        if sum(len(other.files) for other in self.runs.values()) >= most:
            raise Refused(f"this site's policy does not allow more than {most} run files")
        self._write(run, replace(known, files=(*known.files, settings)))

    def admit(self, run: str, action: str, round: int, most: int, floor: int = 0, again: bool = False) -> None:
        """Illegal for a round that was answered, or lies before one that was or `floor`, and beyond `most` answers.

        `again`: a round may be answered to another request too, as when it is repeated with fresh keys.
        """
        count, newest = self.of(run, action)
        if round < max(newest, floor):
            raise Illegal(
                f"a frame of round {round} after one of round {max(newest, floor)}: it is replayed, or the server has "
                "gone back"
            )
        if count and round == newest and again:
            return
        if count and round == newest:
            raise Illegal(f"round {round} is answered already, to another request")
        if count >= most:
            raise Illegal(f"this site's policy does not allow more than {most} answers in a run")

    def add(self, run: str, action: str, round: int) -> None:
        """A round is being answered."""
        known = self._known(run)
        count, _ = self.of(run, action)
        self._write(run, replace(known, rounds={**known.rounds, action: (count + 1, round)}))

    def unmask(self, run: str, round: int, sum: str) -> None:
        """A sum of a round is being unmasked; Illegal where it was another one, or a later round's, before."""
        known = self._known(run)
        last, before = known.unmasked or (round, sum)
        if round < last or (round == last and sum != before):
            raise Illegal(f"a sum of round {last} is unmasked already")
        self._write(run, replace(known, unmasked=(round, sum)))

    def of(self, run: str, action: str) -> tuple[int, int]:
        """How many rounds of a run were answered, and the last of them; 0, 0 at first."""
        return self._known(run).rounds.get(action, (0, 0))

    def _known(self, run: str) -> Entry:
        if self.damaged is not None:
            raise Refused(LOST)
        return self.runs.get(run, Entry((), {}))

    def _write(self, run: str, entry: Entry) -> None:
        self.runs = {**self.runs, run: entry}
        files.write(self.path, json.dumps({name: asdict(known) for name, known in self.runs.items()}))


class Replies:
    """The last answer to each action, in files named by action, round and the request's hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, action: str, round: int, request: str) -> Frame | None:
        """The answer that was given to this very request."""
        path = self._path(action, round, request)
        return Frame.load(path) if path.is_file() else None

    def keep(self, action: str, round: int, request: str, frame: Frame) -> None:
        """Keep an answer in place of the action's last one; its file is then here, and stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, old = self._path(action, round, request), list(self.folder.glob(f"{action}-*"))
        frame.move_to(path)
        flush(path)
        for other in old:
            if other != path:
                other.unlink(missing_ok=True)

    def _path(self, action: str, round: int, request: str) -> Path:
        return self.folder / f"{action}-{round:06d}-{request[:32]}.frame"


def drop_old(runs: Path, kept: int, current: str) -> None:
    """Remove the folders of runs that were not used for longest, beyond `kept` with the current one."""
    folders = sorted(
        (f for f in runs.glob("*") if f.name != current and f.is_dir()), key=lambda f: f.stat().st_mtime_ns
    )
    for folder in folders[: max(0, len(folders) + 1 - kept)]:
        shutil.rmtree(folder, ignore_errors=True)
