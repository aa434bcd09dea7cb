"""What is read of a machine, from files as Linux has them, in both versions of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from thinwire.estimate.machine import Machine


def made(root: Path, **files: str) -> Machine:
    """A machine with these files; __ stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root, {})


def test_memory(tmp_path: Path) -> None:
    machine = made(tmp_path, proc__meminfo="MemTotal:  100 kB\nMemAvailable:    40 kB\n")
    assert machine.memory() == 40 * 1024
    assert Machine(tmp_path / "none", {}).memory() is None


def test_the_tightest_group_of_version_2(tmp_path: Path) -> None:
    top = "sys__fs__cgroup__"
    machine = made(
        tmp_path,
        proc__self__cgroup="0::/a/b\n",
        **{
            f"{top}a__memory_dot_max": "1000\n",
            f"{top}a__memory_dot_current": "700\n",
            f"{top}a__memory_dot_stat": "anon 5\ninactive_file 100\n",
            f"{top}a__b__memory_dot_max": "max\n",
            f"{top}a__b__memory_dot_current": "600\n",
            f"{top}a__b__cpu_dot_max": "150000 100000\n",
            f"{top}a__cpu_dot_max": "max 100000\n",
        },
    )
    assert machine.group_memory() == (1000, 600)
    assert machine.group_threads() == 1.5


def test_version_1(tmp_path: Path) -> None:
    top = "sys__fs__cgroup__"
    files = {
        f"{top}memory__x__memory_dot_limit_in_bytes": "5000\n",
        f"{top}memory__x__memory_dot_usage_in_bytes": "1000\n",
        f"{top}memory__memory_dot_limit_in_bytes": "9223372036854771712\n",
        f"{top}cpu__cpu_dot_cfs_quota_us": "50000\n",
        f"{top}cpu__cpu_dot_cfs_period_us": "100000\n",
    }
    machine = made(tmp_path, proc__self__cgroup="4:memory:/x\n3:cpu,cpuacct:/\n0::/\n", **files)
    assert machine.group_memory() == (5000, 1000)
    assert machine.group_threads() == 0.5
    (tmp_path / "sys/fs/cgroup/memory/x/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert machine.group_memory() is machine.group_threads() is None


def test_the_processor(tmp_path: Path) -> None:
    one = "physical id : 0\ncore id : {}\nflags : fpu avx2 amx_tile\n\n"
    machine = made(tmp_path, proc__cpuinfo="".join(map(one.format, (0, 0, 1))), proc__loadavg="3.50 1 1 2/3 4\n")
    assert machine.cores() == 2
    assert machine.flags() == {"fpu", "avx2", "amx_tile"}
    assert machine.load() == 3.5
    assert machine.gpus() == 0
    made(tmp_path, dev__nvidia0="", dev__nvidiactl="")
    assert machine.gpus() == 1


@pytest.mark.parametrize("groups", ["", "0::/gone\n"])
def test_a_machine_that_states_nothing(groups: str, tmp_path: Path) -> None:
    machine = made(tmp_path, proc__meminfo="", proc__cpuinfo="", proc__self__cgroup=groups)
    assert (machine.memory(), machine.group_memory(), machine.group_threads()) == (None, None, None)
    assert (machine.cores(), machine.flags(), machine.load()) == (None, set(), None)
    assert machine.threads() >= 1
