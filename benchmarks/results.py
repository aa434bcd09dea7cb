"""The tables of docs/results.md from the folders of comparisons: python benchmarks/results.py NAME=FOLDER ...

NAME is that of a pair of marks in the page, `<!-- NAME -->` and `<!-- /NAME -->`; what is between them is made anew:
scores, and where there are any costs, tuned rates, and a picture of the held-out loss against bytes
(docs/results-NAME.svg). The rest is written by hand.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
COLOURS = [f"C{i}" for i in range(10)]
STROKES, MARKS = ("-", "--", ":", "-."), "os^D"  # where colours come again


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    return next((f"{count / unit:.1f} {name}" for unit, name in UNITS if count >= 0.9995 * unit), f"{count:.0f} B")


def seconds(count: float) -> str:
    """Seconds for people."""
    return f"{count:.0f} s" if count >= 9.95 else f"{count:.2f} s"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def known(form: Callable[[float], str], value: float | None) -> str:
    """The value in its form, a dash where there is none."""
    return "-" if value is None else form(value)


def spread(score: Sequence[float | None] | None) -> str:
    """Mean and standard deviation."""
    if score is None or score[0] is None:
        return "-"
    return f"{score[0]:.3f}" if score[1] is None else f"{score[0]:.3f} ± {score[1]:.3f}"


def tables(found: Mapping[str, Any], name: str) -> str:
    """All that stands between the marks."""
    lines = found["lines"]
    keys = list(dict.fromkeys(key for line in lines for key in line["scores"]))
    scores, costs = [], []
    for line in lines:
        mark = " (untrained)" if line["trained"] is False else ""
        lr = known(lambda value: f"{value:g}", line["lr"]) + (" (edge)" if line["edge"] else "")
        target = known(lambda value: f"{value:.1f}", line["target_round"])
        target += "" if line["target_bytes"] is None else f", {size(line['target_bytes'])}"
        cells = [spread(line["scores"].get(key)) for key in keys]
        counts = [str(line["seeds"]), known("{:.0f}".format, line["rounds"]), known("{:.0f}".format, line["steps"])]
        scores.append([line["name"] + mark, *cells, lr, *counts, target])
        if line["client_memory"] is not None and "shuffled" not in line["name"]:
            sizes = ("bytes_visit", "bytes_down", "bytes_up", "client_memory", "server_memory")
            times = ("visit_seconds", "round_seconds")
            costs.append(
                [
                    line["name"],
                    *(known(size, line[key]) for key in sizes),
                    *(known(seconds, line[key]) for key in times),
                ]
            )
    heads = ["method", *keys, "lr", "seeds", "rounds", "client steps", "target reached (rounds, bytes)"]
    heads_of_costs = ["method", "bytes of a visit", "all down", "all up", "client's memory", "server's memory"]
    heads_of_costs += ["a visit", "the server, a round of two"]
    rates = []
    for method, losses in found["grids"].items():
        best = min((loss for loss in losses.values() if loss is not None), default=math.nan)
        cells = [f"{lr}: {known('{:.4f}'.format, loss)}{' ←' if loss == best else ''}" for lr, loss in losses.items()]
        rates.append([method, *cells])
    width = max(map(len, rates), default=1)
    grid = table(["method", *["lr: validation loss"] * (width - 1)], [row + [""] * (width - len(row)) for row in rates])
    picture = f"![Held-out loss against bytes sent in all, both ways](results-{name}.svg)"
    parts = [table(heads, scores), table(heads_of_costs, costs) if costs else "", grid if rates else ""]
    return "\n\n".join(filter(None, [*parts, picture if curved(found) else ""]))


def curved(found: Mapping[str, Any]) -> bool:
    """Whether there is a curve to be drawn: runs that were scored on the way."""
    return any(len(line["curve"]) > 2 for line in found["lines"])


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Held-out loss against bytes, one curve a method; a method through which nothing travels is a level line.

    Where colours come again, curves have other strokes and marks. What has diverged is out of sight: the table has it.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "thinwire"  # the same bytes for the same table
    from matplotlib import pyplot as plt

    levels, curves = dict[str, float](), dict[str, list[tuple[float, float]]]()
    for line in found["lines"]:
        curve = [(sent, loss) for _, sent, loss in line["curve"] if loss is not None]
        if line["name"] == "base" or (curve and line["bytes_down"] is None and "shuffled" not in line["name"]):
            levels[line["name"]] = line["scores"]["heldout loss"][0]
        elif len(curve) > 1 and "shuffled" not in line["name"]:
            curves[line["name"]] = curve[1:]
    rows = math.ceil(len(curves) / 5)  # of names, below
    figure, axes = plt.subplots(figsize=(8, 4 + 0.4 * rows), layout="constrained")
    for i, (name, level) in enumerate(sorted(levels.items(), key=lambda item: item[1])):
        axes.axhline(level, color="0.6", linewidth=1, linestyle="--")
        left = 0.01 + 0.2 * (i % 5)  # side by side, or names of levels that are near would lie on one another
        axes.annotate(name, (left, level), xycoords=("axes fraction", "data"), ha="left", va="bottom")
    for i, (name, points) in enumerate(curves.items()):
        again = i // len(COLOURS) % len(STROKES)
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STROKES[again], "marker": MARKS[again]}
        axes.plot(*zip(*points, strict=True), markersize=4, label=name, **style)
    axes.set(xscale="log", xlabel="bytes in all, both ways", ylabel="held-out loss, mean over seeds")
    losses = [*levels.values(), *(loss for points in curves.values() for _, loss in points)]
    low, high = min(losses), min(max(losses), 1.25 * levels.get("base", math.inf))
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    figure.legend(frameon=False, loc="outside lower center", ncols=5, fontsize="small", handlelength=3.2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str]) -> None:
    """Fill the page in."""
    page = PAGE.read_text()
    for argument in arguments:
        name, _, folder = argument.partition("=")
        found = json.loads((Path(folder) / "table.json").read_text())
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not begin or not end:
            sys.exit(f"{PAGE} has no marks for {name}")
        page = f"{before}{begin}\n{tables(found, name)}\n\n{end}{after}"
        if curved(found):
            draw(found, PAGE.with_name(f"results-{name}.svg"))
    PAGE.write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
