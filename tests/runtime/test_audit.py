"""The server's log: what is in it, and what an audit finds of everything that can be done to it afterwards."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from federation import tiny_net

from thinwire.aggregate.weights import Agreement
from thinwire.errors import Damaged
from thinwire.methods.fedavg import FedAvg
from thinwire.model.net import Net
from thinwire.records import read_records
from thinwire.runtime import checkpoint
from thinwire.runtime.audit import Audited, Signer, audit, read
from thinwire.runtime.course import Job, train

KEY = ec.generate_private_key(ec.SECP384R1())


def signer(key: ec.EllipticCurvePrivateKey = KEY) -> Signer:
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(*form).decode()
    return Signer(public, lambda text: base64.b64encode(key.sign(text.encode(), ec.ECDSA(hashes.SHA384()))).decode())


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return tiny_net(tmp_path_factory.mktemp("model"))


def job(net: Net, folder: Path, **changes: Any) -> Job:
    from test_loop import job as plain

    method = FedAvg(steps=1, batch_size=4, lr=1e-3)
    return plain(net, folder, method, **{"audit": True, "rounds": 3, "eval_every": 0} | changes)


@pytest.fixture(scope="module", params=[False, True], ids=["unsigned", "signed"])
def run(request: pytest.FixtureRequest, net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(job(net, folder, signer=signer() if request.param else None, weights=Agreement(cap=0.4)))
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def problem(folder: Path) -> str:
    found = audit(folder).problems
    assert found
    return found[0]


def rewrite(folder: Path, lines: list[bytes], name: str = "audit.jsonl") -> None:
    (folder / name).write_bytes(b"".join(lines))


def lines_of(folder: Path, name: str = "audit.jsonl") -> list[bytes]:
    return (folder / name).read_bytes().splitlines(keepends=True)


def test_what_the_log_holds(run: Path) -> None:
    begin, *rounds, end = (json.loads(line) for line in lines_of(run))
    assert (begin["event"], begin["round"], begin["clients"], begin["weights"]["cap"]) == ("begin", 0, [*"abc"], 0.4)
    assert [line["round"] for line in rounds] == [1, 2, 3]
    recorded = read_records(run / "rounds.jsonl")
    for line, record in zip(rounds, recorded, strict=True):
        assert [each["share"] for each in line["counted"]] == [each["share"] for each in record["clients"]]
        assert all(len(each["sha256"]) == 64 and "examples" in each["why"] for each in line["counted"])
        assert line["left_out"] == []
    summary = json.loads((run / "summary.json").read_text())
    assert (end["weights"], end["hash"]) == (summary["sha256"], summary["audit"])
    assert set(end["files"]) == {"model.safetensors"}
    found = audit(run)
    assert (found.problems, found.lines, found.rounds, found.ended) == ([], 5, 3, True)
    assert found.keys == ([signer().public] if begin["key"] else [])


@pytest.mark.parametrize("line", range(5))
def test_a_flipped_byte_is_found_wherever_it_is(line: int, copy: Path) -> None:
    lines = lines_of(copy)
    whole = lines[line]
    for at in sorted({*range(0, len(whole), 37), len(whole) - 1}):
        for bit in (0, 5):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            rewrite(copy, [*lines[:line], bytes(flipped), *lines[line + 1 :]])
            assert f"audit.jsonl:{line + 1}:" in problem(copy), (at, bit, bytes(flipped[at : at + 1]))
    rewrite(copy, lines)
    assert audit(copy).problems == []


@pytest.mark.parametrize("line", range(4))
def test_a_removed_line_is_named(line: int, copy: Path) -> None:
    lines = lines_of(copy)
    rewrite(copy, [*lines[:line], *lines[line + 1 :]])
    want = f"audit.jsonl:{line + 1}: has line {line + 2}: the lines lack line {line + 1}: it was removed"
    assert want in problem(copy)


def test_lines_in_another_order_are_named(copy: Path) -> None:
    lines = lines_of(copy)
    rewrite(copy, [lines[0], lines[2], lines[1], *lines[3:]])
    assert "audit.jsonl:2: has line 3: the lines are out of order" in problem(copy)


@pytest.mark.parametrize("kept", range(5))
def test_a_tail_that_was_cut_is_named(kept: int, copy: Path) -> None:
    lines = lines_of(copy)
    rewrite(copy, lines[:kept])
    found = audit(copy).problems
    assert any("audit.jsonl: ends with line" in each and each.endswith("it was cut") for each in found)
    (copy / "summary.json").unlink()  # and the end of the run with it
    found = audit(copy).problems
    assert (found == []) == (kept == 4)
    assert all(each.endswith("of which there is a record: it was cut") for each in found)
    cut = lines[kept][: len(lines[kept]) // 2]
    rewrite(copy, [*lines[:kept], cut])
    assert f"audit.jsonl:{kept + 1}: was cut off" in problem(copy)


def test_a_line_written_anew_does_not_fit_the_one_after_it(copy: Path) -> None:
    """Its own hash is right: who changes a line can write that too, and a signature only with the key."""
    import hashlib

    from thinwire import records

    lines = lines_of(copy)
    entry = json.loads(lines[2])
    del entry["hash"]
    had = entry.pop("signature", None)
    entry["counted"][0]["share"] = 0.01
    entry["hash"] = hashlib.sha256(records.dumps(entry).encode()).hexdigest()
    forged = entry | ({"signature": had} if had else {})
    rewrite(copy, [*lines[:2], records.dumps(forged).encode() + b"\n", *lines[3:]])
    assert "audit.jsonl:4: does not follow from the line before, which was written anew" in problem(copy)
    for i in (3, 4):  # and all after it
        before, entry = entry["hash"], json.loads(lines[i])
        had = entry.pop("signature", None)
        del entry["hash"]
        entry["before"] = before
        entry["hash"] = hashlib.sha256(records.dumps(entry).encode()).hexdigest()
        lines[i] = records.dumps(entry | ({"signature": had} if had else {})).encode() + b"\n"
    rewrite(copy, [*lines[:2], records.dumps(forged).encode() + b"\n", *lines[3:]])
    if had:
        assert "audit.jsonl:3: is not signed with the key that its run began with" in problem(copy)
    else:  # then the summary alone knows better
        assert "summary.json: is not the one that was written with the log's last line" in problem(copy)


def test_another_key_is_no_signature(net: Net, tmp_path: Path) -> None:
    train(job(net, tmp_path, signer=Signer(signer().public, signer(ec.generate_private_key(ec.SECP384R1())).sign)))
    assert "audit.jsonl:1: is not signed with the key" in problem(tmp_path)


def changed(path: Path, at: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_records_states_and_weights_are_held_to_the_log(copy: Path, run: Path) -> None:
    records = lines_of(copy, "rounds.jsonl")
    rewrite(copy, [records[0], records[1].replace(b'"examples": 12', b'"examples": 13'), records[2]], "rounds.jsonl")
    assert "rounds.jsonl: the record of round 2 is not the one that was logged" in problem(copy)
    rewrite(copy, [records[0], records[2]], "rounds.jsonl")
    assert "rounds.jsonl: has no record of round 2, which the log has" in problem(copy)
    rewrite(copy, records, "rounds.jsonl")
    changed(copy / "state" / "round-000003" / "state.frame")
    assert problem(copy).endswith("the state of round 3 is not the one that was logged")
    shutil.copytree(run / "state", copy / "state", dirs_exist_ok=True)
    changed(copy / "model" / "model.safetensors", 1000)
    assert problem(copy).endswith("model.safetensors is not the file that was logged")
    shutil.copytree(run / "model", copy / "model", dirs_exist_ok=True)
    assert audit(copy).problems == []


def test_a_run_that_goes_on_adds_to_its_log(net: Net, tmp_path: Path) -> None:
    from test_loop import StopIn

    with pytest.raises(KeyboardInterrupt):
        train(job(net, tmp_path, watch=StopIn(3, 1)))
    before = lines_of(tmp_path)
    assert audit(tmp_path) == Audited([], 3, 2, False, json.loads(before[-1])["hash"], [])
    # the process ended between a checkpoint and its line, and in the middle of that
    rewrite(tmp_path, [*before[:-1], before[-1][:50]])
    train(job(net, tmp_path))
    events = [(line["event"], line["round"]) for line in read(tmp_path / "audit.jsonl")[0]]
    assert events == [("begin", 0), ("round", 1), ("round", 2), ("begin", 2), ("round", 3), ("end", 3)]
    assert (audit(tmp_path).problems, audit(tmp_path).rounds) == ([], 3)


def test_a_round_that_was_done_again_counts_once(net: Net, tmp_path: Path) -> None:
    """The newest checkpoint is damaged, so that the run goes on from the one before."""
    from test_loop import StopIn

    with pytest.raises(KeyboardInterrupt):
        train(job(net, tmp_path, watch=StopIn(3, 1)))
    newest = tmp_path / "state" / "round-000002" / "state.frame"
    newest.write_bytes(newest.read_bytes()[:-3])
    train(job(net, tmp_path))
    events = [(line["event"], line["round"]) for line in read(tmp_path / "audit.jsonl")[0]]
    assert events[3:] == [("begin", 1), ("round", 2), ("round", 3), ("end", 3)]
    assert audit(tmp_path).problems == []


def test_a_log_that_was_changed_is_not_gone_on_with(net: Net, tmp_path: Path) -> None:
    from test_loop import StopIn

    with pytest.raises(KeyboardInterrupt):
        train(job(net, tmp_path, watch=StopIn(2, 1)))
    changed(tmp_path / "audit.jsonl")
    with pytest.raises(Damaged, match=r"audit\.jsonl:1: was changed"):
        train(job(net, tmp_path))
    assert checkpoint.rounds(tmp_path / "state") == [0, 1]


def test_a_log_that_began_late_says_since_when(net: Net, tmp_path: Path) -> None:
    """Of a run that an older thinwire began, or whose log somebody has taken away."""
    from test_loop import StopIn

    with pytest.raises(KeyboardInterrupt):
        train(job(net, tmp_path, watch=StopIn(3, 1)))
    (tmp_path / "audit.jsonl").unlink()
    train(job(net, tmp_path))
    found = audit(tmp_path)
    assert (found.rounds, len(found.problems)) == (1, 1)
    assert found.problems[0].endswith("audit.jsonl: begins after round 2: what came before is in no log")


def test_a_run_without_a_log_has_none(net: Net, tmp_path: Path) -> None:
    train(job(net, tmp_path, audit=False))
    assert not (tmp_path / "audit.jsonl").exists()
    assert "sha256" not in read_records(tmp_path / "rounds.jsonl")[0]["clients"][0]
    assert "audit" not in json.loads((tmp_path / "summary.json").read_text())
