"""A picture of a partition: the rows of each client by label, and how long they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from thinwire.data.errors import DataError
from thinwire.data.statistics import Description

KINDS = (".svg", ".png", ".pdf")
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
OTHERS = "#9c9c9c"
NAMED = 40  # clients whose names fit beside their bars


def draw(clients: Sequence[Description], title: str, max_length: int, path: Path) -> None:
    """Draw the clients into a file; DataError where matplotlib is missing or the file's ending is none of KINDS.

    The commonest labels have colours of their own, the others one for all of them.
    """
    check(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "thinwire"  # the same picture is the same file
    named = len(clients) <= NAMED
    height = 1.6 + (0.28 * len(clients) if named else 0.06 * min(len(clients), 120))
    figure = Figure(figsize=(9, max(height, 2.6)), layout="constrained")
    rows, lengths = figure.subplots(1, 2, sharey=True, width_ratios=[5, 4])
    places = range(len(clients))

    totals = sum((Counter(client.labels) for client in clients), Counter[str]())
    common = sorted(totals, key=lambda label: (-totals[label], label))
    shown = common if len(common) <= len(COLOURS) else common[: len(COLOURS) - 1]
    colours = dict(zip(shown, COLOURS, strict=False))
    parts = [(_short(label), colours[label], [c.labels.get(label, 0) for c in clients]) for label in shown]
    if len(shown) < len(common):
        rest = [sum(n for label, n in c.labels.items() if label not in colours) for c in clients]
        parts.append((f"{len(common) - len(shown)} others", OTHERS, rest))
    if not parts:
        parts = [("", COLOURS[0], [c.rows for c in clients])]
    left = [0] * len(clients)
    for label, colour, counts in parts:
        rows.barh(places, counts, left=left, color=colour, height=0.8 if named else 1.0, label=label)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    rows.set_xlabel("rows")
    rows.set_ylim(len(clients) - 0.5, -0.5)  # the first client on top
    if named:
        rows.set_yticks(places, [_short(client.name) for client in clients])
    else:
        rows.set_ylabel(f"{len(clients)} clients")
        rows.set_yticks([])
    if len(parts) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(parts), 5), frameon=False, fontsize="small")

    size = 26 if named else 6
    lengths.hlines(places, [c.tokens.median for c in clients], [c.tokens.max for c in clients], color="#c4c4c4")
    lengths.scatter([c.tokens.median for c in clients], places, s=size, color=COLOURS[0], label="median", zorder=3)
    p95 = [c.tokens.p95 for c in clients]
    lengths.scatter(p95, places, s=size, color=COLOURS[1], marker="s", label="95 %", zorder=3)
    lengths.scatter([c.tokens.max for c in clients], places, s=4 * size, color=COLOURS[2], marker="|", label="longest")
    lengths.axvline(max_length, color="#6e6e6e", linestyle=":", linewidth=1, label="data.max_length")
    lengths.set_xlim(left=0)
    lengths.set_xlabel("tokens an example")
    lengths.tick_params(left=False)
    lengths.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize="small", borderpad=0,
                   handletextpad=0.3, columnspacing=1)  # fmt: skip
    rows.set_title(title, loc="left", fontsize="medium")
    for axes in (rows, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def check(path: Path) -> None:
    """DataError where no picture can be drawn into this file: asked before the work is done."""
    if path.suffix.lower() not in KINDS:
        raise DataError(f"--plot: {path} must end in {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if not path.parent.is_dir():
        raise DataError(f"--plot: {path.parent} is not a folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise DataError("--plot needs matplotlib: pip install 'thinwire[plot]'") from None


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("$", r"\$")  # matplotlib reads formulas between dollars
    return text if len(text) <= 24 else text[:21] + "..."
