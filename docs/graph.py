"""Draw docs/architecture.svg, who imports whom, from the code itself: python docs/graph.py

Floors are those of tests/test_imports.py, the lowest at the bottom; an arrow goes from a part to one that it imports,
and is left out where others lead there already. A part's title (what a browser shows of it) has all of its imports.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import networkx

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

from test_imports import FLOORS, parts  # noqa: E402

DRAWING = ROOT / "docs" / "architecture.svg"
FLOOR, BOX, GAP, EDGE = 78, 30, 26, 10  # heights of a floor and of a box, room between boxes, width of a passing arrow
DOWN, UP = "#7a8599", "#c0392b"
Node = str | tuple[str, str, int]  # a part, or where an arrow between two of them passes a floor
Order = list[list[Node]]


def arrows() -> tuple[networkx.DiGraph, list[tuple[str, str]]]:
    """The imports that no others imply, and those that go upwards."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    upwards = sorted((a, b) for a, b in parts() if floor[b] >= floor[a])
    graph = networkx.DiGraph(sorted(set(parts()) - set(upwards)))
    graph.add_nodes_from(sorted(floor))
    return networkx.transitive_reduction(graph), upwards


def chains(graph: networkx.DiGraph) -> list[list[Node]]:
    """Each arrow as the places that it passes, a floor each, from the part above to the part below."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    return [[a, *((a, b, i) for i in range(floor[a] - 1, floor[b], -1)), b] for a, b in sorted(graph.edges)]


def crossings(order: Order, links: set[tuple[Node, Node]]) -> int:
    """How many arrows cross between neighbouring floors."""
    at = {node: i for layer in order for i, node in enumerate(layer)}
    layer_of = {node: i for i, layer in enumerate(order) for node in layer}
    pairs = sorted((layer_of[b], at[a], at[b]) for a, b in links)
    return sum(f == g and (a - c) * (b - d) < 0 for (f, a, b), (g, c, d) in itertools.combinations(pairs, 2))


def arranged(paths: list[list[Node]]) -> tuple[Order, dict[Node, list[Node]]]:
    """The floors from left to right, each node near the middle of its neighbours; and the neighbours."""
    links = {link for path in paths for link in itertools.pairwise(path)}
    near: dict[Node, list[Node]] = {}
    for a, b in sorted(links, key=str):
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    order: Order = [sorted(names) for names in FLOORS]
    for path in paths:
        for node in path[1:-1]:
            order[node[2]].append(node)  # type: ignore[index,arg-type]
    best = [list(layer) for layer in order]
    for sweep in range(40):
        floors = range(len(order)) if sweep % 2 else range(len(order) - 1, -1, -1)
        for i in floors:
            beside = order[i - 1] if sweep % 2 and i else order[i + 1] if not sweep % 2 and i + 1 < len(order) else []
            at = {node: k / max(len(beside) - 1, 1) for k, node in enumerate(beside)}
            now = {node: k / max(len(order[i]) - 1, 1) for k, node in enumerate(order[i])}
            means = {node: [at[other] for other in near.get(node, []) if other in at] or [now[node]] for node in now}
            order[i].sort(key=lambda node: sum(means[node]) / len(means[node]))
        if crossings(order, links) < crossings(best, links):
            best = [list(layer) for layer in order]
    return best, near


def width(node: Node) -> float:
    return 26 + 7.6 * len(node) if isinstance(node, str) else EDGE


def placed(order: Order, near: dict[Node, list[Node]]) -> dict[Node, float]:
    """The middle of each node from the left, no two nearer than they are wide."""
    x: dict[Node, float] = {}
    for layer in order:
        for k, node in enumerate(layer):
            x[node] = 90.0 * (k - (len(layer) - 1) / 2)
    for _ in range(200):
        for layer in order:
            for node in layer:
                beside = near.get(node, [])
                x[node] += 0.5 * (sum(x[other] for other in beside) / len(beside) - x[node]) if beside else 0.0
            for _ in range(len(layer)):
                for a, b in itertools.pairwise(layer):
                    short = (width(a) + width(b)) / 2 + GAP - (x[b] - x[a])
                    if short > 0:
                        x[a], x[b] = x[a] - short / 2, x[b] + short / 2
    for layer in order:  # what is still too near moves to the right
        for a, b in itertools.pairwise(layer):
            x[b] = max(x[b], x[a] + (width(a) + width(b)) / 2 + GAP)
    left = min(x[node] - width(node) / 2 for node in x)
    return {node: middle - left + GAP for node, middle in x.items()}


def drawing() -> str:
    """The picture as SVG text; the same text for the same imports."""
    graph, upwards = arrows()
    order, near = arranged(paths := chains(graph))
    x = placed(order, near)
    floor_of = {node: i for i, layer in enumerate(order) for node in layer}
    wide = max(x[node] + width(node) / 2 for node in x) + GAP
    tall = FLOOR * len(order)
    top = {node: tall - FLOOR * (i + 1) + (FLOOR - BOX) / 2 for node, i in floor_of.items()}
    imported = {a: ", ".join(sorted(c for b, c in parts() if b == a)) or "nothing of ours" for a in floor_of}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {tall}" width="{wide:.0f}" height="{tall}" '
        'font-family="sans-serif" font-size="14" role="img" aria-label="who imports whom">',
        "<defs>",
        *(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
            for name, colour in (("down", DOWN), ("up", UP))
        ),
        "</defs>",
        f'<rect width="{wide:.0f}" height="{tall}" fill="#ffffff"/>',
    ]
    lines += [
        f'<rect y="{tall - FLOOR * (i + 1)}" width="{wide:.0f}" height="{FLOOR}" fill="#f2f4f7"/>'
        for i in range(0, len(order), 2)
    ]
    for path in paths:
        d = f"M{x[path[0]]:.0f},{top[path[0]] + BOX:.0f}"
        for a, b in itertools.pairwise(path):
            start = top[a] + BOX  # a passing arrow is as tall as a box, and straight there
            d += f" V{start:.0f}" if a != path[0] else ""
            half = (start + top[b]) / 2
            d += f" C{x[a]:.0f},{half:.0f} {x[b]:.0f},{half:.0f} {x[b]:.0f},{top[b]:.0f}"
        lines.append(f'<path d="{d}" fill="none" stroke="{DOWN}" stroke-width="1.3" marker-end="url(#down)"/>')
    for a, b in upwards:
        side = 6 if x[a] < x[b] else -6  # two that import one another do not share a line
        bend = (side * 6, 0) if top[b] < top[a] else (0, -30 - side)
        d = f"M{x[a] + side:.0f},{top[a]:.0f} Q{(x[a] + x[b]) / 2 + bend[0]:.0f},{(top[a] + top[b]) / 2 + bend[1]:.0f} "
        d += f"{x[b] - side:.0f},{top[b] + BOX if top[b] < top[a] else top[b]:.0f}"
        lines.append(
            f'<path d="{d}" fill="none" stroke="{UP}" stroke-dasharray="5 4" marker-end="url(#up)">'
            f"<title>{a} imports {b}, upwards</title></path>"
        )
    lines += [
        f'<g><title>{node} imports {imported[node]}</title><rect x="{x[node] - width(node) / 2:.0f}" '
        f'y="{top[node]:.0f}" width="{width(node):.0f}" height="{BOX}" rx="6" fill="#ffffff" stroke="#2f3b52"/>'
        f'<text x="{x[node]:.0f}" y="{top[node] + 20:.0f}" text-anchor="middle" fill="#1b2437">{node}</text></g>'
        for node in itertools.chain.from_iterable(order)
        if isinstance(node, str)
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    DRAWING.write_text(drawing())
