"""The server's own log of a run: who was admitted, who counted how much, what was left out, what came of it.

audit.jsonl of the run's folder only grows. Each line has its number, the hash of the line before it, and its own; with
a server's key its hash is signed too. A run that goes on begins anew in it: rounds after that one were done again.

    begin   the run, its clients, the agreement of who counts how much, the key's public half; the round it goes on from
    members who belongs to the run from the next round on and did not before, and who does not any more
    round   the hash of its line in rounds.jsonl and of its state; its replies: share, why, hash; who was left out, why
    end     the hash of the weights
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thinwire import files, records
from thinwire.errors import Damaged
from thinwire.records import Record, visits
from thinwire.runtime import checkpoint
from thinwire.wire import Frame

FILE = "audit.jsonl"
NONE = "0" * 64  # the hash before the first line


class Signer(NamedTuple):
    """A key's public half, as PEM, and what signs with its private one: text -> base64."""

    public: str
    sign: Callable[[str], str]


class Book:
    """The log, written. A last line that was cut off in the middle is dropped: it had not been written yet."""

    def __init__(self, folder: Path, signer: Signer | None = None) -> None:
        self.folder, self.path, self.signer = folder, folder / FILE, signer
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            files.write(self.path, whole)
        entries, problem = read(self.path)
        if problem is not None:
            raise Damaged(f"{self.path}{problem}; put it back from a copy, or the run goes on with no log of its past")
        self.lines, self.head = len(entries), entries[-1]["hash"] if entries else NONE
        self.come = entries[-1]["round"] if entries else 0  # the round that the log has come to

    def begin(self, round: int, **about: Any) -> None:
        """The run begins, or goes on from that round."""
        self._note("begin", round=round, **about, key=None if self.signer is None else self.signer.public)

    def catch_up(self, recorded: Sequence[Record], round: int) -> None:
        """Add a round whose checkpoint was written by a process that ended before it could log it."""
        if self.lines and self.come == round - 1:
            for record in recorded[-1:]:
                self.round(record)

    def members(self, round: int, names: Sequence[str], before: Sequence[int], now: Sequence[int]) -> None:
        """After that round clients have joined the run, or left it."""
        who = {"joined": {*now} - {*before}, "left": {*before} - {*now}}
        about = {what: [{"id": id, "name": names[id]} for id in sorted(ids)] for what, ids in who.items()}
        self._note("members", round=round, **about)

    def round(self, record: Record) -> None:
        """A round that has ended, by its record, its checkpoint written."""
        aside = ("error", "left_out")
        replies = [v for v in visits(record) if v.get("share", 1) > 0 and not any(v.get(name) for name in aside)]
        others = [v for v in visits(record) if v not in replies]
        self._note(
            "round",
            round=record["round"],
            record=_hash(records.dumps(record)),
            state=state_of(self.folder, record["round"]),
            counted=[{k: v[k] for k in ("id", "name", "share", "why", "late", "sha256") if k in v} for v in replies],
            left_out=[{k: v[k] for k in ("id", "name", *aside, "why", "sha256") if k in v} for v in others],
        )

    def end(self, round: int, sha256: str | None) -> None:
        """The run has ended with these weights."""
        self._note("end", round=round, weights=sha256, files=files_of(self.folder))

    def _note(self, event: str, **about: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"line": self.lines + 1, "time": now, "event": event, **about, "before": self.head}
        line["hash"] = _hash(records.dumps(line))
        if self.signer is not None:
            line["signature"] = self.signer.sign(line["hash"])
        records.append(self.path, line)
        self.lines, self.head, self.come = self.lines + 1, line["hash"], line["round"]


class Audited(NamedTuple):
    """What an audit found: the problems, none where all holds; and what there is."""

    problems: list[str]
    lines: int
    rounds: int
    ended: bool
    head: str
    keys: list[str]  # public halves that the lines are signed with, none for a run without


def audit(folder: Path) -> Audited:
    """Whether the log is whole, and the run's records, checkpoints and summary are those that it was written for."""
    path = folder / FILE
    entries, problem = read(path)
    problems = [] if problem is None else [f"{path}{problem}"]
    keys = list(dict.fromkeys(entry["key"] for entry in entries if entry.get("event") == "begin" and entry["key"]))
    if problem is None:
        problems += _unsigned(path, entries)
    logged: dict[int, Record] = {}
    for entry in entries:
        if entry["event"] == "round":
            logged[entry["round"]] = entry
        elif entry["event"] == "begin":
            logged = {round: line for round, line in logged.items() if round <= entry["round"]}
    ended = bool(entries) and entries[-1]["event"] == "end"
    if problem is None:  # else what is missing from the log would be taken for what is missing here
        since = entries[0]["round"] if entries else 0
        if since:
            problems.append(f"{path}: begins after round {since}: what came before is in no log")
        problems += _differences(folder, logged, since)
        problems += _ending(folder, entries)
    head = entries[-1]["hash"] if entries else NONE
    return Audited(problems, len(entries), len(logged), ended, head, keys)


def read(path: Path) -> tuple[list[Record], str | None]:
    """The lines up to the first that is not as it was written, and what is wrong there: ":LINE: what"."""
    content = path.read_bytes() if path.exists() else b""
    raw = [line for line, _ in records.lines(path)] if content else []
    parsed = [_parsed(line) for line in raw]
    numbers = {entry["line"] for entry in parsed if entry is not None}
    entries: list[Record] = []
    for number, (line, entry) in enumerate(zip(raw, parsed, strict=True), 1):
        if not line.endswith(b"\n"):
            return entries, f":{number}: was cut off"
        if entry is None:
            return entries, f":{number}: was changed: it is not what its hash is of"
        if entry["line"] != number:
            where = "are out of order" if number in numbers else f"lack line {number}: it was removed"
            return entries, f":{number}: has line {entry['line']}: the lines {where}"
        if entry["before"] != (entries[-1]["hash"] if entries else NONE):
            return entries, f":{number}: does not follow from the line before, which was written anew"
        entries.append(entry)
    return entries, None


def state_of(folder: Path, round: int) -> str | None:
    """The hash of a round's state, as its checkpoint has it; None where that is not there (any more)."""
    place = folder / "state" / f"round-{round:06d}" / "state.frame"
    return sha256(Frame.load(place)) if place.exists() else None


def files_of(folder: Path) -> dict[str, str]:
    """The hashes of what a run ends with: name -> sha256 of each file of weights."""
    found = [*sorted((folder / "model").glob("*.safetensors")), folder / "model.thin"]
    return {path.name: sha256(Frame.in_file(path)) for path in found if path.is_file()}


def sha256(frame: Frame) -> str:
    """Of a frame."""
    digest = hashlib.sha256()
    for chunk in frame.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _parsed(line: bytes) -> Record | None:
    """A line that is what it was written as, whatever stands around it."""
    try:
        entry = json.loads(line)
        rest = {name: value for name, value in entry.items() if name not in ("hash", "signature")}
        same = entry["hash"] == _hash(records.dumps(rest)) and records.dumps(entry).encode() == line.rstrip(b"\n")
        return entry if same and isinstance(entry["line"], int) and isinstance(entry["event"], str) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _differences(folder: Path, logged: Mapping[int, Record], since: int) -> list[str]:
    path, problems = folder / "rounds.jsonl", list[str]()
    found = [(line, record["round"]) for line, record in records.lines(path) if isinstance(record, dict)]
    recorded = {round: line for line, round in found if round > since}
    for round in sorted({*logged, *recorded}):
        if round not in recorded:
            problems.append(f"{path}: has no record of round {round}, which the log has")
        elif round not in logged:
            problems.append(f"{folder / FILE}: ends before round {round}, of which there is a record: it was cut")
        elif logged[round]["record"] != hashlib.sha256(recorded[round].rstrip(b"\n")).hexdigest():
            problems.append(f"{path}: the record of round {round} is not the one that was logged")
    for round in checkpoint.rounds(folder / "state"):
        state = logged[round]["state"] if round in logged else None
        if state is not None and state != state_of(folder, round):
            problems.append(f"{folder / 'state'}: the state of round {round} is not the one that was logged")
        if round > since and round not in logged and round not in recorded:
            problems.append(f"{folder / FILE}: ends before round {round}, of which there is a checkpoint: it was cut")
    return problems


def _ending(folder: Path, entries: Sequence[Record]) -> list[str]:
    path, file = folder / FILE, folder / "summary.json"
    try:
        summary = json.loads(file.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError:
        return [f"{file}: not JSON"]
    last = entries[-1] if entries else {}
    if last.get("event") != "end":
        return [f"{path}: ends with line {len(entries)}, and not with the run, which has ended: it was cut"]
    if (summary.get("audit"), summary.get("sha256")) != (last["hash"], last["weights"]):
        return [f"{file}: is not the one that was written with the log's last line"]
    there = files_of(folder)
    return [
        f"{folder}: {name} is not the file that was logged"
        for name, sha in last["files"].items()
        if there.get(name) != sha
    ]


def _unsigned(path: Path, entries: Sequence[Record]) -> list[str]:
    """The first line whose signature is not of the key that its begin names."""
    key: str | None = None
    for entry in entries:
        key = entry["key"] if entry["event"] == "begin" else key
        if (key is None) != ("signature" not in entry) or (key and not signed(key, entry["hash"], entry["signature"])):
            return [f"{path}:{entry['line']}: is not signed with the key that its run began with"]
    return []


def signed(public: str, text: str, signature: str) -> bool:
    """Whether a signature (base64) of a text is of the private half of an elliptic curve's public key (PEM)."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(public.encode())
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(base64.b64decode(signature, validate=True), text.encode(), ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, AssertionError):
        return False
    return True


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
