"""Runs of the tiny model in one process and on an engine, and what passed in each, frame by frame."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import CHOICES, tiny_folder, tiny_rows, write_jsonl

from thinwire import assemble, config
from thinwire.federation.local import Local, named
from thinwire.keys import Key
from thinwire.runtime import course
from thinwire.runtime.inprocess import InProcess
from thinwire.runtime.round import Reply
from thinwire.wire import Frame

SITES = ("north", "south", "west")
SIZES = (12, 8, 16)
# (round, client, in or out of the site) -> bytes and sha256 of each frame, in the order that they passed
Frames = dict[tuple[int, int, str], list[tuple[int, str]]]


@dataclass(frozen=True)
class Silos:
    """A tiny model, a file of rows a client, a held-out file; `run` makes settings over them."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, sites: int = 3) -> Silos:
        """Write the model and the rows."""
        tiny_folder(folder / "model")
        (folder / "data").mkdir()
        for name, rows, seed in list(zip(SITES, SIZES, (1, 2, 3), strict=True))[:sites]:
            write_jsonl(folder / "data" / f"{name}.jsonl", tiny_rows(rows, seed, closed=True))
        write_jsonl(folder / "heldout.jsonl", tiny_rows(6, 9, closed=True))
        return cls(folder)

    def run(self, method: dict[str, Any], rounds: int = 2, **fields: Any) -> config.Run:
        """A run of the method over all clients."""
        tree = {
            "name": "silos",
            "rounds": rounds,
            "threads": 1,
            "model": {"path": str(self.folder / "model"), **fields.pop("model", {})},
            "data": {
                "path": str(self.folder / "data"),
                "partition": "files",
                "heldout": str(self.folder / "heldout.jsonl"),
                "prompt": "{input}: it was",
                "answer": " {output}",
                "choices": list(CHOICES),
                "max_length": 64,
                **fields.pop("data", {}),
            },
            "method": method,
            **fields,
        }
        return config.parse(tree)

    def rows(self, run: config.Run) -> assemble.Rows:
        """The clients' rows."""
        return assemble.rows_of(run.data, Key.root(run.seed))

    def begin(self, run: config.Run, folder: Path) -> None:
        """The folder of a run, as `thinwire run` makes it."""
        folder.mkdir(parents=True)
        (folder / "run.toml").write_text(run.to_toml())


def in_process(silos: Silos, run: config.Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Frames:
    """The run in this process; the frames that passed."""
    frames: Frames = {}

    class Recording(InProcess):
        def exchange(self, sent: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
            def noted() -> Iterator[tuple[int, Frame]]:
                for client, frame in sent:
                    note(frames, frame, "in")
                    yield client, frame

            for reply in super().exchange(noted(), action):
                if reply.frame is not None:
                    note(frames, reply.frame, "out")
                yield reply

    silos.begin(run, folder)
    assemble.use_threads(run)
    net = assemble.net_of(run, remember=True)
    job = assemble.job(run, silos.rows(run), net, folder, 0, course.Watch())
    with monkeypatch.context() as patch:
        patch.setattr(course, "InProcess", Recording)
        course.train(job)
    return frames


def note(frames: Frames, frame: Frame, direction: str) -> None:
    """Add a frame to those that passed."""
    content = bytes(frame)
    header = frame.header()
    seen = frames.setdefault((header.round, header.client, direction), [])
    seen.append((len(content), hashlib.sha256(content).hexdigest()))


def audited(local: Local, run: config.Run) -> Frames:
    """The frames of a run's training that are in the sites' logs."""
    return logged([local.place(name) for name in local.names], assemble.identity(run))


def logged(sites: Iterable[Path], run: int | None = None) -> Frames:
    """The frames of training, all or a run's, that are in the logs of sites' folders; all have passed."""
    frames: Frames = {}
    for line in (line for site in sites for line in (site / "audit.jsonl").read_text().splitlines()):
        entry = json.loads(line)
        if entry["action"] == "train" and run in (None, entry["run"]):
            assert entry["verdict"] == "passed"
            key = (entry["round"], entry["client"], entry["direction"])
            frames.setdefault(key, []).append((entry["bytes"], entry["sha256"]))
    return frames


def state_of(folder: Path) -> tuple[str, bytes]:
    """The hash of the final weights, and the last checkpoint's state as a frame."""
    last = sorted((folder / "state").glob("round-*"))[-1]
    return json.loads((folder / "summary.json").read_text())["sha256"], (last / "state.frame").read_bytes()


def visits(folder: Path) -> list[list[tuple[int, int, int, Any]]]:
    """Of each round, each client's bytes down and up, and its error."""
    return [
        [(c["id"], c["bytes_down"], c["bytes_up"], c.get("error")) for c in record["clients"]]
        for record in course.read_records(folder / "rounds.jsonl")
    ]


def local_of(silos: Silos, run: config.Run, home: Path, engine: str = "flower") -> Local:
    """A federation of the run's clients, not yet started."""
    return Local(home, named(run, silos.rows(run).clients), engine=engine)


def in_one_federation(
    silos: Silos, runs: dict[str, config.Run], folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs by name, one after the other in the same federation, each as it is in one process: state and frames."""
    local = local_of(silos, next(iter(runs.values())), folder / "hub", engine)
    try:
        local.start()
        for name, run in runs.items():
            silos.begin(run, folder / "there" / name)
            local.follow(folder / "there" / name, run, silos.rows(run).splits)
    finally:
        local.stop()
    for name, run in runs.items():
        frames = in_process(silos, run, folder / "here" / name, monkeypatch)
        assert audited(local, run) == frames, name
        assert state_of(folder / "there" / name) == state_of(folder / "here" / name), name
