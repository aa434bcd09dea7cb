"""`thinwire doctor`: each thing that may go wrong is a warning, before the others, and the exit status says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import SOURCE, refused, thinwire
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire.config import Run
from thinwire.estimate import doctor
from thinwire.estimate.machine import Machine


class Small(Machine):
    """Two threads of a control group of one and a half, 1 MB free; of an old processor."""

    def memory(self) -> int | None:
        return 10**6

    def group_memory(self) -> tuple[int, int] | None:
        return None

    def group_threads(self) -> float | None:
        return 1.5

    def threads(self) -> int:
        return 2

    def load(self) -> float | None:
        return 9.0

    def flags(self) -> set[str]:
        return {"sse2", "avx512f"}

    def gpus(self) -> int:
        return 1


def warnings(found: Any) -> str:
    return "\n".join(finding.text for finding in found if finding.warns)


def costs(client: int, server: int = 0) -> Any:
    sides = (SimpleNamespace(total=total) for total in (client, server))
    return SimpleNamespace(client=next(sides), server=next(sides), parameters=10**6, trained=10**6)


def run_of(**fields: Any) -> Run:
    tree = {
        "name": "x",
        "model": {"path": "m"},
        "data": {"path": "x.jsonl", "clients": 2},
        "method": {"name": "fedavg"},
    }
    return Run.model_validate(tree | fields)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = warnings(doctor.threads(Small(env={})))
    assert "torch sees 2, and the control group gives the time of 1.5" in found
    assert "9 threads want to run on 1.5" in found
    assert "OMP_NUM_THREADS is 4, and there are 1.5" in warnings(doctor.threads(Small(env={"OMP_NUM_THREADS": "4"})))
    assert "threads of the run file is 3" in warnings(doctor.threads(Small(env={}), run_of(threads=3)))
    assert "is 1" not in warnings(doctor.threads(Small(env={"OMP_NUM_THREADS": "1"})))


def test_memory() -> None:
    machine = Small(env={})
    assert "a client takes about 2.0 MB" in warnings(doctor.memory(machine, costs(2 * 10**6)))
    assert "it does not fit" in warnings(doctor.memory(machine, costs(2 * 10**6)))
    assert "both in one process may not fit" in warnings(doctor.memory(machine, costs(600_000, 600_000)))
    assert warnings(doctor.memory(machine, costs(400_000, 500_000))) == ""
    assert warnings(doctor.memory(machine)) == ""


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**7))
    assert "10.0 MB free for runs" in warnings(doctor.disk(tmp_path / "not" / "yet"))
    assert "about 16.0 MB may be written" in warnings(doctor.disk(tmp_path, costs(1), run_of()))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**8))
    assert warnings(doctor.disk(tmp_path, costs(1), run_of())) == ""
    monkeypatch.setattr("os.access", lambda path, how: False)
    assert "cannot be written to" in warnings(doctor.disk(tmp_path, costs(1), run_of()))


def test_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = warnings(doctor.processor(Small(env={"ATEN_CPU_CAPABILITY": "default"})))
    assert "ATEN_CPU_CAPABILITY is default" in found
    assert "neither AVX2 nor NEON" in found
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert "it has AVX-512, and torch uses AVX2" in warnings(doctor.processor(Small(env={}), loaded=True))


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a GPU is there" in warnings(doctor.versions(Small(env={})))
    wanted = ["torch>=99", "no-such-package-at-all>=1", "matplotlib>=99; extra == 'plot'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    found = warnings(doctor.versions(Machine(env={})))
    assert "is not >=99" in found
    assert "no-such-package-at-all is not installed" in found
    assert "matplotlib" not in found


def test_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").write_text("")
    assert "from the future" not in warnings(doctor.clock([tmp_path / "rows"]))
    os.utime(tmp_path / "rows", (time.time() + 3600,) * 2)
    assert "rows is 3600 s from the future" in warnings(doctor.clock([tmp_path / "rows"])).replace("3599", "3600")
    true = time.time
    monkeypatch.setattr("time.time", lambda: true() - 30 * 365 * 86400)
    found = warnings(doctor.clock([]))
    assert "may be refused" in found
    assert "doctor.py is" in found
    began = time.monotonic()
    monkeypatch.setattr("time.time", lambda: true() + 2 * (time.monotonic() - began))
    assert "it is being set" in warnings(doctor.clock([]))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(12))
    (tmp_path / "run.toml").write_text(
        f'name = "x"\nrounds = 1\n[model]\npath = "{tmp_path}/model"\n'
        f'[data]\npath = "{tmp_path}/rows.jsonl"\nclients = 2\n[method]\nname = "fedavg"\n'
    )
    monkeypatch.setattr(Machine, "load", lambda self: 0.0)
    monkeypatch.setattr(Machine, "memory", lambda self: 10**12)
    monkeypatch.setattr(Machine, "group_memory", lambda self: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = thinwire("doctor", tmp_path / "run.toml", "--out", tmp_path / "out")
    lines = found.out.splitlines()
    assert {line.split()[1] for line in lines} == {
        "versions:", "threads:", "memory:", "disk:", "processor:", "clock:"
    }  # fmt: skip
    assert found.code == any(line.startswith("warning") for line in lines)
    assert any("a client takes about" in line for line in lines)
    monkeypatch.setattr(Machine, "memory", lambda self: 10**6)
    found = thinwire("doctor", tmp_path / "run.toml", "--out", tmp_path / "out")
    assert found.code == 1
    starts = [line.split()[0] for line in found.out.splitlines()]
    assert starts == sorted(starts, reverse=True)  # warnings before what is ok
    assert any(line.startswith("warning memory: a client takes") for line in found.out.splitlines())
    assert "nothing" in refused("doctor", tmp_path / "run.toml", "nothing=1")
    assert "none.toml" in refused("doctor", tmp_path / "none.toml")
    assert "model.path: no config at" in refused("doctor", tmp_path / "run.toml", f"model.path={tmp_path}/none")


def test_without_a_run_file_torch_is_not_loaded() -> None:
    code = (
        "import sys\nfrom thinwire.estimate.doctor import examine\nfrom thinwire.estimate.machine import Machine\n"
        "found = examine(Machine())\nassert len(found) >= 6\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}, check=False)
    assert done.returncode == 0
