"""Sites that sign their keys of secure sums: a server that hands out keys of its own learns nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")
pytest.importorskip("cryptography", reason="comes with: pip install 'thinwire[secure]'")
pytest.importorskip("Crypto", reason="comes with: pip install 'thinwire[secure]'")

from grid import federate
from silos import SITES, Silos, in_process, state_of
from typer.testing import CliRunner

from thinwire import wire
from thinwire.cli import app
from thinwire.errors import ConfigError
from thinwire.federation import keys
from thinwire.federation.envelope import pack, unpack
from thinwire.federation.vouching import Vouching
from thinwire.privacy.masks import Pair
from thinwire.runtime import course
from thinwire.runtime.payloads import Keys
from thinwire.runtime.vouch import vouched
from thinwire.wire import Frame, Illegal

METHOD: dict[str, Any] = {"name": "fedavg", "steps": 1, "lr": 1e-3, "weighting": "uniform"}
ASKED = {"secure": {}}


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Each site's key, and the public ones that the others have given it."""
    folder = tmp_path / "keys"
    for name in SITES:
        keys.make_site(name, folder / name)
    for name in SITES:
        (folder / name / "peers").mkdir()
        for other in SITES:
            if other != name:
                shutil.copy(folder / other / f"{other}.pub", folder / name / "peers")
    return folder


def test_a_sum_of_sites_that_vouch_is_the_sum(
    silos: Silos, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = silos.run(METHOD, privacy=ASKED)
    job, _, _ = federate(silos, run, tmp_path / "there", keys=pairs)
    course.train(job)
    in_process(silos, run, tmp_path / "here", monkeypatch)
    assert state_of(tmp_path / "there") == state_of(tmp_path / "here")


def replaced(message: Any, change: Any) -> Any:
    """A reply of keys as a server would have liked it."""
    piece, about = unpack(message.content)
    if about.get("error") or (header := Frame(piece).header()).kind != "Keys":
        return message
    found = change(wire.decode(Keys, Frame(piece)))
    frame = bytes(wire.encode(found, run=header.run, round=header.round, client=header.client))
    message.content = pack(frame, **{**about, "total": len(frame)})
    return message


CHANGES: dict[str, Any] = {
    "keys of its own": lambda k: Keys(k.seal, Pair(bytes(16)).public, k.own, k.signature),
    "no signature": lambda k: Keys(k.seal, k.mask, k.own),
    "a signature of nothing": lambda k: Keys(k.seal, k.mask, k.own, b"\x01" * 96),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_server_that_stands_between_two_sites_gets_no_reply_of_theirs(
    change: str, silos: Silos, pairs: Path, tmp_path: Path
) -> None:
    job, grid, _ = federate(silos, silos.run(METHOD, privacy=ASKED), tmp_path / "there", keys=pairs)
    errors, kinds = list[str](), list[str]()

    def between(client: int, reply: Any) -> Any:
        piece, about = unpack(reply.content)
        errors.append(str(about.get("error") or ""))
        kinds.append("" if about.get("error") else Frame(piece).header().kind)
        return replaced(reply, CHANGES[change]) if client == 1 else reply

    grid.tamper = between
    with pytest.raises(RuntimeError, match="round 1"):
        course.train(job)
    assert "Masked" not in kinds
    assert errors.count("Illegal: the keys that came as south's are not signed by it") == 2


def test_a_site_that_was_not_given_a_key_masks_nothing_with_it(silos: Silos, pairs: Path, tmp_path: Path) -> None:
    (pairs / "north" / "peers" / "west.pub").unlink()
    job, grid, _ = federate(silos, silos.run(METHOD, privacy=ASKED), tmp_path / "there", keys=pairs)
    errors: list[str] = []
    grid.tamper = lambda client, reply: errors.append(str(unpack(reply.content)[1].get("error"))) or reply
    with pytest.raises(RuntimeError, match="round 1"):
        course.train(job)
    assert "Illegal: this site has no public key of west's, and masks no reply with it" in errors


@pytest.mark.parametrize("name", ["run", "round", "attempt", "client", "seal", "mask"])
def test_a_signature_is_of_one_attempt_at_one_sum(name: str, pairs: Path) -> None:
    south = Vouching(pairs / "south" / "south.key", pairs / "south" / "peers", SITES)
    north = Vouching(pairs / "north" / "north.key", pairs / "north" / "peers", SITES)
    about: dict[str, Any] = {"run": 5, "round": 2, "attempt": b"a" * 16, "client": 1, "seal": b"s", "mask": b"m"}
    signature = south.sign(vouched(**about))
    north.check(1, vouched(**about), signature)
    other = about | {name: about[name] + 1 if isinstance(about[name], int) else b"other"}
    with pytest.raises(Illegal, match="are not signed by it"):
        north.check(1, vouched(**other), signature)
    with pytest.raises(Illegal, match="are not signed by it"):
        north.check(2, vouched(**about), signature)


def test_a_folder_without_keys_and_a_key_that_is_none_are_a_line(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^--peers: .*empty holds no site's public key, NAME\.pub$"):
        Vouching(pairs / "north" / "north.key", tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"north\.pub: not a site's private key"):
        Vouching(pairs / "north" / "north.pub", pairs / "north" / "peers")
    with pytest.raises(ConfigError, match=r"^sites: two clients of the run have the same name"):
        Vouching(pairs / "north" / "north.key", pairs / "north" / "peers", ("north", "south", "south"))
    (pairs / "north" / "peers" / "west.pub").unlink()
    (pairs / "north" / "peers" / "west.pub").mkdir()
    with pytest.raises(ConfigError, match=r"west\.pub: cannot be read \(Is a directory\)$"):
        Vouching(pairs / "north" / "north.key", pairs / "north" / "peers")
    (pairs / "north" / "peers" / "west.pub").rmdir()
    (pairs / "north" / "peers" / "west.pub").write_text("no key")
    with pytest.raises(ConfigError, match=r"west\.pub: not a public key$"):
        Vouching(pairs / "north" / "north.key", pairs / "north" / "peers")


def test_the_command_says_so_before_anything_runs(silos: Silos, pairs: Path, tmp_path: Path) -> None:
    keys.make_server(["127.0.0.1"], tmp_path / "hub")
    words = ["client", "--server", "127.0.0.1:9", "--data", str(silos.folder / "data" / "north.jsonl"), "--allow-model"]
    words += ["--key", str(pairs / "north" / "north.key"), "--ca", str(tmp_path / "hub" / "ca.crt")]
    found = CliRunner().invoke(app, [*words, "--peers", str(tmp_path), "--folder", str(tmp_path / "site")])
    assert found.exit_code == 2
    assert f"thinwire: --peers: {tmp_path} holds no site's public key, NAME.pub" in found.output
