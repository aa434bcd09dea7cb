"""SIGTERM ends a command at a whole round, with an exit status that a supervisor can act on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_cli import environment, thinwire
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire.commands.terminal import leaving

ROUNDS = 15


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file over a tiny model and two clients."""
    place = tmp_path_factory.mktemp("place")
    tiny_folder(place / "model")
    rows = write_jsonl(place / "rows.jsonl", tiny_rows(16))
    (place / "run.toml").write_text(
        f'name = "termed"\nrounds = {ROUNDS}\nthreads = 1\n[model]\npath = "{place / "model"}"\n'
        f'[data]\npath = "{rows}"\nclients = 2\nmax_length = 128\n[eval]\nevery = 0\n'
        '[method]\nname = "fedkseed"\nlr = 1e-3\nseeds = 16\nsteps = 1\nbatch_size = 2\n'
    )
    return place / "run.toml"


@contextmanager
def started(*words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, killed at the end if it is still there."""
    command = [sys.executable, "-u", "-m", "thinwire.cli", *map(str, words)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read what the process prints up to a text."""
    assert process.stdout is not None
    while text not in (line := process.stdout.readline()):
        assert line, "the process ended early"


def test_a_run_ends_after_the_round_that_it_is_at_and_goes_on_from_there(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started("run", file, "--out", out, "--go-on") as process:
        wait_for(process, "round 2/")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    rounds = [json.loads(line)["round"] for line in (out / "rounds.jsonl").read_text().splitlines()]
    last = rounds[-1]
    assert 2 <= last < ROUNDS
    assert (out / "state" / f"round-{last:06d}").is_dir()
    assert err.startswith(
        f"thinwire: asked to end, after round {last} of {ROUNDS}; go on from there with: thinwire run"
    )
    assert thinwire("status", out).code == 75
    # the very command that a supervisor starts again
    assert thinwire("run", file, "--out", out, "--go-on").code == 0
    assert thinwire("run", file, "--out", out, "--go-on").code == 0
    whole = tmp_path / "whole"
    assert thinwire("run", file, "--out", whole).code == 0
    ends = [json.loads((place / "summary.json").read_text())["sha256"] for place in (out, whole)]
    assert ends[0] == ends[1]
    assert thinwire("status", out).code == 0


def test_a_second_signal_does_not_wait_for_the_round() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with leaving() as leave:
        assert not leave
        signal.raise_signal(signal.SIGTERM)
        assert leave
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_client_that_waits_for_its_server_ends_well(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")
    from thinwire.federation import keys
    from thinwire.federation.processes import free_port

    keys.make_site("north", tmp_path)
    keys.make_server([], tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(3))
    words: list[str | Path] = ["client", "--server", f"127.0.0.1:{free_port()}", "--data", rows, "--model", tmp_path]
    words += ["--key", tmp_path / "north.key", "--ca", tmp_path / "ca.crt", "--folder", tmp_path / "site"]
    with started(*words) as process:
        wait_for(process, "waiting for it")
        while not (tmp_path / "site" / "site.json").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "ended, as it was asked to" in out
