"""Real runs of thinwire, killed, starved, damaged and attacked in every way that we know: what comes of each.

    python tests/chaos.py [--quick] [--only WORD] [--jobs N] [--record FILE] [--markdown]

Runs are processes of their own, forked off one that has imported everything, with a shim before libc that counts the
calls that change files (tests/chaos/shim.c). A row of the table is a kind of trial; it is bad where a run ends with
another model and exit status 0, in a traceback, or in silence where something is lost. The exit status is 1 then.
`--record` keeps what is known, and goes on from it. Without a C compiler nothing can be shown, which is reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "chaos")]

import preloaded
from hostile_hub import attacks
from trials import Trial, trials
from workshop import METHODS, Verdict, Workshop

QUICK = ("fedkseed", "fedavg", "cgfed")
Row = dict[str, object]


def table(rows: list[Row], markdown: bool) -> list[str]:
    """A line a kind of trial: how many, what came of them, the verdict."""
    lines = []
    for kind in dict.fromkeys(str(row["kind"]) for row in rows):
        of = [row for row in rows if row["kind"] == kind]
        counted = Counter(str(row["outcome"]) for row in of)
        outcome = next(iter(counted)) if len(counted) == 1 else ", ".join(f"{n} {what}" for what, n in counted.items())
        verdict = "good" if all(row["good"] for row in of) else "bad"
        if markdown:
            lines.append(f"| {kind} | {len(of)} | {outcome} | {verdict} |")
        else:
            lines.append(f"{kind:58} {len(of):5}  {verdict:4}  {outcome}")
    if markdown:
        return ["| trial | n | outcome | verdict |", "| --- | ---: | --- | --- |", *lines]
    return lines


def tried(trial: Trial) -> Row:
    """What came of a trial, in a worker."""
    began = time.monotonic()
    try:
        verdict = trial.run(SHOP)
    except Exception as error:
        verdict = Verdict.bad("the trial itself failed", repr(error))
    return {"kind": trial.kind, "name": trial.name, **asdict(verdict), "seconds": time.monotonic() - began}


SHOP: Workshop


def main() -> int:
    """All trials; the exit status."""
    global SHOP
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a sample, in two or three minutes")
    options.add_argument("--only", default="", help="trials whose kind or name holds this word; several with commas")
    options.add_argument("--every", type=int, help="of how many calls one is tried")
    options.add_argument("--methods", help="names, with commas between them")
    options.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    options.add_argument("--record", type=Path, help="a file of what is known, which is gone on from")
    options.add_argument("--markdown", action="store_true", help="print the table of the documents")
    given = options.parse_args()
    folder = Path(os.environ.get("THINWIRE_CHAOS_FOLDER") or tempfile.mkdtemp(prefix="thinwire-chaos-"))
    os.environ["THINWIRE_CHAOS_FOLDER"] = str(folder)
    if not preloaded.reexec(folder):
        print("nothing was tried: the shim before libc needs Linux and a C compiler called cc")
        return 0
    try:
        return _main(given, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _main(given: argparse.Namespace, folder: Path) -> int:
    global SHOP
    SHOP = Workshop(folder)
    methods = tuple(given.methods.split(",")) if given.methods else QUICK if given.quick else tuple(METHODS)
    SHOP.prepare(methods)
    every = given.every or (80 if given.quick else 10)
    words = [word for word in given.only.split(",") if word]
    chosen = [
        trial
        for trial in [*trials(SHOP, methods, every, given.quick), *attacks()]
        if not words or any(word in f"{trial.kind} {trial.name}" for word in words)
    ]
    rows: list[Row] = []
    if given.record and given.record.exists():
        rows = [json.loads(line) for line in given.record.read_text().splitlines()]
    known = {row["name"] for row in rows}
    with multiprocessing.get_context("fork").Pool(given.jobs) as pool:
        for row in pool.imap_unordered(tried, [trial for trial in chosen if trial.name not in known]):
            rows.append(row)
            if given.record:
                with given.record.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if not row["good"]:
                print(f"bad: {row['name']}: {row['outcome']}: {row['more']}", file=sys.stderr, flush=True)
    order = {trial.name: i for i, trial in enumerate(chosen)}
    rows.sort(key=lambda row: order.get(str(row["name"]), 0))
    print("\n".join(table(rows, given.markdown)))
    bad = [row for row in rows if not row["good"]]
    print(f"\n{len(rows)} trials, {len(bad)} bad")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
