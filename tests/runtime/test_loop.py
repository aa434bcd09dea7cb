"""The run folder: records, checkpoints, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from federation import closed_data, tiny_net
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire.keys import Key
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedkseed import FedKSeed
from thinwire.model.flat import Net
from thinwire.runtime import checkpoint
from thinwire.runtime.cohort import All, Uniform
from thinwire.runtime.loop import Job, Watch, read_records, train

METHODS = {
    "fedkseed": FedKSeed(seeds=32, steps=4, batch_size=4, lr=1e-4, pro=True),
    "fedavg": FedAvg(steps=2, batch_size=4, lr=1e-3),
}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


class StopIn(Watch):
    """Interrupts the run in a round, after so many of its clients."""

    def __init__(self, round: int, clients: int) -> None:
        self.at, self.clients, self.round = round, clients, 0

    def round_begins(self, round: int, *_: Any) -> None:
        self.round, self.seen = round, 0

    def client_done(self, client: int) -> None:
        self.seen += 1
        if self.round == self.at and self.seen == self.clients:
            raise KeyboardInterrupt


def job(net: Net, folder: Path, method: str = "fedkseed", **changes: Any) -> Job:
    data = [closed_data(net, rows, rows) for rows in (12, 8, 16)]
    fields: dict[str, Any] = {
        "method": METHODS[method],
        "net": net,
        "clients": data,
        "names": ["a", "b", "c"],
        "folder": folder,
        "run": 7,
        "key": Key.root(3),
        "rounds": 4,
        "segments": [Uniform(n=2, rounds=1), All()],
        "evaluate": lambda: [{"split": "heldout", "loss": next(net.model.parameters()).sum().item()}],
        "eval_every": 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    return Job(**(fields | changes))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(method: str, after: int, net: Net, tmp_path: Path) -> None:
    whole = train(job(net, tmp_path / "whole", method))
    with pytest.raises(KeyboardInterrupt):
        train(job(net, tmp_path / "cut", method, watch=StopIn(3, after)))
    assert checkpoint.rounds(tmp_path / "cut" / "state")[-1] == 2
    assert not (tmp_path / "cut" / "summary.json").exists()
    rest = train(job(net, tmp_path / "cut", method))
    assert rest["sha256"] == whole["sha256"]
    assert (rest["bytes_up"], rest["bytes_down"]) == (whole["bytes_up"], whole["bytes_down"])
    for name in ("rounds.jsonl", "evals.jsonl"):
        ours, theirs = (read_records(tmp_path / folder / name) for folder in ("cut", "whole"))
        assert [strip(r) for r in ours] == [strip(r) for r in theirs]


def strip(record: Any) -> Any:
    """A record without what differs from run to run: times and memory."""
    if isinstance(record, dict):
        return {k: strip(v) for k, v in record.items() if k not in ("seconds", "peak_memory_bytes")}
    return [strip(v) for v in record] if isinstance(record, list) else record


def test_the_records_of_a_run(net: Net, tmp_path: Path) -> None:
    summary = train(job(net, tmp_path))
    rounds = read_records(tmp_path / "rounds.jsonl")
    assert [r["round"] for r in rounds] == [1, 2, 3, 4]
    assert len(rounds[0]["clients"]) == 2
    assert set(rounds[1]) == {
        "round", "clients", "bytes_down", "bytes_up", "seconds", "peak_memory_bytes", "metrics"
    }  # fmt: skip
    client = rounds[1]["clients"][0]
    assert set(client) == {"id", "name", "bytes_down", "bytes_up", "seconds", "examples", "loss"}
    assert (client["name"], client["examples"]) == ("a", 12)
    assert sum(c["bytes_up"] for r in rounds for c in r["clients"]) == summary["bytes_up"]
    assert [r["round"] for r in read_records(tmp_path / "evals.jsonl")] == [0, 2, 4]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["peak_memory_bytes"] > 0
    assert checkpoint.rounds(tmp_path / "state") == [3, 4]
    assert not (tmp_path / "spool").exists()


def test_a_line_that_was_cut_off_is_dropped_on_the_way_on(net: Net, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(job(net, tmp_path, watch=StopIn(3, 1)))
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "clie')
    train(job(net, tmp_path))
    assert [r["round"] for r in read_records(tmp_path / "rounds.jsonl")] == [1, 2, 3, 4]


def test_many_clients_share_one_model(net: Net, tmp_path: Path) -> None:
    """Sixty clients leave no more tensors behind than six: the net, the kept copy, and the state."""
    import gc

    import torch

    def alive(clients: int) -> int:
        data = [closed_data(net, 4, i) for i in range(clients)]
        most = 0

        class Count(Watch):
            def client_done(self, client: int) -> None:
                nonlocal most
                if client == clients - 1:
                    gc.collect()
                    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
                    most = max(most, sum({o.untyped_storage().data_ptr(): o.nbytes for o in tensors}.values()))

        names = [str(i) for i in range(clients)]
        changes = {"clients": data, "names": names, "rounds": 1, "segments": [All()], "watch": Count()}
        train(job(net, tmp_path / str(clients), "fedavg", **changes))
        return most

    assert alive(30) <= alive(3) * 1.05


def test_kill_9_in_round_3_of_6_and_resume(tmp_path: Path) -> None:
    """A real process, really killed, and a new one that goes on: the final weights are those of an undisturbed run."""
    model = tiny_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(40, closed=True))
    (tmp_path / "run.toml").write_text(
        f"""
rounds = 6
model.path = "{model}"
[data]
path = "{data}"
clients = 4
choices = ["great", "terrible"]
prompt = "{{input}}:"
answer = " {{output}}"
[method]
name = "fedkseed"
seeds = 64
steps = 20
batch_size = 4
lr = 1e-4
"""
    )

    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "from thinwire.cli import main; main()", "run", str(tmp_path / "run.toml")]
        return subprocess.Popen(
            [*command, "--out", str(tmp_path / out), *more],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    assert start("whole").wait(300) == 0
    process = start("killed")
    rounds = tmp_path / "killed" / "rounds.jsonl"
    deadline = time.monotonic() + 300
    while len(read_records(rounds)) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert start("killed", "--resume").wait(300) == 0
    ends = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("whole", "killed")]
    assert ends[0]["sha256"] == ends[1]["sha256"]
    assert [r["round"] for r in read_records(rounds)] == [1, 2, 3, 4, 5, 6]
