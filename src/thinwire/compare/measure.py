"""Two rounds of a run with a process for the server and one for each visit of a client: what each side costs.

In a run one process does both sides' work, so its peak memory is nobody's. Here each side has its own, and the memory
is as in DESIGN: after the imports and the model's loading the peak is reset; the peak then, less what the imports
took. The first round is a newcomer's; bytes and seconds of the second are those of one that returns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from thinwire import files
from thinwire.config import Run
from thinwire.keys import Key
from thinwire.runtime.round import Reply, Round, run_round
from thinwire.wire import Frame, WireError

CLIENTS = 2  # of the cohort that take part; a mean needs two
ROUNDS = 2


@dataclass(frozen=True)
class Cost:
    """Of a client and round, a mean over clients: bytes both ways, seconds; of either side: peak memory in bytes."""

    newcomer_bytes: float
    returning_bytes: float
    client_seconds: float
    server_seconds: float  # of a round with CLIENTS clients
    client_memory: int
    server_memory: int


def measure(run: Run, cohort: Sequence[int], folder: Path) -> Cost:
    """What the run costs either side, kept in the folder as cost.json; RuntimeError with its last line if one fails."""
    from thinwire import assemble

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(run.to_toml(), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole, _ = assemble.prepared(run)  # the server's side sees no rows
        (Path(place) / "run.toml").write_text(whole.to_toml(), encoding="utf-8")
        found = _ask("server", Path(place), ",".join(map(str, cohort[:CLIENTS])))
    files.write(folder / "cost.json", json.dumps(found, indent=2) + "\n")
    return Cost(**found)


def read(folder: Path) -> Cost | None:
    """What `measure` left in a folder, if it did."""
    file = folder / "cost.json"
    return Cost(**json.loads(file.read_text())) if file.exists() else None


class Processes:
    """A transport to clients that have a process each, for the time of a visit."""

    def __init__(self, folder: Path, held: dict[int, str]) -> None:
        self.folder, self.held = folder, held
        self.peak, self.waited = 0, 0.0  # bytes, of the largest client; seconds that the server had nothing to do

    def again(self, client: int, frame: Frame) -> Reply:
        """See round.Transport."""
        (reply,) = self.exchange([(client, frame)])
        return reply

    def under_way(self, members: Collection[int]) -> tuple[int, ...]:
        """See round.Transport: nobody is late."""
        return ()

    def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
        """See round.Transport."""
        down, up = self.folder / "down", self.folder / "up"
        for client, frame in frames:
            frame.move_to(down)
            began = time.perf_counter()
            done = _ask("client", self.folder, action, str(client), self.held.get(client, ""))
            self.waited += time.perf_counter() - began
            self.peak = max(self.peak, done["peak"])
            down.unlink(missing_ok=True)
            yield Reply(client, Frame.load(up) if done["error"] is None else None, done["seconds"], done["error"])


def _server(folder: Path, cohort: tuple[int, ...]) -> dict[str, Any]:
    """The server's side: a process that holds no client's rows."""
    from thinwire import assemble, config, memory
    from thinwire.runtime.seats import Seats
    from thinwire.runtime.store import VersionStore

    run = config.load(folder / "run.toml")
    start = assemble.begin(run, assemble.Rows({}, {}))
    net, public = start.net, assemble.public_data(run, start.net)
    memory.reset()
    held: dict[int, str] = {}
    versions, transport = VersionStore(folder / "server"), Processes(folder, held)

    seats = Seats(Key.root(run.seed), run.rounds, net, versions, public=public, loss=assemble.loss_on(run, net, public))
    state = run.method.init(seats.server(0))
    sent, clients, alone = [], 0.0, 0.0
    for number in range(1, ROUNDS + 1):
        waited, began = transport.waited, time.perf_counter()
        round = Round(0, seats.server(number, cohort), transport, held, folder)
        state, _ = run_round(run.method, state, round)
        alone = time.perf_counter() - began - (transport.waited - waited)
        visits = list(round.visits.values())
        for visit in visits:
            if visit.error is not None:
                raise RuntimeError(f"client {visit.client}: {visit.error}")
        clients = fmean(visit.seconds for visit in visits)
        sent.append(fmean(visit.bytes_down + visit.bytes_up for visit in visits))
    run.method.materialise(state, net)
    newcomer, returning = sent
    return asdict(Cost(newcomer, returning, clients, alone, transport.peak, memory.peak() - start.before))


def _client(folder: Path, action: str, id: int, held: str) -> dict[str, Any]:
    """One visit: a process that holds the client's rows, its model and its frame."""
    from thinwire import assemble, config, memory
    from thinwire.runtime.endpoint import ACTIONS, Endpoint
    from thinwire.runtime.seats import Seats
    from thinwire.runtime.store import ClientMemories, VersionStore

    run = config.load(folder / "run.toml")
    start = assemble.begin(*assemble.prepared(run), hollow=run.method.hollow)
    net, data = start.net, assemble.client_data(run, list(start.rows.clients.values())[id], start.net)
    frame = Frame.load(folder / "down")
    versions, memories = VersionStore(folder / "versions" / str(id)), ClientMemories(folder / "clients")
    seats = Seats(Key.root(run.seed), run.rounds, net, versions, {id: data}, memories, lambda *_: held or None)
    endpoint = Endpoint(run.method, seats, ACTIONS, spool=folder)
    memory.reset()
    began, error = time.perf_counter(), None
    try:
        endpoint.answer(action, frame).move_to(folder / "up")
    except WireError as wrong:
        error = f"{type(wrong).__name__}: {wrong}"
    return {"peak": memory.peak() - start.before, "seconds": time.perf_counter() - began, "error": error}


def _ask(side: str, folder: Path, *args: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "thinwire.compare", side, str(folder), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(side: str, folder: str, *args: str) -> None:
    """One side, in the process that `_ask` has started; its answer is the last line on stdout."""
    if side == "server":
        answer = _server(Path(folder), tuple(map(int, args[0].split(","))))
    else:
        answer = _client(Path(folder), args[0], int(args[1]), args[2])
    sys.stdout.write(json.dumps(answer) + "\n")
