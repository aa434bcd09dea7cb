"""Keys: whose they are, who may read them, and what is refused."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from test_cli import refused, thinwire

from thinwire.config import ConfigError
from thinwire.federation import keys
from thinwire.federation.flower import nodes_of
from thinwire.federation.keys import public_keys
from thinwire.runtime.audit import signed


def test_a_site_s_private_half_is_its_owner_s_alone_and_is_never_printed(tmp_path: Path) -> None:
    result = thinwire("keys", "site", "north", "--out", tmp_path)
    assert result.code == 0
    public = (tmp_path / "north.pub").read_text().strip()
    assert result.out.strip() == public
    assert public.startswith("ecdsa-sha2-nistp384 ")
    assert (tmp_path / "north.key").stat().st_mode & 0o777 == 0o600
    private = (tmp_path / "north.key").read_text()
    assert private.splitlines()[1] not in result.out + result.err
    assert "there is a key already" in refused("keys", "site", "north", "--out", tmp_path)


def test_the_server_registers_public_halves_by_name(tmp_path: Path) -> None:
    north, south = (keys.make_site(name, tmp_path / name) for name in ("north", "south"))
    home = tmp_path / "keys"
    assert thinwire("keys", "register", "north", north, "--out", home).code == 0
    assert thinwire("keys", "register", "south", south.read_text().strip(), "--out", home).code == 0
    assert thinwire("keys", "register", "south", south, "--out", home).code == 0  # once more is no harm
    assert "already that of north" in refused("keys", "register", "west", north, "--out", home)
    assert "not a public key" in refused("keys", "register", "west", tmp_path / "north" / "north.key", "--out", home)
    assert "neither a public key nor a file" in refused("keys", "register", "west", "nothing", "--out", home)
    assert "is not a site's name" in refused("keys", "register", "../x", north, "--out", home)
    assert sorted(public_keys(home)) == ["north", "south"]


def test_a_site_is_registered_with_its_rows(tmp_path: Path) -> None:
    north, south = (keys.make_site(name, tmp_path / "at") for name in ("north.1", "south"))
    home = tmp_path / "keys"
    assert thinwire("keys", "register", "north.1", north, "--out", home, "--rows", "12").code == 0
    assert thinwire("keys", "register", "south", south, "--out", home).code == 0
    assert keys.caps_of(home, ("south", "north.1", "west")) == {1: 12}
    assert thinwire("keys", "register", "north.1", north, "--out", home).code == 0  # without a number it stays
    assert keys.caps_of(home, ("north.1",)) == {0: 12}
    assert thinwire("keys", "register", "north.1", north, "--out", home, "--rows", "0").code == 2
    assert sorted(public_keys(home)) == ["north.1", "south"]
    (home / "sites" / "south.rows").write_text("many")
    with pytest.raises(ConfigError, match="holds no number"):
        keys.caps_of(home, ("south",))


def test_another_key_does_not_take_a_name_over(tmp_path: Path) -> None:
    keys.register("north", keys.make_site("north", tmp_path / "a"), tmp_path)
    with pytest.raises(ConfigError, match="north has another key already"):
        keys.register("north", keys.make_site("north", tmp_path / "b"), tmp_path)


def test_the_certificate_is_the_authority_s_and_names_the_hosts(tmp_path: Path) -> None:
    assert thinwire("keys", "server", "--host", "hub.example", "--host", "10.0.0.7", "--out", tmp_path).code == 0
    for secret in ("ca.key", "server.key"):
        assert (tmp_path / secret).stat().st_mode & 0o777 == 0o600
    first = (tmp_path / "ca.crt").read_bytes()
    decoded = ssl._ssl._test_decode_cert(str(tmp_path / "server.crt"))  # type: ignore[attr-defined]
    names = {value for _, value in decoded["subjectAltName"]}
    assert {"hub.example", "10.0.0.7", "localhost", "127.0.0.1"} <= names
    assert thinwire("keys", "server", "--host", "other.example", "--out", tmp_path).code == 0
    assert (tmp_path / "ca.crt").read_bytes() == first  # sites keep the one that they have
    assert "neither a host name" in refused("keys", "server", "--host", "a b", "--out", tmp_path)


def test_a_site_is_its_key_whatever_number_the_engine_gives_it(tmp_path: Path) -> None:
    from types import SimpleNamespace

    for name in ("north", "south", "west"):
        keys.register(name, keys.make_site(name, tmp_path), tmp_path)
    known = public_keys(tmp_path)

    class Nodes:
        def get_nodes(self) -> list[SimpleNamespace]:
            return [
                SimpleNamespace(node_id=9, public_key=known["west"], name="north"),
                SimpleNamespace(node_id=4, public_key=known["north"], name="west"),
                SimpleNamespace(node_id=5, public_key=b"a stranger's", name="south"),
            ]

    assert nodes_of(Nodes(), ("north", "south", "west"), known) == {0: 4, 2: 9}


def test_a_log_is_signed_with_the_key_of_the_servers_certificate(tmp_path: Path) -> None:
    keys.make_server(["localhost"], tmp_path)
    signer = keys.signer_of(tmp_path)
    assert signer.public == keys.certified(tmp_path / "server.crt") != keys.certified(tmp_path / "ca.crt")
    signature = signer.sign("a line")
    assert signed(signer.public, "a line", signature)
    assert not signed(signer.public, "another", signature)
    assert not signed(keys.certified(tmp_path / "ca.crt"), "a line", signature)
    assert not signed(signer.public, "a line", "?")
    with pytest.raises(ConfigError, match="is no certificate"):
        keys.certified(tmp_path / "server.key")
