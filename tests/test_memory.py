"""Peak memory: what is touched after a reset is seen, what was before it is not."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from thinwire import memory

MIB = 1 << 20


def can_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return "VmHWM:" in Path("/proc/self/status").read_text()


needs_reset = pytest.mark.skipif(not can_reset(), reason="this system cannot reset the peak of a process")


def touch(size: int) -> None:
    with mmap.mmap(-1, size) as memory:  # not from the heap, which may have as much to spare, and keeps it
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


def test_the_peak_is_at_least_what_is_resident() -> None:
    resident = memory.resident()
    assert resident > MIB
    assert memory.peak() + MIB > resident  # the kernel's counters may lag by some pages


@needs_reset
def test_a_reset_forgets_and_50_mib_are_seen() -> None:
    touch(120 * MIB)
    before_reset = memory.peak()
    memory.reset()
    begun = memory.peak()
    assert before_reset - begun > 80 * MIB
    touch(50 * MIB)
    assert 45 * MIB < memory.peak() - begun < 60 * MIB
    assert memory.peak() - memory.resident() > 40 * MIB  # given back, and still the peak
    memory.reset()
    assert memory.peak() - begun < 10 * MIB


@pytest.mark.parametrize("missing", ["read_text", "write_text"])
def test_a_system_without_proc_still_answers(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(Path, missing, absent)
    memory.reset()
    assert memory.resident() > MIB
    assert memory.peak() > MIB
