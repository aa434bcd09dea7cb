"""Secure sums over Flower's messages and the sites' workers: where they end, what dies with a process, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")
pytest.importorskip("cryptography", reason="comes with: pip install 'thinwire[secure]'")
pytest.importorskip("Crypto", reason="comes with: pip install 'thinwire[secure]'")

from grid import OneProcess, entries, federate
from silos import Silos, in_process, state_of

from thinwire.federation.envelope import unpack
from thinwire.federation.worker import Worker
from thinwire.runtime import course
from thinwire.wire import Frame

METHOD: dict[str, Any] = {
    "name": "fedkseed",
    "seeds": 64,
    "lr": 2e-4,
    "eps": 1e-3,
    "steps": 2,
    "batch_size": 2,
    "shared": True,
    "weighting": "uniform",
}


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


def kind_of(message: Any) -> str:
    """The kind of the frame in a reply, "" for an error."""
    piece, about = unpack(message.content)
    return "" if about.get("error") else Frame(piece).header().kind


def losing(grid: OneProcess, *lost: tuple[int, str]) -> None:
    """Have replies of these clients and kinds not come."""
    grid.tamper = lambda client, reply: None if (client, kind_of(reply)) in lost else reply


@pytest.mark.parametrize(("method", "examples"), [(METHOD, None), ({"name": "fedavg", "steps": 1, "lr": 1e-3}, 16)])
def test_sites_come_to_the_weights_of_one_process(
    method: dict[str, Any], examples: int | None, silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = silos.run(method, privacy={"secure": {} if examples is None else {"examples": examples}})
    job, _, _ = federate(silos, run, tmp_path / "there", chunk_bytes=20_000)
    summary = course.train(job)
    in_process(silos, run, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")
    assert summary["bytes_keys"] > 0
    kinds = [(line["direction"], line["kind"]) for line in entries(tmp_path / "there", "north") if line["round"] == 2]
    asked = [kind for way, kind in kinds if way == "in"], [kind for way, kind in kinds if way == "out"]
    assert asked == (["Invite", "Peers", "Task", "Remaining"], ["Keys", "Shares", "Masked", "Unmasked"])


def test_no_file_of_a_site_or_a_server_holds_a_share_or_a_key(silos: Silos, tmp_path: Path) -> None:
    run = silos.run(METHOD, rounds=1, privacy={"secure": {}})
    job, grid, _ = federate(silos, run, tmp_path / "there")
    secrets: list[bytes] = []

    def seen(client: int, reply: Any) -> Any:
        if kind_of(reply) in ("Keys", "Shares", "Unmasked"):
            secrets.append(unpack(reply.content)[0])
        return reply

    grid.tamper = seen
    course.train(job)
    assert len(secrets) == 9
    files = b"".join(path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file())
    for frame in secrets:
        assert frame[-40:-8] not in files
        assert frame[40:72] not in files


def test_a_server_that_dies_before_the_sum_repeats_the_round_with_fresh_keys(silos: Silos, tmp_path: Path) -> None:
    run = silos.run(METHOD, privacy={"secure": {}})
    job, grid, _ = federate(silos, run, tmp_path / "there", deadline=1.0)
    losing(grid, *((client, "Masked") for client in range(3)))
    with pytest.raises(RuntimeError, match="round 1"):
        course.train(job)
    assert not (tmp_path / "there" / "rounds.jsonl").exists() or not (tmp_path / "there" / "rounds.jsonl").read_text()
    grid.tamper = lambda client, reply: reply
    summary = course.train(job)
    assert summary["rounds"] == 2
    trained = [line["round"] for line in entries(tmp_path / "there", "north") if line["kind"] == "Masked"]
    assert trained == [1, 1, 2]


def test_a_worker_that_ends_within_a_round_is_out_of_it(silos: Silos, tmp_path: Path) -> None:
    """Its masked reply counts where it has come: the others' shares take its masks off."""
    run = silos.run(METHOD, rounds=1, privacy={"secure": {}})
    job, grid, _ = federate(silos, run, tmp_path / "there")

    def dies(client: int, reply: Any) -> Any:
        if client == 1 and kind_of(reply) == "Masked":
            grid.workers[1] = Worker(grid.workers[1].site)
        return reply

    grid.tamper = dies
    course.train(job)
    (record,) = course.read_records(tmp_path / "there" / "rounds.jsonl")
    errors = [visit.get("error") for visit in record["clients"]]
    assert errors[0] is errors[2] is None
    assert "the keys of this sum are not here" in errors[1]


def test_a_site_whose_policy_asks_for_masks_refuses_a_run_without(silos: Silos, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('masked = true\ntemplates = "any"\nchoices = "any"\nmodel = true\n')
    job, grid, _ = federate(silos, silos.run(METHOD), tmp_path / "there", policy=policy)
    errors: list[str] = []
    grid.tamper = lambda client, reply: errors.append(str(unpack(reply.content)[1].get("error"))) or reply
    with pytest.raises(RuntimeError):
        course.train(job)
    assert (
        errors == ["Illegal: this site's policy allows runs with [privacy.secure] alone: replies leave under masks"] * 3
    )


def test_a_site_keeps_its_promise_in_a_new_process(tmp_path: Path) -> None:
    from thinwire.federation.spent import Spent
    from thinwire.wire import Illegal

    Spent(tmp_path).unmask("run", 3, "one")
    Spent(tmp_path).unmask("run", 3, "one")
    for round, other in ((3, "two"), (2, "one")):
        with pytest.raises(Illegal, match="a sum of round 3 is unmasked already"):
            Spent(tmp_path).unmask("run", round, other)
    Spent(tmp_path).unmask("run", 4, "two")
    assert json.loads((tmp_path / "spent.json").read_text())["run"]["unmasked"] == [4, "two"]


def test_noise_in_shares_comes_from_the_sites(silos: Silos, tmp_path: Path) -> None:
    method = {"name": "fedavg", "steps": 1, "lr": 1e-3, "weighting": "uniform"}
    private = {"level": "client", "epsilon": 30.0, "delta": 1e-2, "clip": 0.5, "secure": {}}
    found = []
    for name in ("one", "two"):
        job, _, _ = federate(silos, silos.run(method, privacy=private), tmp_path / name)
        summary = course.train(job)
        assert 0.9 * 30 < summary["privacy"]["epsilon"] <= 30
        out = {line["kind"] for line in entries(tmp_path / name, "north") if line["direction"] == "out"}
        assert out == {"Keys", "Shares", "Masked", "Unmasked"}
        found.append(state_of(tmp_path / name))
    assert found[0] != found[1]  # nobody can draw it again
