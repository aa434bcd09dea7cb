"""What Flower costs: seconds a round, and memory on both sides, on loopback with SmolLM2-135M.

    python benchmarks/federation.py [thin] [wide] [sites] [--json FILE]

thin    FedKSeed, 2 sites: seconds of the first and of later rounds on Flower, against the same rounds in one process
wide    FedAvg in bfloat16, 2 sites, frames of 269 MB: peak memory of the hub's processes and of a site's, in models,
        and seconds of a round, in pieces of 64 MiB and in one piece
sites   FedKSeed: seconds of a round with 20 sites of a tiny model, and with 6 of SmolLM2

Memory is the sum of the peaks (VmHWM) of a side's processes; of those that Flower starts anew for each message, the
largest alone. References are the targets: a hub of 6 models, a site of 4, twice the seconds of one piece.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from rows import Row, finish

from thinwire import build, config
from thinwire.federation.local import Local, named
from thinwire.keys import Key
from thinwire.runtime import loop

TESTS = Path(__file__).parent.parent / "tests"
PARTS = ("thin", "wide", "sites")
HUB_MODELS, SITE_MODELS, SLOWER = 6, 4, 2
SHORT_LIVED = ("flwr-clientapp", "flwr-serverapp")
THIN = {"name": "fedkseed", "seeds": 128, "lr": 1e-4, "steps": 2, "batch_size": 4}


def settings(clients: int, rounds: int, method: dict[str, Any], **fields: Any) -> config.Run:
    """A run of film-desk."""
    tree = {
        "name": "bench",
        "rounds": rounds,
        "threads": 1,
        "model": fields.pop("model", {}),
        "data": {
            "path": "film-desk",
            "clients": clients,
            "rows": 30 * clients + 8,
            "heldout": 8,
            "prompt": "{input} Class:",
            "answer": " {output}",
            "max_length": 192,  # the tiny model has a token a byte
            "too_long": "drop",
        },
        "method": method,
        "eval": {"rows": 8},
        **fields,
    }
    return config.parse(tree)


class Peaks:
    """The peak memory of each process below some, by the name of its command."""

    def __init__(self) -> None:
        self.by_pid: dict[str, dict[int, int]] = {}

    def look(self, roots: list[int]) -> None:
        """Take note of the processes that there are."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
        below = list(roots)
        for pid in below:
            below += parents.get(pid, [])
        for pid in below:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            peak = next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)
            name = next((name for name in SHORT_LIVED if name in command), str(pid))
            seen = self.by_pid.setdefault(name, {})
            seen[pid] = max(seen.get(pid, 0), peak)

    def total(self) -> int:
        """The sum of the peaks; of the processes of one short-lived kind the largest."""
        return sum(max(seen.values()) for seen in self.by_pid.values())


def federated(run: config.Run, folder: Path) -> tuple[list[float], int, int]:
    """Seconds of each round on Flower; peak bytes of the hub's side and of the first site's."""
    rows = build.rows_of(run.data, Key.root(run.seed))
    local, hub, site = Local(folder / "hub", named(run, rows.clients)), Peaks(), Peaks()
    out = folder / "out"
    out.mkdir()
    (out / "run.toml").write_text(run.to_toml())

    def watch() -> None:
        hub.look([process.pid for process in local.server.children.running.values()])
        site.look([process.pid for process in local.sites[local.names[0]].children.running.values()])

    try:
        local.start()
        local.follow(out, run, rows.splits, watch)
    finally:
        local.stop()
    records = loop.read_records(out / "rounds.jsonl")
    if any("error" in client for record in records for client in record["clients"]):
        raise RuntimeError(f"a client was absent: {records}")
    return [record["seconds"] for record in records], hub.total(), site.total()


def alone(run: config.Run, folder: Path) -> list[float]:
    """Seconds of each round in this process."""
    folder.mkdir()
    build.use_threads(run)
    net = build.net_of(run, remember=True)
    loop.train(build.job(run, build.rows_of(run.data, Key.root(run.seed)), net, folder, 0, loop.Watch()))
    return [record["seconds"] for record in loop.read_records(folder / "rounds.jsonl")]


def thin(place: Path) -> list[Row]:
    """Seconds."""
    run = settings(2, 4, THIN)
    there, _, _ = federated(run, place)
    here = alone(run, place / "alone")
    return [
        Row("first round on Flower against in process", there[0], here[0], "s"),
        Row("later rounds on Flower against in process", fmean(there[1:]), fmean(here[1:]), "s"),
        Row("first round at the sites against later ones", there[0], fmean(there[1:]), "s"),
    ]


def wide(place: Path) -> list[Row]:
    """Memory, in models, and seconds."""
    method = {"name": "fedavg", "lr": 1e-4, "steps": 1, "batch_size": 1, "optimiser": "sgd"}
    found = {}
    for name, size in (("pieces", 1 << 26), ("one", 1 << 30)):
        run = settings(2, 2, method, model={"dtype": "bfloat16"}, federation={"chunk_bytes": size})
        (place / name).mkdir()
        found[name] = federated(run, place / name)
    model = 269_030_016
    (seconds, hub, site), (whole, hub_whole, site_whole) = found["pieces"], found["one"]
    return [
        Row("hub in pieces against the target", hub / model, HUB_MODELS, "models"),
        Row("site in pieces against the target", site / model, SITE_MODELS, "models"),
        Row("hub in pieces against one piece", hub / model, hub_whole / model, "models"),
        Row("site in pieces against one piece", site / model, site_whole / model, "models"),
        Row("round in pieces against twice that in one piece", fmean(seconds), SLOWER * fmean(whole), "s"),
    ]


def sites(place: Path) -> list[Row]:
    """Many sites."""
    sys.path.insert(0, str(TESTS))
    from tiny import tiny_folder

    tiny_folder(place / "tiny")
    rows = []
    for name, clients, model in (("20 sites, tiny", 20, {"path": str(place / "tiny")}), ("6 sites, SmolLM2", 6, {})):
        (place / str(clients)).mkdir()
        run = settings(clients, 2, THIN, model=model)
        seconds, _, _ = federated(run, place / str(clients))
        here = alone(run, place / str(clients) / "alone")
        rows.append(Row(f"{name}: second round on Flower against in process", seconds[1], here[1], "s"))
    return rows


def main() -> None:
    """The parts that are named, or all."""
    chosen = [part for part in PARTS if part in sys.argv] or PARTS
    rows: list[Row] = []
    for part in chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows += {"thin": thin, "wide": wide, "sites": sites}[part](Path(folder))
    finish(rows)


if __name__ == "__main__":
    main()
