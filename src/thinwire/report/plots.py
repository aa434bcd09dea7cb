"""The plots of a report: for each its rows, its Vega-Lite specification, and what a reader must know of it.

Curves have no x of their own: the page puts rounds, bytes or seconds there, as the reader chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thinwire.records import MEASURED
from thinwire.report.runs import Recorded, number
from thinwire.units import size

SPLITS = {
    "heldout": "Held-out",
    "heldout_tasks": "Held-out tasks",
    "validation": "Validation",
    "selection": "Selection",  # by which a round is chosen
    "train": "Training",
    "sites": "Sites'",
    "sites_train": "Clients' own",
}
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right")


@dataclass(frozen=True)
class Plot:
    """A figure. `kind`: curve (x and y can be toggled), bar (x can), clients (a curve of one run at a time), front."""

    name: str
    title: str
    caption: str
    kind: str
    columns: Sequence[tuple[str, str]]  # of the rows: key, heading with its unit
    rows: Sequence[dict[str, Any]]
    spec: dict[str, Any]


def plots(runs: Sequence[Recorded]) -> list[Plot]:
    """All plots that the runs have records for."""
    groups = list(dict.fromkeys(run.group for run in runs))
    found = [plot for split in _splits(runs) for score in MEASURED if (plot := _score(runs, groups, split, score))]
    made = [_front(runs, groups), _training(runs, groups)]
    made += [make(runs) for make in (_bytes, _memory, _clients, _own, _shares)]
    return found + [plot for plot in made if plot]


def _splits(runs: Sequence[Recorded]) -> list[str]:
    return list(dict.fromkeys(str(row["split"]) for run in runs for row in run.evals if "split" in row))


def _score(runs: Sequence[Recorded], groups: Sequence[str], split: str, score: str) -> Plot | None:
    rows = [
        _at(run, row["round"]) | {"value": value}
        for run in runs
        for row in run.evals
        if row.get("split") == split and (value := number(row.get(score))) is not None
    ]
    if not rows:
        return None
    name, unit, about, *_ = MEASURED[score]
    where = SPLITS.get(split, split)
    spec = _curve(groups, f"{name} ({unit})")
    return Plot(
        f"{split}-{score}",
        f"{where} {name}",
        f"{about} A line a run, a point an evaluation. Unit: {unit}.",
        "curve",
        _columns(f"{name} ({unit})"),
        rows,
        spec,
    )


def _front(runs: Sequence[Recorded], groups: Sequence[str]) -> Plot | None:
    """Where there are several runs."""
    rows = []
    for run in runs:
        losses = [
            v for row in run.evals if row.get("split") == "heldout" and (v := number(row.get("loss"))) is not None
        ]
        visits = [c.get("bytes_down", 0) + c.get("bytes_up", 0) for r in run.rounds[-1:] for c in r["clients"]]
        if losses and any(visits):
            sent = sum(visits) / len(visits)
            rows.append({"run": run.label, "group": run.group, "bytes": sent, "value": min(losses)})
    if len(rows) < 2:
        return None
    named = {"field": "group", "type": "nominal", "title": None, "sort": list(groups)}
    spec = {
        "mark": {"type": "point", "filled": True, "size": 70},
        "encoding": {
            "x": {"field": "bytes", "type": "quantitative", "title": "bytes of a visit, both ways"},
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": "best held-out loss (nats a token)",
                "scale": {"zero": False, "padding": 16},
            },
            "color": {**named, "scale": {"domain": list(groups)}},
            "shape": {**named, "scale": _shapes(groups)},
            "tooltip": [{"field": "run"}, {"field": "bytes", "format": ","}, {"field": "value", "format": ".5"}],
        },
    }
    return Plot(
        "front",
        "Loss against bytes",
        "A point a run: its best held-out loss, against the mean bytes of a client's visit in its last round, both "
        "ways, in powers of ten. Lower and further to the left is better. Units: nats a token, bytes.",
        "front",
        (("run", "run"), ("bytes", "bytes of a visit, both ways"), ("value", "best held-out loss (nats a token)")),
        rows,
        spec,
    )


def _training(runs: Sequence[Recorded], groups: Sequence[str]) -> Plot | None:
    rows = [
        _at(run, record["round"]) | {"value": value}
        for run in runs
        for record in run.rounds
        if (value := number(record["metrics"].get("loss"))) is not None
    ]
    if not rows:
        return None
    return Plot(
        "training-loss",
        "Training loss at the clients",
        "Mean over the clients of a round of the loss of their local steps, weighted as the method weights them; "
        "each point is of other rows, so it is noisier than the held-out loss. Unit: nats a token.",
        "curve",
        _columns("loss (nats a token)"),
        rows,
        _curve(groups, "loss (nats a token)"),
    )


def _bytes(runs: Sequence[Recorded]) -> Plot | None:
    rows = []
    for run in runs:
        for way in ("down", "up"):
            visits = [c[f"bytes_{way}"] for r in run.rounds for c in r["clients"] if c.get(f"bytes_{way}")]
            if visits:
                total = sum(record[f"bytes_{way}"] for record in run.rounds)
                mean = sum(visits) / len(visits)
                rows.append({"run": run.label, "part": way, "value": mean, "total": total, "text": size(mean)})
    if not rows:
        return None
    return Plot(
        "bytes",
        "Bytes of a client's visit",
        "Mean length of the frames of one client in one round: down to the client and up from it. Unit: bytes, in "
        "powers of ten; on a log axis a bar's length counts its digits.",
        "bar",
        (("run", "run"), ("part", "way"), ("value", "bytes a visit"), ("total", "bytes of the run so far")),
        rows,
        _bars("bytes a visit", ["down", "up"]),
    )


def _memory(runs: Sequence[Recorded]) -> Plot | None:
    rows = []
    for run in runs:
        parts = {"run, both sides": max((number(r.get("peak_memory_bytes")) or 0 for r in run.rounds), default=0)}
        if run.cost is not None:
            parts = {side: number(run.cost.get(f"{side}_memory")) or 0 for side in ("client", "server")}
        rows += [{"run": run.label, "part": p, "value": v, "text": size(v)} for p, v in parts.items() if v]
    if not rows:
        return None
    return Plot(
        "memory",
        "Peak memory",
        "Most bytes resident, less what was resident after the imports. Client and server were measured with a process "
        "each; a run in one process does both sides' work and its evaluations, so its peak is nobody's alone. "
        "Unit: bytes, in powers of ten.",
        "bar",
        (("run", "run"), ("part", "side"), ("value", "bytes")),
        rows,
        _bars("bytes", list(dict.fromkeys(str(row["part"]) for row in rows))),
    )


def _visits(runs: Sequence[Recorded], field: str) -> list[dict[str, Any]]:
    """A row for each visit whose record has a number in that field."""
    return [
        _at(run, record["round"]) | {"client": str(visit.get("name") or visit["id"]), "value": value}
        for run in runs
        for record in run.rounds
        for visit in record["clients"]
        if (value := number(visit.get(field))) is not None
    ]


def _clients(runs: Sequence[Recorded]) -> Plot | None:
    rows = _visits(runs, "loss")
    title = "Loss of each client"
    caption = "Mean training loss of each client's local steps in the rounds in which it took part. Unit: nats a token."
    return _each("clients", title, caption, "loss (nats a token)", rows)


def _own(runs: Sequence[Recorded]) -> Plot | None:
    rows = [
        _at(run, row["round"]) | {"client": str(line["name"]), "value": value}
        for run in runs
        for row in run.evals
        for line in row.get("each") or []
        if (value := number(line.get("loss"))) is not None
    ]
    title = "Loss on each client's own rows"
    caption = "How the common model scores where each client is: the highest line is served worst. Unit: nats a token."
    return _each("own", title, caption, "loss (nats a token)", rows)


def _shares(runs: Sequence[Recorded]) -> Plot | None:
    rows = _visits(runs, "share")
    title = "How much each client counted"
    caption = "The share of a client's reply in what its round made of all replies. Unit: 1, all of it."
    return _each("shares", title, caption, "share of the round", rows)


def _each(name: str, title: str, caption: str, unit: str, rows: list[dict[str, Any]]) -> Plot | None:
    """A curve a client."""
    if not rows:
        return None
    spec = _curve([], unit)
    spec["encoding"] |= {
        "color": {"field": "client", "type": "nominal", "title": "client", "legend": {"symbolLimit": 24}},
        "detail": {"field": "client"},
        "tooltip": [*spec["encoding"]["tooltip"], {"field": "client"}],
    }
    del spec["encoding"]["shape"]
    return Plot(
        name, title, caption, "clients", (("run", "run"), ("client", "client"), *_columns(unit)[1:]), rows, spec
    )


def _at(run: Recorded, at: int) -> dict[str, Any]:
    sent, seconds = run.after.get(at) or run.after[max(run.after)]
    return {"run": run.label, "group": run.group, "round": at, "bytes": sent, "seconds": round(seconds, 3)}


def _columns(value: str) -> tuple[tuple[str, str], ...]:
    heads = (("run", "run"), ("round", "round"), ("bytes", "bytes so far, both ways"), ("seconds", "seconds so far"))
    return (*heads, ("value", value))


def _curve(groups: Sequence[str], title: str) -> dict[str, Any]:
    named = {"field": "group", "type": "nominal", "title": None, "sort": list(groups)}
    scale = {"scale": {"zero": False}, "axis": {"format": "~r"}}  # of one value alone Vega would print a whole number
    return {
        "mark": {"type": "line", "point": {"filled": True, "size": 46}, "strokeWidth": 2},
        "encoding": {
            "x": {"field": "round", "type": "quantitative", "title": "round"},
            "y": {"field": "value", "type": "quantitative", "title": title} | scale,
            "color": {**named, "scale": {"domain": list(groups)}},
            "shape": {**named, "scale": _shapes(groups)},
            "detail": {"field": "run"},
            "tooltip": [
                {"field": "run"},
                {"field": "round"},
                {"field": "bytes", "format": ","},
                {"field": "seconds"},
                {"field": "value", "format": ".5"},
            ],
        },
    }


def _shapes(groups: Sequence[str]) -> dict[str, Any]:
    """Of each group; where the page's eight colours come again, each has another shape."""
    return {"domain": list(groups), "range": [SHAPES[(i + i // 8) % 8] for i in range(len(groups))]}


def _bars(title: str, parts: Sequence[str]) -> dict[str, Any]:
    place = {
        "y": {"field": "run", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 150}},
        "yOffset": {"field": "part", "sort": list(parts)},
        "x": {"field": "value", "type": "quantitative", "title": title},
    }
    color = {"field": "part", "type": "nominal", "title": None, "scale": {"domain": list(parts)}}
    tooltip = [{"field": "run"}, {"field": "part"}, {"field": "value", "format": ",.0f"}]
    return {
        "layer": [
            {"mark": {"type": "bar"}, "encoding": {"color": color, "tooltip": tooltip}},
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 11},
                "encoding": {"text": {"field": "text", "type": "nominal"}},
            },
        ],
        "encoding": place,
    }
