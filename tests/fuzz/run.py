"""Coverage-guided fuzzing of all that takes bytes from elsewhere (targets.py), with atheris.

    python tests/fuzz/run.py [--runs 10_000_000] [--only frames,ulp] [--seconds N] [--finds FOLDER]

Each target is a process of its own, its data capped at GROWTH beyond what the imports took. A target goes on after a
find: one input of each kind is kept in the folder of finds, and the exit status is 1. An input that takes more than
SLOW seconds of the processor is a find too. The KEPT slowest of each target are timed once more in a process without
atheris, whose counting of branches takes many times the time of what it counts; the slowest of that is named.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
GROWTH = 1 << 29  # bytes
SLOW = 1.0  # seconds of the processor, for inputs of at most LONGEST bytes
LONGEST = 1 << 15
KEPT = 16
ALL = 10_000_000


def instrument() -> None:
    """Have atheris see the branches of thinwire; not those that numba compiles, which must stay as they are."""
    import atheris

    for name, module in list(sys.modules.items()):
        if not name.startswith("thinwire."):
            continue
        for found in list(vars(module).values()):
            inside = list(vars(found).values()) if isinstance(found, type) and found.__module__ == name else [found]
            for one in inside:
                function = getattr(one, "__func__", one)
                if isinstance(function, types.FunctionType) and function.__module__ == name:
                    try:
                        atheris.instrument_func(function)
                    except Exception:  # what a dataclass has made has no source to speak of
                        continue


def fuzz(name: str, runs: int, seconds: int, report: Path, finds: Path) -> None:
    """Run one target in this process, which ends with it."""
    import atheris
    from targets import TARGETS

    target = TARGETS[name]
    seeds = [*target.seeds(), *(file.read_bytes() for file in sorted((CORPUS / name).glob("*")))]
    for seed in seeds * 2:  # what is compiled or cached at first is nobody's time
        try:
            target.run(seed)
        except target.errors:
            pass
        except Exception:  # it will be found again, and kept
            continue
    instrument()
    kept = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    cap = int(kept.split()[1]) * 1024 + GROWTH
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    count, slowest, found, began = 0, [], {}, time.monotonic()

    def note(kind: str, data: bytes, line: str) -> None:
        if kind not in found:
            found[kind] = line
            finds.mkdir(parents=True, exist_ok=True)
            (finds / f"{name}-{len(found)}.bin").write_bytes(data)

    def write() -> None:
        spent = time.monotonic() - began
        inputs = [data.hex() for _, data in slowest]
        report.write_text(
            json.dumps({"target": name, "executions": count, "seconds": spent, "slowest": inputs, "finds": found})
        )

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        start = time.process_time()
        try:
            target.run(data)
        except target.errors:
            pass
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            note(kind, data, f"{kind}: {error!s:.200}")
        took = time.process_time() - start
        if len(slowest) < KEPT or took > slowest[0][0]:
            took = min(took, timed(target.run, data))  # a pass of Python's collector is not the input's time
            (heapq.heappush if len(slowest) < KEPT else heapq.heappushpop)(slowest, (took, data))
            if took > SLOW:
                note("slow", data, f"{took:.1f} s of the processor for {len(data)} bytes")
        if count % 1000 == 0 or count >= runs:
            write()

    with tempfile.TemporaryDirectory() as folder:
        for i, seed in enumerate(seeds):
            (Path(folder) / f"{i:04d}").write_bytes(seed)
        longest = max(LONGEST, *map(len, seeds)) if seeds else LONGEST
        options = [f"-runs={runs}", f"-max_len={longest}", "-rss_limit_mb=0", "-timeout=60", "-verbosity=0", "-seed=1"]
        if seconds:
            options.append(f"-max_total_time={seconds}")
        atheris.Setup([sys.argv[0], *options, folder], one)
        atheris.Fuzz()


def timed(run: Callable[[bytes], object], data: bytes) -> float:
    """Seconds of the processor."""
    start = time.process_time()
    with contextlib.suppress(Exception):
        run(data)
    return time.process_time() - start


def plain(name: str, report: Path) -> None:
    """Time the slowest inputs of a report in this process, as they are outside the fuzzer; write what came out."""
    from targets import TARGETS

    got = json.loads(report.read_text())
    inputs = [bytes.fromhex(text) for text in got["slowest"]]
    for data in inputs:  # what is compiled or cached at first is nobody's time
        timed(TARGETS[name].run, data)
    seconds, slowest = max((min(timed(TARGETS[name].run, data) for _ in range(3)), data) for data in inputs)
    (report.parent / f"{name}.slowest").write_bytes(slowest)
    report.write_text(json.dumps(got | {"slowest": seconds, "slowest_bytes": len(slowest)}))


def main() -> int:
    """All targets, one after another; the exit status."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=lambda text: int(text.replace("_", "")), default=ALL, help="of all targets")
    options.add_argument("--only", default="", help="targets, with commas between them")
    options.add_argument("--seconds", type=int, default=0, help="of each target, at most")
    options.add_argument("--finds", type=Path, default=Path("finds"), help="where inputs that were found go")
    options.add_argument("--one", nargs=2, metavar=("NAME", "REPORT"), help=argparse.SUPPRESS)
    options.add_argument("--plain", nargs=2, metavar=("NAME", "REPORT"), help=argparse.SUPPRESS)
    given = options.parse_args()
    finds = given.finds.resolve() / "finds"
    if given.one:
        fuzz(given.one[0], given.runs, given.seconds, Path(given.one[1]), finds)
        return 0
    if given.plain:
        plain(given.plain[0], Path(given.plain[1]))
        return 0
    from targets import TARGETS

    only = [name for name in given.only.split(",") if name]
    if unknown := set(only) - set(TARGETS):
        options.error(f"no target is called {min(unknown)}; there are {', '.join(TARGETS)}")
    names = only or list(TARGETS)
    shares = sum(TARGETS[name].share for name in names)
    bad, total, spent = 0, 0, 0.0
    print(f"{'target':12} {'executions':>11} {'a second':>9} {'slowest':>22}  finds", flush=True)
    for name in names:
        runs = max(1, round(given.runs * TARGETS[name].share / shares))
        finds.parent.mkdir(parents=True, exist_ok=True)
        report = finds.parent / f"{name}.json"
        report.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--one", name, str(report), "--runs", str(runs)]
        command += ["--seconds", str(given.seconds), "--finds", str(given.finds.resolve())]
        log = finds.parent / f"{name}.log"
        with log.open("wb") as text:
            status = subprocess.run(command, stdout=text, stderr=text, cwd=finds.parent, env={**os.environ}).returncode
        if not report.exists() or status:
            bad += 1
            print(f"{name:12} ended with {status}; see {log}", flush=True)
        if not report.exists():
            continue
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for work would count as work
        command = [sys.executable, __file__, "--plain", name, str(report)]
        subprocess.run(command, check=True, cwd=finds.parent, env=alone)
        got = json.loads(report.read_text())
        total, spent, bad = total + got["executions"], spent + got["seconds"], bad + len(got["finds"])
        slow = f"{got['slowest'] * 1e3:.1f} ms, {got['slowest_bytes']} bytes"
        rate = got["executions"] / max(1e-9, got["seconds"])
        print(f"{name:12} {got['executions']:11,} {rate:9,.0f} {slow:>22}  {len(got['finds'])}", flush=True)
        for line in got["finds"].values():
            print(f"{'':12} {line}", flush=True)
    print(f"{total:,} executions in {spent:,.0f} s, {bad} finds" + (f"; see {finds}" if bad else ""))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
