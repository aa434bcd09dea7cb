"""What this machine has for a run: memory, processors, disks, what of them a container may use. Reads files only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

UNLIMITED = 1 << 60  # bytes beyond which a limit of version 1 is none


@dataclass(frozen=True)
class Machine:
    """A Linux machine by its files below `root`; what it does not have is None, or empty. `env`: the environment."""

    root: Path = Path("/")
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def memory(self) -> int | None:
        """Bytes that can be taken now, as the system has it."""
        found = re.search(r"^MemAvailable:\s+(\d+) kB", self._text("proc/meminfo"), re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def group_memory(self) -> tuple[int, int] | None:
        """Of the tightest control group that this process is in: its limit, and what of it is taken; bytes."""
        tight: tuple[int, int] | None = None
        for folder, limit, taken in self._groups("memory", ("memory.max", "memory.limit_in_bytes"),
                                                 ("memory.current", "memory.usage_in_bytes")):  # fmt: skip
            most = self._number(folder / limit)
            if most is None or most >= UNLIMITED:
                continue
            now = (self._number(folder / taken) or 0) - self._files(folder)
            if tight is None or most - now < tight[0] - tight[1]:
                tight = most, max(now, 0)
        return tight

    def group_threads(self) -> float | None:
        """How many processors' time the control group has."""
        found: list[float] = []
        for folder, quota, period in self._groups("cpu", ("cpu.max", "cpu.cfs_quota_us"), ("", "cpu.cfs_period_us")):
            words = self._text(folder / quota).split()
            if not period and len(words) == 2 and words[0].isdigit():
                found.append(int(words[0]) / int(words[1]))
            elif period and words and int(words[0]) > 0 and (whole := self._number(folder / period)):
                found.append(int(words[0]) / whole)
        return min(found, default=None)

    def threads(self) -> int:
        """Hardware threads that this process may use."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def cores(self) -> int | None:
        """Cores of all processors: hardware threads of one share what multiplies."""
        text = self._text("proc/cpuinfo")
        sockets, cores = (re.findall(rf"^{name}\s*: (\d+)", text, re.MULTILINE) for name in ("physical id", "core id"))
        return len({*zip(sockets, cores, strict=False)}) or None

    def flags(self) -> set[str]:
        """What the first processor can do."""
        found = re.search(r"^(?:flags|Features)\s*: (.*)$", self._text("proc/cpuinfo"), re.MULTILINE)
        return {*found[1].split()} if found else set()

    def load(self) -> float | None:
        """How many threads wanted to run, on the mean of the last minute."""
        words = self._text("proc/loadavg").split()
        return float(words[0]) if words else None

    def gpus(self) -> int:
        """How many of NVIDIA's there are."""
        return len([*(self.root / "dev").glob("nvidia[0-9]*")])

    def _groups(self, kind: str, limits: tuple[str, str], others: tuple[str, str]) -> list[tuple[Path, str, str]]:
        """The folders of the process's control groups up to the top, with the names of two files in each."""
        found = []
        for line in self._text("proc/self/cgroup").splitlines():
            number, kinds, path = line.split(":", 2)
            new = number == "0"
            if not new and kind not in kinds.split(","):
                continue
            top = self.root / "sys/fs/cgroup" / ("" if new else kind)
            below = top / path.lstrip("/")
            for folder in (below, *below.parents):
                if (folder / limits[not new]).exists():
                    found.append((folder, limits[not new], others[not new]))
                if folder == top:
                    break
        return found

    def _files(self, folder: Path) -> int:
        """Bytes of files' contents in a control group's memory, which is given back when it is wanted."""
        names = r"^(?:total_)?(?:inactive_file) (\d+)$"
        return max((int(n) for n in re.findall(names, self._text(folder / "memory.stat"), re.MULTILINE)), default=0)

    def _number(self, path: Path) -> int | None:
        text = self._text(path).strip()
        return int(text) if text.isdigit() else None

    def _text(self, path: str | Path) -> str:
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
