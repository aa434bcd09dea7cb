"""A run of one process with 1,000, 10,000 and 100,000 registered clients, 100 of them a round: start, memory, rounds.

    python benchmarks/many_clients.py [--counts 1000,10000,100000] [--json FILE]

Each run is a process of its own: FedKSeed on a random Llama of 27,000 weights, two rows a client, one step a client and
round, six rounds. No two prompts are the same. The start is from the end of the imports, which have a row of their own,
to the first round's beginning. The reference of a row is the run with the fewest clients, but for the start, whose
reference is the bound that is promised.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import Row, finish

COUNTS = (1_000, 10_000, 100_000)
START = 10.0  # seconds, promised at any of these numbers
ROUNDS, COHORT = 6, 100
TESTS = Path(__file__).parent.parent / "tests"
CHILD = """
import sys, time
began = time.perf_counter()
from thinwire import cli
from thinwire.commands.terminal import settle
settle()
from thinwire import memory
from thinwire.commands import show
import json
imported = time.perf_counter()

class Timed(show.Live):
    def round_begins(self, *args):
        times.append(time.perf_counter() - imported)
        super().round_begins(*args)
    def round_ends(self, record, left):
        seconds.append(record["seconds"])
        super().round_ends(record, left)

times, seconds, out = [], [], sys.argv.pop()
show.Live = Timed
try:
    cli.main()
except SystemExit as end:
    if end.code:
        raise
found = {"imports": imported - began, "start": times[0], "seconds": seconds, "resident": memory.resident()}
json.dump(found, open(out, "w"))
"""


def measured(count: int, folder: Path) -> dict[str, float]:
    """Seconds of the imports, from there to the first round, and of a round; MB resident at the end."""
    rows = folder / f"{count}.jsonl"
    with rows.open("w") as file:
        for i in range(2 * count):
            word, answer = (("splendid", "great"), ("dreadful", "terrible"))[i // 2 % 2]
            file.write(json.dumps({"input": f"{word} {i}", "output": answer}) + "\n")
    settings = f"""
rounds = {ROUNDS}
threads = 1
model.path = {json.dumps(str(folder / "model"))}
cohort = [{{ kind = "uniform", n = {COHORT} }}]
[data]
path = {json.dumps(str(rows))}
clients = {count}
heldout = 0
max_length = 32
choices = ["great", "terrible"]
prompt = "{{input}}:"
answer = " {{output}}"
[method]
name = "fedkseed"
seeds = 64
steps = 1
batch_size = 2
"""
    (folder / "run.toml").write_text(settings)
    report = folder / f"{count}.json"
    command = [sys.executable, "-c", CHILD, "run", str(folder / "run.toml"), "--out", str(folder / f"run-{count}")]
    subprocess.run([*command, str(report)], check=True, stdout=subprocess.DEVNULL)
    found = json.loads(report.read_text())
    return {
        "imports": found["imports"],
        "start": found["start"],
        "round": statistics.median(found["seconds"][1:]),
        "resident": found["resident"] / 1e6,
    }


def main() -> None:
    """All of them, the fewest first."""
    sys.path.insert(0, str(TESTS))
    from tiny import tiny_folder

    given = sys.argv[sys.argv.index("--counts") + 1].split(",") if "--counts" in sys.argv else COUNTS
    counts = sorted(map(int, given))
    with tempfile.TemporaryDirectory() as folder:
        tiny_folder(Path(folder) / "model")
        found = {count: measured(count, Path(folder)) for count in counts}
    least = found[counts[0]]
    rows = []
    for count, at in found.items():
        rows.append(Row(f"{count:,} registered clients, to the first round", at["start"], START, "s"))
        rows.append(Row(f"{count:,} registered clients, imports", at["imports"], least["imports"], "s"))
        rows.append(Row(f"{count:,} registered clients, a round of {COHORT}", at["round"], least["round"], "s"))
        rows.append(Row(f"{count:,} registered clients, resident", at["resident"], least["resident"], "MB"))
    finish(rows)


if __name__ == "__main__":
    main()
