"""What an engine costs: seconds a round, and memory on both sides, on loopback with SmolLM2-135M.

    python benchmarks/federation.py [thin] [small] [wide] [sites] [nvflare] [--json FILE]

With `nvflare` the engine is NVIDIA FLARE in place of Flower.

thin    FedKSeed, 2 sites: seconds of the first and of later rounds on the engine, against the same in one process
small   the same with a tiny model and 20 rounds: what is left is the engine's own
wide    FedZO in bfloat16, whose clients need little more than the model, 2 sites, frames of 269 MB: peak memory of the
        hub's processes and of a site's, in models, and seconds of a round, in pieces of 48 MiB and in one piece
sites   FedKSeed: seconds of a round with 20 sites of a tiny model, and with 6 of SmolLM2

Memory is the sum of the peaks (VmHWM) of a side's processes from the end of the first round on, those that are
started anew for each message or run by the largest alone, beyond what the same take in the same run of a tiny model:
interpreters and libraries are not counted, nor the loading of the model; the model itself is. The sums as they are,
each process, and the same up to the end of the first round are shown beside it. References are the targets: a hub of 6
models, a site of 4, twice the seconds of one piece.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from rows import Row, finish

from thinwire import assemble, config
from thinwire.federation.local import Local, named
from thinwire.keys import Key
from thinwire.runtime import course

TESTS = Path(__file__).parent.parent / "tests"
PARTS = ("thin", "small", "wide", "sites")
ENGINE = "nvflare" if "nvflare" in sys.argv else "flower"
HUB_MODELS, SITE_MODELS, SLOWER = 6, 4, 2
SHORT_LIVED = ("flwr-clientapp", "flwr-serverapp", "flare.admin")
FLOWER = ("flower-superlink", "flower-supernode", "flower-superexec")
FLARE = ("runner_process", "worker_process", "server_train", "client_train")  # a job's at both sides, and their parents
KINDS = (*SHORT_LIVED, *FLOWER, *FLARE, "federation.worker")
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
    """The peak memory of each process below some, by the kind of its command."""

    def __init__(self) -> None:
        self.by_kind: dict[str, dict[int, int]] = {}
        self.loading: dict[str, int] = {}

    def begin_anew(self) -> None:
        """Forget the peaks up to now, but for `loading`."""
        self.loading = self.parts()
        for pid in (pid for seen in self.by_kind.values() for pid in seen):
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")
        self.by_kind = {}

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
            seen = self.by_kind.setdefault(next((kind for kind in KINDS if kind in command), "others"), {})
            seen[pid] = max(seen.get(pid, 0), peak)

    def parts(self) -> dict[str, int]:
        """The sum of the peaks of each kind; of the processes of a short-lived one the largest."""
        return {kind: (max if kind in SHORT_LIVED else sum)(seen.values()) for kind, seen in self.by_kind.items()}


def federated(run: config.Run, folder: Path) -> tuple[list[float], Peaks, Peaks]:
    """Seconds of each round on the engine; peak bytes of the hub's processes and of the first site's."""
    rows = assemble.rows_of(run.data, Key.root(run.seed))
    local, hub, site = Local(folder / "hub", named(run, rows.clients), engine=ENGINE), Peaks(), Peaks()
    out = folder / "out"
    out.mkdir()
    (out / "run.toml").write_text(run.to_toml())

    def watch() -> None:
        hub.look([process.pid for process in local.server.children.running.values()])
        site.look([process.pid for process in local.sites[local.names[0]].children.running.values()])
        if not hub.loading and course.read_records(out / "rounds.jsonl"):
            hub.begin_anew()
            site.begin_anew()

    try:
        local.start()
        local.follow(out, run, rows.splits, watch)
    finally:
        local.stop()
    records = course.read_records(out / "rounds.jsonl")
    if any("error" in client for record in records for client in record["clients"]):
        raise RuntimeError(f"a client was absent: {records}")
    return [record["seconds"] for record in records], hub, site


def alone(run: config.Run, folder: Path) -> list[float]:
    """Seconds of each round in this process."""
    folder.mkdir()
    course.train(assemble.begin(*assemble.prepared(run)).job(folder, course.Watch()))
    return [record["seconds"] for record in course.read_records(folder / "rounds.jsonl")]


def thin(place: Path) -> list[Row]:
    """Seconds."""
    run = settings(2, 4, THIN)
    there, _, _ = federated(run, place)
    here = alone(run, place / "alone")
    return [
        Row(f"first round on {ENGINE} against in process", there[0], here[0], "s"),
        Row(f"later rounds on {ENGINE} against in process", fmean(there[1:]), fmean(here[1:]), "s"),
        Row("first round at the sites against later ones", there[0], fmean(there[1:]), "s"),
    ]


def small(place: Path) -> list[Row]:
    """Seconds of the engine's own."""
    run = settings(2, 20, THIN, model={"path": str(tiny(place))})
    there, _, _ = federated(run, place)
    here = alone(run, place / "alone")
    return [Row(f"tiny model: later rounds on {ENGINE} against in process", fmean(there[1:]), fmean(here[1:]), "s")]


def wide(place: Path) -> list[Row]:
    """Memory, in models, and seconds."""
    method = {"name": "fedzo", "lr": 1e-6, "steps": 1, "batch_size": 1, "law": "sign"}
    found = {}
    shapes: dict[str, tuple[int, dict[str, Any]]] = {
        "tiny": (3 << 24, {"path": str(tiny(place))}),
        "pieces": (3 << 24, {}),
        "one": (1 << 30, {}),
    }
    for name, (size, model) in shapes.items():
        run = settings(2, 2, method, model={**model, "dtype": "bfloat16"}, federation={"chunk_bytes": size})
        (place / name).mkdir()
        found[name] = federated(run, place / name)
    whole, rows = 269_030_016, []
    for side, target, i in (("hub", HUB_MODELS, 0), ("site", SITE_MODELS, 1)):
        peaks = {name: (run[1], run[2])[i] for name, run in found.items()}
        first = {name: sum(peak.loading.values()) / whole for name, peak in peaks.items()}
        shown = ", ".join(f"{name} {count - first['tiny']:.2f}" for name, count in first.items())
        print(f"{side}, models loaded and first round, beyond the tiny model's: {shown} models")  # noqa: T201
        parts = {name: peak.parts() for name, peak in peaks.items()}
        for kind in parts["pieces"]:
            shown = ", ".join(f"{name} {peak.get(kind, 0) / 1e6:.0f} MB" for name, peak in parts.items())
            print(f"{side}: {kind}: {shown}")  # noqa: T201
        sums = {name: sum(peak.values()) / whole for name, peak in parts.items()}
        print(f"{side}, libraries too: " + ", ".join(f"{name} {count:.2f} models" for name, count in sums.items()))  # noqa: T201
        beyond = {name: sums[name] - sums["tiny"] for name in ("pieces", "one")}
        rows += [
            Row(f"{side} in pieces against the target", beyond["pieces"], target, "models"),
            Row(f"{side} in pieces against one piece", beyond["pieces"], beyond["one"], "models"),
        ]
    seconds = {name: fmean(run[0]) for name, run in found.items()}
    return [
        *rows,
        Row("round in pieces against twice that in one piece", seconds["pieces"], SLOWER * seconds["one"], "s"),
    ]


def tiny(place: Path) -> Path:
    """A tiny model's folder."""
    sys.path.insert(0, str(TESTS))
    from tiny import tiny_folder

    return tiny_folder(place / "model")


def sites(place: Path) -> list[Row]:
    """Many sites."""
    rows = []
    for name, clients, model in (("20 sites, tiny", 20, {"path": str(tiny(place))}), ("6 sites, SmolLM2", 6, {})):
        (place / str(clients)).mkdir()
        run = settings(clients, 2, THIN, model=model)
        seconds, _, _ = federated(run, place / str(clients))
        here = alone(run, place / str(clients) / "alone")
        rows.append(Row(f"{name}: second round on {ENGINE} against in process", seconds[1], here[1], "s"))
    return rows


def main() -> None:
    """The parts that are named, or all."""
    chosen = [part for part in PARTS if part in sys.argv] or PARTS
    rows: list[Row] = []
    for part in chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows += {"thin": thin, "small": small, "wide": wide, "sites": sites}[part](Path(folder))
    finish(rows)


if __name__ == "__main__":
    main()
