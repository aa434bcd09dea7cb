"""The page: a report as one HTML file, its data, styles and code inside; it asks no network for anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib import resources
from typing import Any

import jinja2

from thinwire.data.errors import DataError
from thinwire.data.shown import printable
from thinwire.records import MEASURED, SELECTION
from thinwire.report.plots import SPLITS, plots
from thinwire.report.runs import Recorded, number
from thinwire.report.sites import Matrix, clients_of
from thinwire.units import size

PARTS = {"kind", "columns", "rows", "spec", "title"}  # of a plot, that the page's code needs


def render(runs: Sequence[Recorded], live: Sequence[str] | None = None, mark: str = "") -> str:
    """The report of these runs as HTML. DataError: the plotting library is not installed.

    `live`: lines of where a run stands, on a page that is served and follows it: it asks `state` for them, and takes
    itself anew when the `mark` there is another one.
    """
    found = plots(runs)
    data = {
        "runs": [run.label for run in runs],
        "plots": {plot.name: {k: v for k, v in asdict(plot).items() if k in PARTS} for plot in found},
    }
    heads, lines = table(runs)
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_printable
    )
    return template.from_string(_part("page.html")).render(
        title=", ".join(dict.fromkeys(run.group for run in runs)),
        about=about(runs),
        heads=heads,
        lines=lines,
        plots=found,
        many=len(runs) > 1,
        curves=any(plot.kind in ("curve", "clients") for plot in found),
        runs=runs,
        answers=answers(runs),
        live=live,
        mark=mark,
        worth=any(run.contributions for run in runs),
        endings=endings(runs),
        clients=[(run.label, each) for run in runs if (each := client_table(run))],
        crossed=[(run.label, cross_table(run.cross)) for run in runs if run.cross],
        dropped=[
            (run.label, record["round"], visit.get("name", visit.get("id")), visit.get("error") or visit["left_out"])
            for run in runs
            for record in run.rounds
            for visit in record["clients"]
            if visit.get("error") or visit.get("left_out")
        ],
        style=_part("page.css"),
        data=_script_safe(json.dumps(_printable(data), allow_nan=False, separators=(",", ":"))),
        library=_library(),
        code=_part("page.js"),
    )


def about(runs: Sequence[Recorded]) -> list[tuple[str, str]]:
    """What the runs share, as (name, value): model, data, rounds and so on, where they agree."""
    found = []
    for name, path in (
        ("Method", ("method", "name")),
        ("Model", ("model", "path")),
        ("Dtype", ("model", "dtype")),
        ("Data", ("data", "path")),
        ("Partition", ("data", "partition")),
        ("Seed", ("seed",)),
        ("thinwire", ("environment", "thinwire")),
        ("torch", ("environment", "torch")),
    ):
        values = {str(_look(run.settings, path)) for run in runs}
        if len(values) == 1 and (value := values.pop()) != "None":
            found.append((name, value))
    return found


def table(runs: Sequence[Recorded]) -> tuple[list[str], list[list[str]]]:
    """The table of the runs: headings, and a line a run; what a run has no record of is a dash."""
    scores = [
        (split, score)
        for split in dict.fromkeys(str(row.get("split")) for run in runs for row in run.evals)
        if split != SELECTION
        for score in MEASURED
        if any(number(row.get(score)) is not None for run in runs for row in run.evals if row.get("split") == split)
    ]
    heads = ["run", "method", "seed", "rounds"]
    for split, score in scores:
        name = f"{SPLITS.get(split, split).lower()} {MEASURED[score].title}"
        heads += [f"{name}, before", f"{name}, after"]
    heads += ["down", "up", "seconds", "peak memory"]
    lines = []
    for run in runs:
        rate = number(_look(run.settings, ("method", "lr")))
        line = [run.label, run.method + (f", lr {rate:g}" if rate is not None else "")]
        line += [str(run.settings.get("seed", 0)), f"{len(run.rounds)} of {run.settings.get('rounds', '?')}"]
        for split, score in scores:
            ends = run.ends(split)
            line += [_three(end.get(score)) for end in ends] if ends else ["-", "-"]
        line += [size(sum(record[f"bytes_{way}"] for record in run.rounds)) for way in ("down", "up")]
        line.append(f"{run.after[max(run.after)][1]:,.1f}")
        peak = max((number(record.get("peak_memory_bytes")) or 0 for record in run.rounds), default=0)
        line.append(size(peak) if peak else "-")
        lines.append(line)
    return heads, lines


def client_table(run: Recorded) -> tuple[list[str], list[list[str]]] | None:
    """A line a client, with its own scores and how much it counted; None where the run has recorded neither."""
    found = clients_of(run.rounds, run.evals, run.contributions)
    if not any(client.share is not None or client.first or client.withheld for client in found):
        return None
    scores = [name for name in MEASURED if any(number(client.last.get(name)) is not None for client in found)]
    worth = any(client.worth for client in found)
    heads = ["client", "rows", "rounds counted", "share"]
    heads += [f"own {MEASURED[name].title}, {when}" for name in scores for when in ("before", "after")]
    heads += [*(["leave-one-out", "Shapley value"] if worth else []), "why this share, in its last round"]
    lines = []
    for client in found:
        counted = f"{client.counted}" + (f", {client.dropped} dropped" if client.dropped else "")
        share = "-" if client.share is None else f"{client.share:.1%}"
        line = [client.name, "-" if client.rows is None else f"{client.rows:,}", counted, share]
        for name in scores:
            ends = [_three(end.get(name)) for end in (client.first, client.last)]
            line += ["withheld"] * 2 if client.withheld else ends
        if worth:
            alone, value, error = (number(client.worth.get(name)) for name in ("leave_one_out", "shapley", "error"))
            line += ["-" if alone is None else f"{alone:+.4f}"]
            line += ["-" if value is None else f"{value:+.4f}" + (f" ± {error:.4f}" if error else "")]
        lines.append([*line, client.why or "-"])
    return heads, lines


def cross_table(cross: Matrix) -> tuple[list[str], list[list[str]]]:
    """The losses of what each client alone has learnt, and all have together, on each one's rows."""
    return ["learnt by", *cross.rows], [[line.name, *map(_three, line.losses)] for line in cross.lines]


def endings(runs: Sequence[Recorded]) -> list[str]:
    """Why runs have ended before their last round, and which round's weights they have kept."""
    found = []
    for run in runs:
        if (why := (run.summary or {}).get("ended")) is not None:
            found.append(f"{run.label} ended after round {len(run.rounds)}: {why}.")
        if isinstance(kept := (run.summary or {}).get("kept"), dict):
            found.append(
                f"{run.label} has the weights of round {kept.get('round')}, chosen by the loss on {kept.get('on')}."
            )
    return found


def answers(runs: Sequence[Recorded]) -> list[dict[str, Any]]:
    """Prompts with each run's answers before and after; rows of clients only of runs whose file allows it."""
    found: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for run in runs:
        allowed = _look(run.settings, ("eval", "show_rows")) is True
        for split in dict.fromkeys(str(row.get("split")) for row in run.evals):
            ends = run.ends(split)
            assert ends is not None
            for key, kind in (("public", "public prompt"), *((("samples", f"{split} row"),) if allowed else ())):
                for before, after in zip(ends[0].get(key) or [], ends[1].get(key) or [], strict=False):
                    about = (kind, before["prompt"], before.get("expected", ""))
                    found.setdefault(about, []).append((run.label, before["answer"], after["answer"]))
    return [{"kind": k, "prompt": p, "expected": e, "given": given} for (k, p, e), given in found.items()]


def _three(value: Any) -> str:
    found = number(value)
    return "-" if found is None else f"{found:.3f}"


def _look(tree: Any, path: Sequence[str]) -> Any:
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _printable(value: Any) -> Any:
    """The value, control characters escaped in its texts; the page's own parts are Markup, and left alone."""
    if isinstance(value, dict):
        return {_printable(name): _printable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(inner) for inner in value]
    return printable(value) if type(value) is str else value


def _script_safe(text: str) -> str:
    """JSON that may stand within a script element: no text of a run can end it."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def require_library() -> None:
    """DataError with what to install, without the plotting library."""
    _library()


@lru_cache
def _library() -> str:
    try:
        import vl_convert
    except ImportError:
        raise DataError("a report needs the plotting library: pip install 'thinwire[report]'") from None
    code: str = vl_convert.javascript_bundle()  # type: ignore[call-arg] # its stub lacks the default
    return code.replace("</script", "<\\/script")


def _part(name: str) -> str:
    return resources.files("thinwire.report").joinpath(name).read_text(encoding="utf-8")
