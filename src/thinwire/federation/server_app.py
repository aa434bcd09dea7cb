"""The server's loop within the engine's server process: the run in its folder, with the sites as its clients."""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire import files
from thinwire.records import read_json

if TYPE_CHECKING:
    from thinwire.federation.engine import Engine


@dataclass(frozen=True)
class Hub:
    """What the server's process is given, in hub.json of the run's folder `federation`.

    `keys`: the folder that `thinwire keys` fills. `session`: of this run's folder, so that a run begun anew finds no
    memory of the old one at the sites. `splits`: name -> file of rows that the server scores.
    """

    keys: str
    session: str
    sites: tuple[str, ...]
    splits: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the file of the run's folder."""
        (folder / "federation" / "hub.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Hub:
        """The inverse of `write`; Damaged for what it has not written."""
        return read_json(cls, folder / "federation" / "hub.json")


@dataclass(frozen=True)
class Status:
    """Where the server's process stands: `state` is running, done or stopped; `error`: why, in one line.

    `again`: whether it may well go on when it is started again.
    """

    pid: int
    state: str
    error: str | None = None
    again: bool = False

    def write(self, folder: Path) -> None:
        """Write it to status.json of the run's folder `federation`."""
        files.write(folder / "federation" / "status.json", json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Status | None:
        """What the file holds, None where there is none; Damaged for what was not written here."""
        path = folder / "federation" / "status.json"
        return read_json(cls, path) if path.exists() else None


def serve(engine: Engine, folder: Path) -> None:
    """Run the rounds that are left. What ends it stands in status.json, and the engine's job then fails too.

    Where the engine itself ends its job nothing stands there: whoever began the job begins another.
    """
    from thinwire.errors import Paused
    from thinwire.federation.engine import Aborted
    from thinwire.federation.processes import end_with_parent
    from thinwire.federation.transport import NoQuorum

    end_with_parent()  # engines leave it behind when their own process dies
    Status(os.getpid(), "running").write(folder)
    try:
        _train(engine, folder)
    except Aborted:
        raise
    except NoQuorum as few:
        Status(os.getpid(), "stopped", f"too few sites: {few}", again=True).write(folder)
        raise
    except Paused as asked:
        Status(os.getpid(), "stopped", str(asked), again=True).write(folder)
        raise
    except Exception as error:
        traceback.print_exc()
        line = " ".join(str(error).split()) or type(error).__name__
        Status(os.getpid(), "stopped", line).write(folder)
        raise
    Status(os.getpid(), "done").write(folder)


def _train(engine: Engine, folder: Path) -> None:
    from thinwire import assemble, config, memory
    from thinwire.assemble import thin
    from thinwire.assemble.privacy import budget_of
    from thinwire.data.source import read_file
    from thinwire.federation.fingerprint import fingerprints
    from thinwire.federation.keys import signer_of
    from thinwire.federation.members import Members
    from thinwire.federation.progress import Notices, notices_of
    from thinwire.federation.questions import join
    from thinwire.federation.seen import Seen
    from thinwire.federation.transport import Pieces
    from thinwire.runtime import checkpoint
    from thinwire.runtime.course import Watch, train

    hub, run = Hub.load(folder), config.load(folder / "run.toml")
    federation = run.federation or config.Federation()
    rows = assemble.Rows({}, {name: read_file(path) for name, path in hub.splits.items()})
    start = assemble.begin(run, rows, hollow=not federation.model)
    memory.trim()  # loading has left as much again as the model
    job = start.job(folder, Watch())
    if not federation.model:
        job = replace(job, carry=partial(thin.carry, run, start.net))
    notices = Notices(notices_of(folder))
    members = Members(folder, hub.sites, Path(hub.keys), federation.join, federation.max_examples, notices.add)
    spool, seen = folder / "spool", Seen(folder, members.names)

    def nodes() -> dict[int, int]:
        found = engine.nodes(members.names, members.public)
        seen.connected(found)
        return found

    def belonging(round: int) -> tuple[int, ...]:
        there = members.now(round)
        seen.members(there)
        return there

    transport = Pieces(
        engine,
        nodes,
        spool,
        fingerprints(run, start.net),
        deadline=federation.deadline,
        quorum=federation.quorum,
        patience=federation.patience,
        chunk_bytes=federation.chunk_bytes,
        max_bytes=job.max_bytes,
        counted=counted(folder),
        late=bool(job.late),
        names=members.names,
    )
    done = max(checkpoint.rounds(folder / "state"), default=None)
    there = belonging(1 if done is None else done + 1)
    # a run that goes on has rounds that ask for a quorum, and joining is no condition
    quorum = federation.quorum if done is None else 0
    for name, why in join(transport, job.run, there, members.names, quorum).items():
        notices.add(f"{name} has not joined: {why}")
    keep = 8 + run.method.versions_each * len(members.names)
    signer = signer_of(Path(hub.keys)) if job.audit else None
    budget = budget_of(run, {}, len(members.names))
    job = replace(job, names=members.names, transport=transport, signer=signer, budget=budget)
    job.members = belonging if budget is None else None  # a budget counts with those who are there from the start
    job.leave = leave_file(folder).exists
    job.seen = lambda _, client, __: seen.answered(client)
    train(replace(job, keep_versions=keep, caps=members.caps))


def leave_file(folder: Path) -> Path:
    """The file whose being there asks the server's loop to end after the round that it is at."""
    return folder / "federation" / "leave"


def counted(folder: Path) -> dict[int, int]:
    """Client -> the last round up to the checkpoint that it has sent a reply to, which came."""
    from thinwire.records import read_records, visits
    from thinwire.runtime import checkpoint

    ended = max(checkpoint.rounds(folder / "state"), default=0)
    records = [record for record in read_records(folder / "rounds.jsonl") if record["round"] <= ended]
    came = ((record["round"], visit) for record in records for visit in visits(record) if visit.get("bytes_up"))
    return {visit["id"]: round - visit.get("late", 0) for round, visit in came}
