"""A FedCyBGD client against one that trains the whole model: memory, seconds and bytes of a visit, over whole cycles.

    python benchmarks/fedcybgd.py [memory] [seconds] [bytes] [--json FILE] [method.drop=0.3 ...]

SmolLM2-135M, AdamW on float32 copies of what is trained, activations recomputed on both sides, 4 x 128 tokens a step.
Unless set otherwise with the method's defaults: nothing dropped or pruned, 7 bits a weight around what trains.
Ten clients visit ten blocks, each in a process of its own that does not hold the whole model, and take twenty steps in
bfloat16. The whole model's visits are two before the cycle and two after it. Memory: the peak less what is resident
after the imports. Seconds: decoding included; with `model.dtype=float32 method.dtype=bfloat16` both sides compute in
float32, for processors without products of bfloat16. Bytes: the demo's clients and rows, twenty steps a visit, for two
cycles; all are newcomers in the first and return in the second; against whole bfloat16 weights both ways.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from rows import Row, finish

from thinwire import assemble, config, wire
from thinwire.compare.measure import Processes
from thinwire.keys import Key
from thinwire.methods.fedavg import Weights
from thinwire.records import read_records
from thinwire.runtime.round import Round, run_round
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import VersionStore

CLIENTS, ROWS, LENGTH, STEPS = 10, 4, 128, 20
WHOLE = ("method.drop=0", "method.prune=0")  # which the demo sets
DEMO = Path(__file__).parent.parent / "recipes" / "demo-fedcybgd.toml"
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they"
RUN = f"""
[data]
path = "{{rows}}"
clients = {CLIENTS}
heldout = 0
template = "completion"
max_length = {LENGTH}
too_long = "cut"
"""
LOCAL = [f"method.batch_size={ROWS}", "method.lr=1e-5", "method.recompute=true"]


@dataclass(frozen=True)
class Visit:
    """What one client's turn took: frames' bytes, the client's peak and seconds, the server's seconds around it."""

    down: int
    up: int
    peak: int
    seconds: float
    server: float


def visits(folder: Path, turns: int, settings: Sequence[str]) -> list[Visit]:
    """Turns of clients one after another, each in a process of its own."""
    rows = folder / "rows.jsonl"
    words = WORDS.split()
    texts = [" ".join(words[i] for i in Key.root(n).integers(len(words), 2 * LENGTH).tolist()) for n in range(80)]
    rows.write_text("".join(json.dumps({"prompt": text, "completion": text[:200]}) + "\n" for text in texts))
    (folder / "plain.toml").write_text(RUN.format(rows=rows))
    run = config.load(folder / "plain.toml", [*settings, *LOCAL])
    (folder / "run.toml").write_text(run.to_toml())
    net, held = assemble.net_of(run), dict[int, str]()
    versions, transport = VersionStore(folder / "server", 8 + CLIENTS), Processes(folder, held)

    seats = Seats(Key.root(0), turns, net, versions)
    state, found = run.method.init(seats.server(0)), []
    for turn in range(1, turns + 1):
        client = (turn - 1) % CLIENTS
        transport.peak, transport.waited, began = 0, 0.0, time.perf_counter()
        at = Round(0, seats.server(turn, (client,)), transport, held, folder)
        state, _ = run_round(run.method, state, at)
        seen, own = at.visits[client], time.perf_counter() - began - transport.waited
        assert seen.error is None, seen.error
        found.append(Visit(seen.bytes_down, seen.bytes_up, transport.peak, seen.seconds, own))
    return found


def cycles(turns: int, *settings: str) -> list[Visit]:
    """The same in a folder that goes again."""
    folder = Path(tempfile.mkdtemp())
    try:
        return visits(folder, turns, settings)
    finally:
        shutil.rmtree(folder)


def sent(turns: int, settings: Sequence[str]) -> list[int]:
    """Bytes down and up of each turn of the demo."""
    folder = Path(tempfile.mkdtemp())
    try:
        changes = [f"rounds={turns}", "eval.rows=8", *WHOLE, *settings]
        command = [sys.executable, "-m", "thinwire.cli", "run", str(DEMO), *changes, "--out", str(folder / "run")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [turn["bytes_down"] + turn["bytes_up"] for turn in read_records(folder / "run" / "rounds.jsonl")]
    finally:
        shutil.rmtree(folder)


def dtype(settings: Sequence[str]) -> str:
    """That of both sides: bfloat16, unless it is set."""
    return next((setting for setting in settings if setting.startswith("model.dtype=")), "model.dtype=bfloat16")


@cache
def twenty(*relay: str) -> tuple[list[Visit], list[Visit]]:
    """Two visits with the whole model before a cycle's and two after it, and the cycle's."""
    many = [dtype(relay), f"method.steps={STEPS}"]
    whole = ["method.name=fedavg", *many]
    before, cycle = cycles(2, *whole), cycles(CLIENTS, *relay, *many)
    return before + cycles(2, *whole), cycle


def memory(relay: Sequence[str]) -> list[Row]:
    """Of a client."""
    plain, cycle = twenty(*relay)
    found = (("mean over a cycle", fmean(visit.peak for visit in cycle)), ("worst", max(v.peak for v in cycle)))
    whole = fmean(visit.peak for visit in plain) / 1e6
    return [Row(f"peak memory of a client, {name}", peak / 1e6, whole, "MB") for name, peak in found]


def seconds(relay: Sequence[str]) -> list[Row]:
    """Of a visit; what of it no step takes; and of the server around it."""
    plain, cycle = twenty(*relay)
    short = fmean(v.seconds for v in cycles(CLIENTS, *relay, dtype(relay), "method.steps=1"))
    visit, server = fmean(v.seconds for v in cycle), fmean(v.server for v in cycle)
    return [
        Row("a visit, mean over a cycle", visit, fmean(v.seconds for v in plain), "s"),
        Row(
            "the proxy at the client and what else no step takes, of a visit",
            (STEPS * short - visit) / (STEPS - 1),
            visit,
            "s",
        ),
        Row("the server around it, of a visit", server, visit, "s"),
        Row("the server, a turn", server, fmean(v.server for v in plain), "s"),
    ]


def traffic(settings: Sequence[str]) -> list[Row]:
    """Of a visit, both ways."""
    weights = assemble.net_of(config.parse({"method": {"name": "fedavg"}, "data": {"path": "x"}})).base
    whole = 2 * len(wire.encode(Weights({name: tensor.bfloat16() for name, tensor in weights.items()}))) / 1e6
    raw = sent(CLIENTS, [*settings, "method.start=sent", "method.coded=false"])
    coded = sent(2 * CLIENTS, [*settings, "method.start=sent"])
    found = (("newcomer, raw", raw), ("newcomer", coded[:CLIENTS]), ("returning", coded[CLIENTS:]))
    return [
        Row(f"bytes down and up, {name}, mean over a cycle", fmean(turns) / 1e6, whole, "MB") for name, turns in found
    ]


def main() -> None:
    """The parts that are named, or all."""
    settings = [argument for argument in sys.argv[1:] if "=" in argument]
    relay = ["method.name=fedcybgd", *settings]
    parts = {"memory": lambda: memory(relay), "seconds": lambda: seconds(relay), "bytes": lambda: traffic(settings)}
    chosen = [name for name in parts if name in sys.argv] or list(parts)
    finish([row for name in chosen for row in parts[name]()])


if __name__ == "__main__":
    main()
