"""The federation's commands: what they refuse, in one line that names it."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused, thinwire
from tiny import CHOICES, tiny_encoder, tiny_folder, tiny_rows, write_jsonl

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from thinwire import assemble
from thinwire.federation import keys, local, proxy, reach, site_processes, superlink
from thinwire.runtime.folder import locked

RUN = """
[data]
path = "the sites' own"
[method]
name = "fedkseed"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A run file that names two sites."""
    path = tmp_path / "run.toml"
    path.write_text(RUN + '[federation]\nsites = ["north", "south"]\n')
    return path


@pytest.fixture(autouse=True)
def _mask() -> Iterator[None]:
    """The commands change what this process's files may be read by."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def readable(folder: Path) -> list[str]:
    """What others may read, or enter, below a folder."""
    found = [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]
    return sorted(str(path.relative_to(folder.parent)) for path in found)


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package were not installed."""
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_without_flower_one_line_names_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without("flwr", monkeypatch)
    line = "Flower is not installed; it comes with: pip install 'thinwire[flower]'"
    assert refused("server", file) == line
    assert refused("local-federation", file) == line
    assert refused("keys", "site", "north", "--out", file.parent) == line


def test_without_flare_one_line_names_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without("nvflare", monkeypatch)
    line = "NVIDIA FLARE is not installed; it comes with: pip install 'thinwire[nvflare]'"
    assert refused("local-federation", file, "--engine", "nvflare") == line


def test_an_engine_that_is_none_is_refused(file: Path) -> None:
    result = thinwire("local-federation", file, "--engine", "flare")
    assert result.code == 2
    assert "'flare' is not one of 'flower', 'nvflare'" in " ".join(result.err.replace("│", " ").split())


def test_a_server_needs_sites_keys_and_a_proxy(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, home = tmp_path / "out", tmp_path / "keys"
    monkeypatch.setattr(proxy, "command", lambda place: ["nginx"])
    bare = tmp_path / "bare.toml"
    bare.write_text(RUN)
    assert refused("server", bare, "--out", out).startswith("federation.sites: missing")
    assert "a site's key is registered by" in refused("server", file, "--keys", home, "--out", out)
    for name in ("north", "south"):
        keys.register(name, keys.make_site(name, tmp_path), home)
    assert "holds no certificate" in refused("server", file, "--keys", home, "--out", out)
    keys.make_server([], home)
    monkeypatch.setattr(proxy, "command", lambda place: None)
    line = refused("server", file, "--keys", home, "--out", out)
    assert line.startswith("--listen: neither nginx nor caddy is installed here")
    assert refused("server", file, "--listen", "8443").startswith("--listen: '8443' is not HOST:PORT")
    assert "one of them" in refused("server", file, "--own-proxy", "--expose-control-api")
    assert not out.exists()


def test_a_client_checks_its_files_before_it_starts_anything(tmp_path: Path) -> None:
    keys.make_site("north", tmp_path)
    keys.make_server([], tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(3))
    policy = tmp_path / "policy.toml"

    def line(**changes: Path) -> str:
        options = {"data": rows, "key": tmp_path / "north.key", "ca": tmp_path / "ca.crt", **changes}
        options["folder"] = tmp_path / "site"
        return refused("client", "--server", "127.0.0.1:1", *(x for k, v in options.items() for x in (f"--{k}", v)))

    assert "the file holds no row" in line(data=write_jsonl(tmp_path / "none.jsonl", []))
    assert line(data=tmp_path / "gone") == f"{tmp_path / 'gone'}: cannot be read (No such file or directory)"
    (tmp_path / "table.csv").write_text("instruction,output\nx,y\n")
    for option in ("data", "heldout"):
        kind = f"--{option}: {tmp_path / 'table.csv'} is a .csv file by its name; a site's rows are a .jsonl file"
        assert line(**{option: tmp_path / "table.csv"}) == kind
    (tmp_path / "table.txt").write_bytes((tmp_path / "table.csv").read_bytes())
    assert "table.txt: begins as a table or plain text does" in line(data=tmp_path / "table.txt")
    assert line(ca=tmp_path / "no.crt").startswith("--ca: ")
    assert line(key=tmp_path / "no.key").startswith("--key: ")
    policy.write_text("method = []")
    assert line(policy=policy).startswith(f"{policy}: method: Extra inputs")
    policy.write_text('methods = ["fedkseeed"]')
    assert "'fedkseeed' is not a method" in line(policy=policy)
    (tmp_path / "north.key").chmod(0o644)
    assert "can be read by others" in line()
    assert not (tmp_path / "site").exists()


def test_what_a_local_federation_writes_is_its_owner_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(12))
    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\npath = "{tmp_path / "model"}"\n[data]\npath = "{rows}"\nclients = 2\n[method]\nname = "fedkseed"\n'
    )

    def start(self: local.Local) -> None:
        self.server.prepare(tmp_path / "out", local_run(tmp_path / "out"), {})
        for one in self.sites.values():
            one.children.start("worker", ["sh", "-c", "echo x > " + str(one.folder / "made-by-a-child")]).wait(60)
        raise superlink.Ended("as far as this test goes")

    monkeypatch.setattr(local.Local, "start", start)
    monkeypatch.setattr(superlink.ServerSide, "stop", lambda self: None)
    (tmp_path / "out").mkdir(mode=0o755)
    result = thinwire("local-federation", file, "--out", tmp_path / "out")
    assert (result.code, "as far as this test goes" in result.err) == (1, True), result
    assert len(list((tmp_path / "out").rglob("data.jsonl"))) == len(list((tmp_path / "out").rglob("made-by-*"))) == 2
    assert readable(tmp_path / "out") == ["out"]  # the user's own folder; what it holds is closed
    with locked(tmp_path / "out"):
        line = refused("local-federation", file, "--out", tmp_path / "out", "--resume")
    assert line == f"{tmp_path / 'out'}: another process (pid {os.getpid()}) is at work here"


def test_a_fresh_classifier_s_classes_are_found_as_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_encoder(tmp_path / "encoder")
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(24, closed=True))
    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\npath = "{tmp_path / "encoder"}"\n[data]\npath = "{rows}"\nclients = 2\n[method]\nname = "fedavg"\n'
    )

    def start(self: local.Local) -> None:
        raise superlink.Ended("as far as this test goes")

    monkeypatch.setattr(local.Local, "start", start)
    monkeypatch.setattr(superlink.ServerSide, "stop", lambda self: None)
    for again in ([], ["--resume"]):
        result = thinwire("local-federation", file, "--out", tmp_path / "out", *again)
        assert (result.code, "as far as this test goes" in result.err) == (1, True), result
    run = local_run(tmp_path / "out")
    assert run.data.choices == tuple(sorted(CHOICES))
    server = assemble.begin(run, assemble.Rows({}, {}))  # its process holds nobody's rows
    assert server.net.model.config.num_labels == 2


def local_run(folder: Path) -> Any:
    from thinwire import config

    return config.load(folder / "run.toml")


def test_what_a_client_writes_is_its_owner_s_and_a_folder_is_one_client_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.make_site("north", tmp_path)
    keys.make_server([], tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(3))
    place = tmp_path / "site"
    (place / "runs").mkdir(parents=True)
    place.chmod(0o755)  # as an older thinwire made it
    options = ["--server", "127.0.0.1:1", "--data", rows, "--key", tmp_path / "north.key", "--ca", tmp_path / "ca.crt"]
    monkeypatch.setattr(reach, "greet", lambda server, ca: None)

    def start(self: site_processes.SiteSide) -> None:
        (self.folder / "logs").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(site_processes.SiteSide, "start", start)
    line = thinwire("client", *options, "--folder", place, "--allow-model")
    assert "north: stopped; it takes part again with the same command" in line.err
    assert place.stat().st_mode & 0o777 == 0o700
    assert [path for path in readable(place) if path != "site/runs"] == []
    (place / "audit.jsonl").write_text('{"before": "x"}\n')
    line = thinwire("client", *options, "--folder", place, "--allow-model")
    assert "audit.jsonl:1: does not follow from the line before" in line.err
    with locked(place):
        line = refused("client", *options, "--folder", place, "--allow-model")
    assert line == f"{place}: another process (pid {os.getpid()}) is at work here"
