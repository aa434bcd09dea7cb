"""What may go wrong on this machine, before it does: a line for each thing that was looked at."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from thinwire.estimate.machine import Machine
from thinwire.units import size

if TYPE_CHECKING:
    from thinwire.config import Run
    from thinwire.estimate.costs import Estimate

SHOWN = ("thinwire", "torch", "transformers")
BUSY = 1.5  # threads that want to run, of one that is there
ROOM = 5 * 10**9  # bytes of a disk below which a run of unknown size is warned of
EARLY = 1_735_689_600  # seconds: 2025 has begun, and this package is younger
AHEAD = 60  # seconds that a file may be from the future: another machine's clock
DRIFT = 0.02  # of a tenth of a second, that wall and monotonic clock may go apart
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # keep libraries from using what is there


class Finding(NamedTuple):
    """One line; `warns`: something to be mended, or minded."""

    what: str
    text: str
    warns: bool = False


def examine(machine: Machine, run: Run | None = None, out: Path | None = None) -> list[Finding]:
    """All that is found, warnings first, in the order of the checks. ConfigError, ModelError: of the run's estimate.

    `out`: where the run's folder will be.
    """
    costs = None
    if run is not None:
        from thinwire.estimate.costs import estimate

        costs = estimate(run)
    found = [
        *versions(machine),
        *threads(machine, run),
        *memory(machine, costs),
        *disk(out or Path("runs"), costs, run),
        *processor(machine, run is not None),
        *clock([Path(run.data.path)] if run is not None else []),
    ]
    return sorted(found, key=lambda finding: not finding.warns)


def versions(machine: Machine) -> Iterator[Finding]:
    """Packages against what the package asks for."""
    from packaging.requirements import Requirement

    for text in metadata.requires("thinwire") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Finding("versions", f"{wanted.name} is not installed: pip install '{wanted}'", True)
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            yield Finding("versions", f"{wanted.name} {there} is not {wanted.specifier}", True)
    held = {name: metadata.version(name) for name in SHOWN if _installed(name)}
    if machine.gpus() and "+cpu" in held.get("torch", ""):
        yield Finding("versions", f"a GPU is there, and torch {held['torch']} is built for CPUs alone", True)
    yield Finding("versions", ", ".join(f"{name} {there}" for name, there in held.items()))


def threads(machine: Machine, run: Run | None = None) -> Iterator[Finding]:
    """Hardware threads, who else wants them, and how many a run would take."""
    have, share = machine.threads(), machine.group_threads()
    set_to = machine.env.get("OMP_NUM_THREADS", "")
    takes = run.threads if run is not None and run.threads else int(set_to) if set_to.isdigit() else None
    usable = have if share is None else min(have, share)
    if takes is not None and takes > usable:
        source = "threads of the run file" if run is not None and run.threads else "OMP_NUM_THREADS"
        yield Finding("threads", f"{source} is {takes}, and there are {usable:g}: they would wait for each other", True)
    elif takes is None and share is not None and share < have:
        text = f"torch sees {have}, and the control group gives the time of {share:g}: set OMP_NUM_THREADS"
        yield Finding("threads", text, True)
    load = machine.load()
    if load is not None and load > BUSY * usable:
        yield Finding("threads", f"{load:.0f} threads want to run on {usable:g}: others use the machine", True)
    cores = machine.cores()
    yield Finding("threads", f"{have} to use" + (f", on {cores} cores" if cores else ""))


def memory(machine: Machine, costs: Estimate | None = None) -> Iterator[Finding]:
    """What is free, by the system and by the control group, against what a run will take."""
    free, group = machine.memory(), machine.group_memory()
    rooms = [room for room in (free, None if group is None else group[0] - group[1]) if room is not None]
    if not rooms:
        yield Finding("memory", "this system does not state it")
        return
    room = min(rooms)
    text = f"{size(room)} free" + (f", of a control group of {size(group[0])}" if group and room != free else "")
    if costs is None or costs.client is None or costs.server is None:
        yield Finding("memory", text)
        return
    client, server = costs.client.total, costs.server.total
    text = f"a client takes about {size(client)} and the server {size(server)}; {text}"
    if max(client, server) > room:
        yield Finding("memory", f"{text}: it does not fit", True)
    elif client + server > room:
        yield Finding("memory", f"{text}: both in one process may not fit", True)
    else:
        yield Finding("memory", text)


def disk(out: Path, costs: Estimate | None = None, run: Run | None = None) -> Iterator[Finding]:
    """Room where runs are written, and in the folder of temporary files."""
    wanted = ROOM
    if costs is not None and run is not None:
        item = 4 if run.model.dtype == "float32" else 2
        wanted = (costs.parameters + 3 * costs.trained) * item  # the model, and states: the last, the best, a new one
    for what, folder in (("runs", out), ("temporary files", Path(tempfile.gettempdir()))):
        there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
        free = shutil.disk_usage(there).free
        text = f"{size(free)} free for {what} in {there}"
        if not os.access(there, os.W_OK):
            yield Finding("disk", f"{there}, for {what}, cannot be written to", True)
        elif free < wanted:
            yield Finding("disk", f"{text}, and about {size(wanted)} may be written", True)
        else:
            yield Finding("disk", text)


def processor(machine: Machine, loaded: bool = False) -> Iterator[Finding]:
    """Wide products: what the processor has and what keeps libraries from it. `loaded`: torch is asked too."""
    flags = machine.flags()
    if not flags:
        yield Finding("processor", "this system does not state what it can do")
        return
    kinds = {"AMX": "amx_tile", "AMX-BF16": "amx_bf16", "AVX-512": "avx512f", "AVX-512-BF16": "avx512_bf16",
             "AVX2": "avx2", "NEON": "asimd", "BF16": "bf16"}  # fmt: skip
    has = [name for name, flag in kinds.items() if flag in flags]
    for name in LIMITS:
        if value := machine.env.get(name):
            yield Finding("processor", f"{name} is {value}: torch may leave aside what the processor has", True)
    uses = ""
    if loaded:
        import torch

        uses = torch.backends.cpu.get_cpu_capability()
        if "AVX-512" in has and not uses.startswith("AVX512"):
            yield Finding("processor", f"it has AVX-512, and torch uses {uses}", True)
    if not {"AVX2", "NEON"} & {*has}:
        yield Finding("processor", "neither AVX2 nor NEON: a visit takes several times as long", True)
    yield Finding("processor", (", ".join(has) or "nothing wide") + (f"; torch uses {uses}" if uses else ""))


def clock(files: list[Path]) -> Iterator[Finding]:
    """What shows without a network that the clock is off: the year, files from the future, that it is being set."""
    now = time.time()
    if now < EARLY:
        yield Finding("clock", f"it is {time.gmtime(now).tm_year} by it: certificates and keys may be refused", True)
    with tempfile.NamedTemporaryFile() as fresh:
        off = os.stat(fresh.name).st_mtime - time.time()
    if abs(off) > AHEAD:
        yield Finding("clock", f"a file that is written now is {off:+.0f} s off by it", True)
    for file in (Path(__file__), *files):
        if file.exists() and (ahead := file.stat().st_mtime - now) > AHEAD:
            yield Finding("clock", f"{file} is {ahead:.0f} s from the future", True)
    wall, even = time.time(), time.monotonic()
    time.sleep(0.1)
    apart = (time.time() - wall) - (time.monotonic() - even)
    if abs(apart) > DRIFT * 0.1:
        yield Finding("clock", f"it is being set: {1000 * apart:.1f} ms off in a tenth of a second", True)
    yield Finding("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
