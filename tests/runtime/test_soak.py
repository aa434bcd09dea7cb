"""A long run of many clients, some absent and some failing, killed and gone on with: what it leaves, how it grows.

The other half of this file, run as a program, is the process that is killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROUNDS, CLIENTS, COHORT, KILLS = 500, 50, 8, 6
WARM = 50  # rounds
GROWTH = 1.02


def run(folder: Path, rounds: int) -> None:
    """The run, in this process; a line of numbers for each of its rounds in `numbers.jsonl`."""
    import torch
    from federation import closed_data, tiny_net

    from thinwire import memory
    from thinwire.keys import Key
    from thinwire.methods.gradualdiff import GradualDiff
    from thinwire.runtime import course
    from thinwire.runtime.cohort import Uniform
    from thinwire.runtime.inprocess import InProcess
    from thinwire.runtime.round import SMALL, Reply
    from thinwire.wire import Frame

    class Failing(InProcess):
        """Some replies do not come, others come damaged: which ones, the client and the round alone decide."""

        def exchange(self, frames: Iterable[tuple[int, Frame]], action: str = "train") -> Iterator[Reply]:
            rounds: dict[int, int] = {}

            def noted() -> Iterator[tuple[int, Frame]]:
                for client, frame in frames:
                    rounds[client] = frame.header().round
                    yield client, frame

            for reply in super().exchange(noted(), action):
                fate = zlib.crc32(b"%d %d" % (reply.client, rounds[reply.client])) % 16
                if fate == 0:
                    yield Reply(reply.client, None, reply.seconds, "no reply in time")
                elif fate == 1 and reply.frame is not None and len(reply.frame) <= SMALL:
                    yield Reply(reply.client, Frame(bytes(reply.frame)[:-9] + bytes(9)), reply.seconds)
                else:
                    yield reply

    class Numbers(course.Watch):
        """Resident bytes and open files after each round."""

        def round_ends(self, record: Any, left: float) -> None:
            line = [record["round"], memory.resident(), len(os.listdir("/proc/self/fd"))]
            with (folder / "numbers.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    torch.set_num_threads(1)
    course.InProcess = Failing  # type: ignore[misc]
    net = tiny_net(folder.parent / "model", "bfloat16", hidden_size=16, intermediate_size=32)
    job = course.Job(
        method=GradualDiff(steps=1, batch_size=2, lr=1e-3, codec="lowrank", rank=1),
        net=net,
        clients=[closed_data(net, 4, 100 + i) for i in range(CLIENTS)],
        names=[str(i) for i in range(CLIENTS)],
        folder=folder,
        run=7,
        key=Key.root(3),
        rounds=rounds,
        segments=[Uniform(n=COHORT)],
        evaluate=lambda: [{"split": "heldout", "loss": next(net.model.parameters()).sum().item()}],
        eval_every=10,
        watch=Numbers(),
    )
    folder.mkdir(exist_ok=True)
    course.train(job)


def start(folder: Path, rounds: int) -> subprocess.Popen[bytes]:
    """The run as a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    return subprocess.Popen([sys.executable, __file__, str(folder), str(rounds)], stdout=subprocess.DEVNULL, env=env)


def lines(path: Path) -> list[Any]:
    """Whole lines of a file of JSON."""
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [json.loads(line) for line in whole]


def strip(record: Any) -> Any:
    """A record without times and memory."""
    if isinstance(record, dict):
        return {k: strip(v) for k, v in record.items() if k not in ("seconds", "peak_memory_bytes")}
    return [strip(v) for v in record] if isinstance(record, list) else record


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_a_long_run_grows_no_fatter_and_ends_the_same_however_often_it_is_killed(tmp_path: Path) -> None:
    rounds = int(os.environ.get("THINWIRE_SOAK_ROUNDS", str(ROUNDS)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, rounds).wait() == 0

    draw, kills = random.Random(1), 0
    for at in sorted(draw.sample(range(2, rounds - 1), KILLS)):
        process = start(killed, rounds)
        while process.poll() is None and len(lines(killed / "rounds.jsonl")) < at:
            time.sleep(draw.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == KILLS
    assert start(killed, rounds).wait() == 0

    ends = [json.loads((folder / "summary.json").read_text()) for folder in (whole, killed)]
    assert strip(ends[0]) == strip(ends[1])
    for name in ("rounds.jsonl", "evals.jsonl"):
        assert strip(lines(whole / name)) == strip(lines(killed / name))
    records = lines(killed / "rounds.jsonl")
    assert [record["round"] for record in records] == list(range(1, rounds + 1))
    assert {len(record["clients"]) for record in records} == {COHORT}
    lost = sum("error" in client for record in records for client in record["clients"])
    assert 0 < lost < rounds * COHORT / 4

    numbers = lines(whole / "numbers.jsonl")
    early, late = numbers[WARM : 2 * WARM], numbers[-WARM:]
    before, after = (statistics.median(size for _, size, _ in part) for part in (early, late))
    handles = {count for _, _, count in numbers[WARM:]}
    print(
        f"\n{rounds} rounds, {CLIENTS} clients, {COHORT} a round, {lost} replies lost or damaged, killed {kills} times"
    )
    print(f"resident {before / 1e6:.1f} MB after {WARM} rounds, {after / 1e6:.1f} MB at the end: {after / before:.4f}")
    print(f"bytes down {ends[0]['bytes_down']:,}, with the kills {ends[1]['bytes_down']:,}")
    print(f"open files {min(handles)} to {max(handles)}")
    assert after <= GROWTH * before
    assert len(handles) == 1


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
