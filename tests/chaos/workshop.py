"""What trials are made on: tiny runs of several methods, each once undisturbed, and once stopped half way."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preloaded import Ended, Fault, Process, command, warm
from tiny import tiny_folder, tiny_rows, write_jsonl

ROUNDS, STOPPED = 5, 3  # of a run; the last one of a run that was stopped
STEPS = {"steps": 2, "batch_size": 4}
LORA = '[model.lora]\nrank = 4\nalpha = 8.0\ntargets = ["q_proj", "v_proj"]\n'
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "fedkseed": ({"name": "fedkseed", "seeds": 16, "lr": 1e-4, **STEPS}, ""),
    "fedavg": ({"name": "fedavg", "lr": 1e-3, **STEPS}, ""),
    "residue": ({"name": "gradualdiff", "lr": 1e-3, "rounding": "residue", **STEPS}, 'dtype = "bfloat16"\n'),
    "lowrank": ({"name": "gradualdiff", "lr": 1e-3, "codec": "lowrank", "rank": 4, **STEPS}, 'dtype = "bfloat16"\n'),
    "fedcybgd": (
        {"name": "fedcybgd", "lr": 1e-2, "blocks": 2, "common": 0, "drop": 0.5, "spared": [0, 0], **STEPS},
        "",
    ),
    "cgfed": (
        {"name": "cgfed", "lr": 1e-2, "codec": "powersgd", "ratio": 16, "feedback": True, "downlink": "coded", **STEPS},
        LORA,
    ),
    "fedit": ({"name": "fedavg", "lr": 1e-2, **STEPS}, LORA),
}
LEFT = re.compile(r"(^|/)(\.tmp[^/]*|[^/]*\.part|\.model\.[^/]*|\.[^/]*\.run\.toml|spool|[^/]*\.frame\.part)(/|$)")


@dataclass(frozen=True)
class Result:
    """What a run has left: its records and weights."""

    sha256: str
    weights: str  # the digest of the model's file
    rounds: list[Any]
    evals: list[Any]
    summary: dict[str, Any]

    def difference(self, other: Result, bytes_differ: bool = False) -> str | None:
        """What the first difference is; None for runs that have ended alike."""
        if (self.sha256, self.weights) != (other.sha256, other.weights):
            return "another model"
        for name in ("rounds", "evals", "summary"):
            mine, theirs = (plain(getattr(one, name), bytes_differ) for one in (self, other))
            if mine != theirs:
                return f"other records in {name}"
        return None


def plain(record: Any, bytes_differ: bool = False) -> Any:
    """A record without what differs from run to run: times and memory; bytes where a client was sent all again."""
    dropped = {"seconds", "peak_memory_bytes"} | ({"bytes_down", "bytes_up"} if bytes_differ else set())
    if isinstance(record, dict):
        return {key: plain(value, bytes_differ) for key, value in record.items() if key not in dropped}
    return [plain(value, bytes_differ) for value in record] if isinstance(record, list) else record


def records(path: Path) -> list[Any]:
    """The lines of a .jsonl file; ValueError for one that is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def digest(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "none"


def tree(folder: Path) -> dict[str, str]:
    """The digests of all files of a run, but for its lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(folder)): digest(path) for path in files}


def left(folder: Path) -> list[str]:
    """Temporary files that lie in a run's folder or beside it."""
    names = [str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*") if path.is_file()]
    return [name for name in names if LEFT.search(name)]


@dataclass
class Workshop:
    """The model, the rows and the run files, below one folder; processes share it by its files."""

    folder: Path
    _results: dict[str, Result] = field(default_factory=dict)

    def prepare(self, methods: tuple[str, ...]) -> None:
        """Write all that trials read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tiny_folder(self.folder / "model")
        write_jsonl(self.folder / "rows.jsonl", tiny_rows(40, closed=True))
        for name in methods:
            self.file(name).write_text(self.run_file(name, self.folder))
        warm(*(["run", self.file(name), "--out", self.folder / "warm" / name] for name in methods))
        for name in methods:
            self.undisturbed(name)
            self.stopped(name)

    def run_file(self, name: str, inputs: Path) -> str:
        """The text of a run file over the model and the rows in a folder."""
        method, model = METHODS[name]
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in method.items())
        return f"""name = "chaos"
rounds = {ROUNDS}
threads = 1
[model]
path = {json.dumps(str(inputs / "model"))}
{model}[data]
path = {json.dumps(str(inputs / "rows.jsonl"))}
clients = 3
heldout = 6
choices = ["great", "terrible"]
prompt = "{{input}}:"
answer = " {{output}}"
max_length = 64
[method]
{lines}[[cohort]]
kind = "all"
rounds = 1
[[cohort]]
kind = "uniform"
n = 2
[eval]
every = 1
rows = 4
"""

    def file(self, name: str) -> Path:
        """The run file of a method."""
        return self.folder / f"{name}.toml"

    def place(self) -> Path:
        """A folder for one trial, in which `run` is the run's."""
        place = self.folder / "trials" / uuid.uuid4().hex[:12]
        place.mkdir(parents=True)
        return place

    def copy(self, name: str, kind: str = "stopped") -> Path:
        """A trial's folder with the run as it was stopped, or ended."""
        place = self.place()
        shutil.copytree(self.folder / kind / name / "run", place / "run")
        return place

    def start(
        self, name: str, place: Path, *more: str, fault: Fault | None = None, trace: Path | None = None
    ) -> Process:
        """The run of a method, begun or gone on with, as a process."""
        return Process(command("run", self.file(name), "--out", place / "run", *more), place, fault, trace)

    def go(self, name: str, place: Path, *more: str, fault: Fault | None = None, trace: Path | None = None) -> Ended:
        """How that process ends."""
        return self.start(name, place, *more, fault=fault, trace=trace).end()

    def go_on(self, name: str, place: Path, fault: Fault | None = None) -> Ended:
        """What whoever finds a run's folder would do: resume where there is a run, begin where there is none yet."""
        more = ["--resume"] if (place / "run" / "run.toml").exists() else []
        return self.go(name, place, *more, fault=fault)

    def undisturbed(self, name: str) -> Result:
        """What the run leaves that nothing befalls; its calls are in `calls`."""
        place = self.folder / "ended" / name
        if not (place / "run" / "summary.json").exists():
            place.mkdir(parents=True)
            trace = self.folder / f"{name}.calls"
            ended = self.go(name, place, trace=trace)
            assert ended.status == 0, ended
            assert ended.err == "", ended.err
            opened = self.folder / f"{name}.opened"
            again = self.place()
            ended = self.go(name, again, fault=Fault("count", openings=True), trace=opened)
            assert ended.status == 0, ended
        if name not in self._results:
            self._results[name] = result(place / "run")
        return self._results[name]

    def stopped(self, name: str) -> Path:
        """The folder of the run, killed in the round after STOPPED, before that is recorded."""
        place = self.folder / "stopped" / name
        if not place.exists():
            place.mkdir(parents=True)
            ended = self.go(name, place, fault=Fault("before", self.half_way(name)))
            assert ended.status == -9, ended
            resumed = self.copy(name)
            reported = self.go(
                name, resumed, "--resume", fault=Fault("count", openings=True), trace=self.folder / f"{name}.reads"
            )
            assert reported.status == 0, reported
            (self.folder / f"{name}.reported").write_text(json.dumps(lines_of(reported, resumed)))
        return place

    def half_way(self, name: str) -> int:
        """The number of that call."""
        calls = self.calls(name)
        saved = next(n for n, call, path in calls if call == "rename" and path.endswith(f"round-{STOPPED:06d}"))
        return next(n for n, _, path in calls if n > saved and path.endswith("rounds.jsonl"))

    def calls(self, name: str, kind: str = "calls") -> list[tuple[int, str, str]]:
        """The calls that change the undisturbed run's files: number, call, path; or what it `opened`, or `reads` when
        it is resumed."""
        lines = (self.folder / f"{name}.{kind}").read_text().splitlines()
        return [(int(number), call, path) for number, call, path in (line.split(" ", 2) for line in lines)]

    def reported(self, name: str, ended: Ended, place: Path) -> list[str]:
        """The lines that a resumed run prints and that the undamaged one did not."""
        usual = json.loads((self.folder / f"{name}.reported").read_text())
        return [line for line in lines_of(ended, place) if line not in usual]


def lines_of(ended: Ended, place: Path) -> list[str]:
    """What a command has printed, without numbers and the lines of rounds, scores and tables."""
    found = []
    for line in (ended.out + "\n" + ended.err).splitlines():
        line = re.sub(r"[\d.,]+", "#", line.replace(str(place), "PLACE").strip())
        line = re.sub(r"[\s\u2500-\u257f]+", " ", line).strip()
        if line and not re.match(
            r"round #/#|after round|at the start|# rounds in|.* dropped: |down |up |before: ", line
        ):
            found.append(line)
    return found


def result(folder: Path) -> Result:
    """What lies in the folder of a run that has ended. OSError, ValueError: it has not, or its records are damaged."""
    summary = json.loads((folder / "summary.json").read_text())
    kept = {key: value for key, value in summary.items() if key != "sha256"}
    rounds, evals = (records(folder / f"{name}.jsonl") for name in ("rounds", "evals"))
    return Result(summary["sha256"], digest(folder / "model" / "model.safetensors"), rounds, evals, kept)


@dataclass(frozen=True)
class Verdict:
    """What came of a trial, in few words, and whether that is as promised."""

    outcome: str
    good: bool
    more: str = ""

    @classmethod
    def bad(cls, outcome: str, more: object = "") -> Verdict:
        """Not as promised."""
        return cls(outcome, False, str(more)[-400:])
