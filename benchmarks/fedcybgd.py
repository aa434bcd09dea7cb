"""A FedCyBGD client against one that trains the whole model: memory, bytes and seconds of a visit, over whole cycles.

    python benchmarks/fedcybgd.py [--json FILE] [method.drop=0.3 ...]

SmolLM2-135M in bfloat16, trained through float32 copies of what is trained, by AdamW, activations recomputed on both
sides, 4 x 128 tokens a step. Ten clients visit ten blocks, twice over, each visit in a process of its own that does not
hold the whole model: in the first cycle all are newcomers, in the second all return. Bytes are those of frames, against
whole bfloat16 weights both ways. Memory is the peak less what is resident after the imports.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rows import Row, finish

from thinwire import apart, build, config, wire
from thinwire.core import Round, Server, run_round
from thinwire.keys import Key
from thinwire.methods.fedavg import Weights
from thinwire.runtime.store import VersionStore

CLIENTS, STEPS, ROWS, LENGTH = 10, 2, 4, 128
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they"
RUN = f"""
[model]
dtype = "bfloat16"
[data]
path = "{{rows}}"
clients = {CLIENTS}
heldout = 0
template = "completion"
max_length = {LENGTH}
"""
LOCAL = [f"method.steps={STEPS}", f"method.batch_size={ROWS}", "method.lr=1e-5", "method.recompute=true"]


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
    net, held = build.net_of(run), dict[int, str]()
    versions, transport = VersionStore(folder / "server", 8 + CLIENTS), apart.Processes(folder, held)

    def server(turn: int, *cohort: int) -> Server:
        return Server(net, Key.root(0).fold("server", turn), turn, turns, cohort, versions)

    state, found = run.method.init(server(0)), []
    for turn in range(1, turns + 1):
        client = (turn - 1) % CLIENTS
        transport.peak, transport.waited, began = 0, 0.0, time.perf_counter()
        at = Round(0, server(turn, client), transport, held, folder)
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


def main() -> None:
    """All rows."""
    settings = [argument for argument in sys.argv[1:] if "=" in argument]
    plain = cycles(1, "method.name=fedavg")[0]
    weights = build.net_of(config.parse({"method": {"name": "fedavg"}, "data": {"path": "x"}})).base
    whole = 2 * len(wire.encode(Weights({name: tensor.bfloat16() for name, tensor in weights.items()})))
    relay = ["method.name=fedcybgd", *settings]
    raw, coded = cycles(CLIENTS, *relay, "method.coded=false"), cycles(2 * CLIENTS, *relay)
    first, second = coded[:CLIENTS], coded[CLIENTS:]
    rows = [
        Row("peak memory of a client, mean over a cycle", fmean(v.peak for v in first) / 1e6, plain.peak / 1e6, "MB"),
        Row("peak memory of a client, worst block", max(v.peak for v in first) / 1e6, plain.peak / 1e6, "MB"),
        *(
            Row(
                f"bytes down and up, {name}, mean over a cycle",
                fmean(v.down + v.up for v in cycle) / 1e6,
                whole / 1e6,
                "MB",
            )
            for name, cycle in (("newcomer, raw", raw), ("newcomer, coded", first), ("returning, coded", second))
        ),
        Row("a visit, mean over a cycle", fmean(v.seconds for v in first), plain.seconds, "s"),
        Row("the server, a turn", fmean(v.server for v in first), plain.server, "s"),
    ]
    finish(rows)


if __name__ == "__main__":
    main()
