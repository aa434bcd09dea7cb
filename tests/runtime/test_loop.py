"""The run folder: records, checkpoints, and going on after a stop."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from federation import closed_data, tiny_net
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire.aggregate.robust import Clipped
from thinwire.core import Method, Server
from thinwire.errors import ConfigError, Damaged, RunError
from thinwire.keys import Key
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.model.net import Net
from thinwire.runtime import checkpoint
from thinwire.runtime.cohort import All, Only, Uniform
from thinwire.runtime.course import Course, Job, Watch, read_records, train

METHODS = {
    "fedkseed": FedKSeed(seeds=32, steps=4, batch_size=4, lr=1e-4, pro=True),
    "fedavg": FedAvg(steps=2, batch_size=4, lr=1e-3),
    "clipped": FedAvg(steps=2, batch_size=4, lr=1e-3, aggregation=Clipped(bound="running")),
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


def job(net: Net, folder: Path, method: str | Method = "fedkseed", **changes: Any) -> Job:
    data = [closed_data(net, rows, rows) for rows in (12, 8, 16)]
    fields: dict[str, Any] = {
        "method": method if isinstance(method, Method) else METHODS[method],
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
    assert set(client) == {"id", "name", "bytes_down", "bytes_up", "seconds", "examples", "loss", "share", "why"}
    assert (client["name"], client["examples"]) == ("a", 12)
    assert (client["share"], client["why"]) == (pytest.approx(12 / 36), "by examples")
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


# What is damaged between two processes


class Notes(Watch):
    """Keeps what is reported to people."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def noticed(self, line: str) -> None:
        self.lines.append(line)


RESIDUE = GradualDiff(lr=3e-3, steps=2, batch_size=4, rounding="residue")


def cut(net: Net, folder: Path, method: Any = RESIDUE) -> Path:
    """A run of four rounds that was stopped in the third."""
    with pytest.raises(KeyboardInterrupt):
        train(job(net, folder, watch=StopIn(3, 1), method=method))
    return folder


def flip(file: Path, at: int = -20) -> None:
    whole = bytearray(file.read_bytes())
    whole[at] ^= 1
    file.write_bytes(whole)


@pytest.fixture(scope="module")
def undisturbed(net: Net, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(job(net, tmp_path_factory.mktemp("undisturbed"), method=RESIDUE))


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "empty"])
def test_a_clients_memory_that_is_damaged_is_reported_and_the_checkpoint_before_is_taken(
    how: str, net: Net, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    cut(net, tmp_path)
    file = tmp_path / "state" / "clients" / "2" / "000002.safetensors"
    if how == "flipped":
        flip(file)
    elif how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9] if how == "cut" else b"")
    watch = Notes()
    ended = train(job(net, tmp_path, watch=watch, method=RESIDUE))
    assert ended["sha256"] == undisturbed["sha256"]
    assert [line for line in watch.lines if "going on from round 1" in line and "memory of client 2" in line]
    assert [r["round"] for r in read_records(tmp_path / "rounds.jsonl")] == [1, 2, 3, 4]


def test_memory_that_is_damaged_in_both_checkpoints_ends_in_a_line_and_nothing_is_touched(
    net: Net, tmp_path: Path
) -> None:
    cut(net, tmp_path)
    for file in (tmp_path / "state" / "clients").glob("*/*.safetensors"):
        flip(file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(Damaged, match=r"no checkpoint is whole .round 2: the memory of client"):
        train(job(net, tmp_path, method=RESIDUE))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_whose_checkpoints_are_gone_is_not_begun_over(net: Net, tmp_path: Path) -> None:
    cut(net, tmp_path)
    for folder in (tmp_path / "state").glob("round-*"):
        shutil.rmtree(folder)
    kept = (tmp_path / "rounds.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"there is no checkpoint, but rounds.jsonl has rounds that have ended"):
        train(job(net, tmp_path, method=RESIDUE))
    assert (tmp_path / "rounds.jsonl").read_bytes() == kept


def test_one_damaged_checkpoint_is_reported(net: Net, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    cut(net, tmp_path)
    flip(tmp_path / "state" / "round-000002" / "state.frame")
    watch = Notes()
    assert train(job(net, tmp_path, watch=watch, method=RESIDUE))["sha256"] == undisturbed["sha256"]
    assert watch.lines[0].startswith("the checkpoint of round 2: ")


@pytest.mark.parametrize("content", [b"", None, b"\xff\xfe{\n"])
def test_evaluations_that_are_lost_are_reported_and_cost_no_model(
    net: Net, tmp_path: Path, undisturbed: dict[str, Any], content: bytes | None
) -> None:
    cut(net, tmp_path)
    if content is None:
        (tmp_path / "evals.jsonl").unlink()
    else:
        (tmp_path / "evals.jsonl").write_bytes(content)
    watch = Notes()
    ended = train(job(net, tmp_path, watch=watch, method=RESIDUE))
    assert ended["sha256"] == undisturbed["sha256"]
    assert (ended["first"], len(ended["final"])) == ([], 1)
    assert any("2 of 2 records are lost" in line for line in watch.lines)
    assert (tmp_path / "model" / "config.json").exists()


def test_what_a_killed_process_has_left_half_written_is_removed(net: Net, tmp_path: Path) -> None:
    cut(net, tmp_path)
    left = [".model.0123456789ab.tmp/model.safetensors", ".model.0123456789ab.old/config.json", "spool/x.frame"]
    left += ["state/clients/1/.tmpA1b2C3", "state/versions/x.safetensors.part", "state/round-000003.part/state.frame"]
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    train(job(net, tmp_path, method=RESIDUE))
    assert not [name for name in left if (tmp_path / name).exists()]
    assert not list(tmp_path.glob(".model.*"))


class Poison(FedAvg):
    """The mean comes out as no number in round 2, as that of float16 weights at the end of their range may."""

    def aggregate(self, state: Any, server: Server, replies: Any) -> Any:
        state, metrics = super().aggregate(state, server, replies)
        if server.round == 2:
            next(iter(state.weights.values())).view(-1)[0] = math.nan
        return state, metrics


def test_a_state_that_is_no_number_ends_the_run_before_it_is_kept(net: Net, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"after round 2 model.embed_tokens.weight is not finite") as error:
        train(job(net, tmp_path, method=Poison(steps=1, batch_size=4)))
    assert "\n" not in str(error.value)
    assert checkpoint.rounds(tmp_path / "state") == [0, 1]
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_last_loss_that_is_no_number_is_no_result(net: Net, tmp_path: Path, loss: float | None) -> None:
    scores = iter([2.0, loss])
    with pytest.raises(RunError, match="after the last round, 4, the loss on heldout is not finite"):
        train(job(net, tmp_path, evaluate=lambda: [{"split": "heldout", "loss": next(scores)}], eval_every=0))
    assert not (tmp_path / "summary.json").exists()
    text = (tmp_path / "evals.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_cohort_of_clients_that_are_not_there_is_refused(net: Net, tmp_path: Path) -> None:
    segments = [All(rounds=1), Only(clients=(1, 3, 7))]
    with pytest.raises(ConfigError, match=r"cohort.1.clients: no client 3, 7: there are 3 clients, 0 to 2"):
        train(job(net, tmp_path, segments=segments))
    assert not (tmp_path / "state").exists()


def test_the_traceback_of_a_reply_is_in_the_runs_log(net: Net, tmp_path: Path) -> None:
    class Faulty(FedAvg):
        def check(self, state: Any, client_id: int, up: Any) -> None:
            if client_id == 1:
                raise KeyError("lm_head")

    train(job(net, tmp_path, method=Faulty(steps=1, batch_size=4)))
    text = (tmp_path / "log.txt").read_text()
    assert "round 2, client 1: its reply cannot be used" in text
    assert "Traceback" in text
    assert [c.get("error") for c in read_records(tmp_path / "rounds.jsonl")[1]["clients"]] == [
        None, "KeyError: 'lm_head'", None
    ]  # fmt: skip


LOSSES = [3.0, 2.0, 1.0, 1.5, 2.5, 0.5, 4.0]  # of the start, and after each round


def by_loss(net: Net, folder: Path, losses: list[float] = LOSSES, **changes: Any) -> Job:
    """A run whose held-out loss is known: the best round is the second, and after it come two that are worse."""
    found = job(net, folder, changes.pop("method", "fedavg"), rounds=len(losses) - 1, eval_every=1, **changes)

    def loss() -> list[dict[str, Any]]:
        scored = read_records(folder / "evals.jsonl")
        return [{"split": "heldout", "loss": losses[len(scored) // 2]}, {"split": "other", "loss": -1.0}]

    found.evaluate = loss
    return found


def patient(evaluations: int) -> Any:
    return lambda now: now["waited"] >= evaluations


def weights_after(net: Net, folder: Path, rounds: int, method: str = "fedavg") -> str:
    """The hash of the weights after so many rounds of the same run."""
    return str(train(by_loss(net, folder, [9.0] * (rounds + 1), method=method))["sha256"])


def test_the_model_is_that_of_the_best_round_where_it_is_kept(net: Net, tmp_path: Path) -> None:
    last = train(by_loss(net, tmp_path / "last", LOSSES[:5]))
    best = train(by_loss(net, tmp_path / "best", LOSSES[:5], keep="best"))
    assert best["sha256"] == weights_after(net, tmp_path / "two", 2) != last["sha256"]
    assert (best["rounds"], [row["round"] for row in best["final"]]) == (4, [2, 2])
    assert [row["loss"] for row in last["final"]] == [2.5, -1.0]
    assert checkpoint.rounds(tmp_path / "best" / "state") == [2, 3, 4]  # the best one's stays, and the two newest
    assert checkpoint.rounds(tmp_path / "last" / "state") == [3, 4]


def test_a_start_model_that_no_round_betters_is_kept(net: Net, tmp_path: Path) -> None:
    kept = train(by_loss(net, tmp_path / "kept", [1.0, 2.0, math.nan], keep="best"))
    net.reset()
    assert kept["sha256"] == net.state_sha256()
    assert [row["round"] for row in kept["final"]] == [0, 0]


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("round", [2, 3, 5, 6])
def test_the_best_round_survives_a_stop(method: str, round: int, net: Net, tmp_path: Path) -> None:
    whole = train(by_loss(net, tmp_path / "whole", method=method, keep="best"))
    with pytest.raises(KeyboardInterrupt):
        train(by_loss(net, tmp_path / "cut", method=method, keep="best", watch=StopIn(round, 1)))
    assert strip(train(by_loss(net, tmp_path / "cut", method=method, keep="best"))) == strip(whole)
    assert [row["round"] for row in whole["final"]] == [5, 5]


def test_the_best_round_survives_the_loss_of_the_newest_checkpoint(net: Net, tmp_path: Path) -> None:
    """Its own, so that the run goes on from the round before, whose best was another one."""
    whole = train(by_loss(net, tmp_path / "whole", keep="best"))
    with pytest.raises(KeyboardInterrupt):
        train(by_loss(net, tmp_path / "cut", keep="best", watch=StopIn(6, 1)))
    newest = tmp_path / "cut" / "state" / "round-000005" / "state.frame"
    newest.write_bytes(newest.read_bytes()[:-3])
    assert 2 in checkpoint.rounds(tmp_path / "cut" / "state")
    assert strip(train(by_loss(net, tmp_path / "cut", keep="best"))) == strip(whole)


def test_a_best_round_that_cannot_be_read_is_named(net: Net, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(by_loss(net, tmp_path, LOSSES[:5], keep="best", watch=StopIn(4, 1)))
    shutil.rmtree(tmp_path / "state" / "round-000002")
    with pytest.raises(Damaged, match="the state of round 2, the best one"):
        train(by_loss(net, tmp_path, LOSSES[:5], keep="best"))


def test_a_run_stops_when_no_evaluation_betters_the_best(net: Net, tmp_path: Path) -> None:
    summary = train(by_loss(net, tmp_path / "stopped", stop=patient(2)))
    assert summary["rounds"] == 4
    assert [row["loss"] for row in summary["final"]] == [2.5, -1.0]
    assert [r["round"] for r in read_records(tmp_path / "stopped" / "rounds.jsonl")] == [1, 2, 3, 4]
    assert strip(train(by_loss(net, tmp_path / "stopped", stop=patient(2)))) == strip(summary)  # it has ended
    assert train(by_loss(net, tmp_path / "goes-on", stop=patient(3)))["rounds"] == 6
    with pytest.raises(KeyboardInterrupt):
        train(by_loss(net, tmp_path / "cut", stop=patient(2), watch=StopIn(4, 1)))
    assert strip(train(by_loss(net, tmp_path / "cut", stop=patient(2)))) == strip(summary)


def test_without_held_out_rows_there_is_no_best(net: Net, tmp_path: Path) -> None:
    for changes in ({"keep": "best"}, {"stop": patient(1)}):
        with pytest.raises(ConfigError, match="no rows are held out"):
            train(job(net, tmp_path / next(iter(changes)), evaluate=list, **changes))


def test_a_run_ends_at_its_target_and_says_why(net: Net, tmp_path: Path) -> None:
    run = by_loss(net, tmp_path / "run", stop=lambda now: f"{now['loss']} on {now['on']}" if now["loss"] <= 1 else None)
    summary = train(run)
    assert (summary["rounds"], summary["ended"]) == (2, "1.0 on heldout")
    assert train(by_loss(net, tmp_path / "other", on="other", stop=lambda now: now["loss"] <= -1))["rounds"] == 1
    whole = train(by_loss(net, tmp_path / "whole", stop=lambda now: now["loss"] < 0))
    assert (whole["rounds"], "ended" in whole) == (6, False)


def test_the_reason_survives_a_stop(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends after the checkpoint of the last round, and before its summary."""

    def cut(self: Course) -> None:
        raise KeyboardInterrupt

    stop = {"stop": lambda now: "enough" if now["waited"] >= 2 else None}
    with monkeypatch.context() as patched:
        patched.setattr(Course, "end", cut)
        with pytest.raises(KeyboardInterrupt):
            train(by_loss(net, tmp_path, **stop))
    summary = train(by_loss(net, tmp_path, **stop))
    assert (summary["rounds"], summary["ended"]) == (4, "enough")


def test_a_round_of_the_warmup_is_neither_the_best_nor_waited_for(net: Net, tmp_path: Path) -> None:
    losses = [0.1, 0.2, 1.0, 0.9, 1.1, 1.2, 1.3]
    plain = train(by_loss(net, tmp_path / "plain", losses, keep="best", stop=patient(2)))
    assert (plain["rounds"], plain["kept"]) == (2, {"round": 0, "on": "heldout"})
    warm = train(by_loss(net, tmp_path / "warm", losses, keep="best", stop=patient(2), warmup=1))
    assert (warm["rounds"], warm["kept"]) == (5, {"round": 3, "on": "heldout"})
    assert warm["sha256"] == weights_after(net, tmp_path / "three", 3)


def test_the_rows_that_choose_are_not_the_ones_that_are_reported(net: Net, tmp_path: Path) -> None:
    run = by_loss(net, tmp_path, LOSSES[:5], keep="best", on="selection")
    inner = run.evaluate
    run.evaluate = lambda: [*inner()[1:], {**inner()[0], "split": "selection"}]
    summary = train(run)
    assert summary["kept"] == {"round": 2, "on": "selection"}
    assert {row["split"] for row in summary["first"] + summary["final"]} == {"other"}
    assert {row["split"] for row in read_records(tmp_path / "evals.jsonl")} == {"other", "selection"}
    assert summary["sha256"] == weights_after(net, tmp_path / "two", 2)


def test_the_sites_mean_may_choose(net: Net, tmp_path: Path) -> None:
    run = by_loss(net, tmp_path, LOSSES[:5], keep="best", on="sites")
    inner = run.evaluate
    run.evaluate = lambda: [*inner()[1:], {**inner()[0], "split": "sites_train"}]
    assert train(run)["kept"] == {"round": 2, "on": "sites"}


def test_the_best_round_is_the_one_that_is_found_by_hand(net: Net, tmp_path: Path) -> None:
    """Every round scored by hand, on the weights that the method makes of its state."""
    from thinwire.evaluate.loss import mean_loss

    held = closed_data(net, 12, 99)

    def score() -> list[dict[str, Any]]:
        return [{"split": "heldout", "loss": mean_loss(net.model, held, 16)[0]}]

    method = FedAvg(steps=4, batch_size=4, lr=3e-2)
    shared: dict[str, Any] = {"evaluate": score, "eval_every": 1, "rounds": 6}
    kept = train(job(net, tmp_path / "kept", method, keep="best", **shared))
    by_hand: dict[int, tuple[float, str]] = {}

    def seen(now: Any) -> None:
        by_hand[now["round"]] = (mean_loss(net.model, held, 16)[0], net.state_sha256())

    train(job(net, tmp_path / "hand", method, stop=seen, **shared))
    state = checkpoint.on_disk(tmp_path / "hand" / "state", 6, method.State)
    method.materialise(state, net)
    by_hand[6] = (mean_loss(net.model, held, 16)[0], net.state_sha256())
    best = min(by_hand, key=lambda at: by_hand[at][0])
    assert kept["kept"]["round"] == best
    assert kept["sha256"] == by_hand[best][1]
