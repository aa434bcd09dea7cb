"""The picture of a partition, as the file holds it."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree as Tree

import pytest

from thinwire.data.errors import DataError
from thinwire.data.partition_plot import check, draw
from thinwire.data.statistics import Description, Lengths


def client(name: str, labels: dict[str, int]) -> Description:
    return Description(name, sum(labels.values()) or 7, 0, 0, Lengths(10.0, 20.0, 30, 2.0), labels)


def bars(path: Path) -> list[str]:
    """The fill of each bar of an SVG file, in order."""
    fills = [path.get("style", "") for path in Tree.parse(path).iter("{http://www.w3.org/2000/svg}path")]
    return [fill.split("fill: ")[1].split(";")[0] for fill in fills if "clip" not in fill and "fill: #" in fill]


def test_a_bar_for_each_client_and_label(tmp_path: Path) -> None:
    clients = [client("a", {"x": 3, "y": 1}), client("$b$", {"y": 2}), client("c", {"x": 1})]
    path = tmp_path / "part.svg"
    draw(clients, "title", 64, path)
    text = path.read_text()
    assert [text.count(f"<!-- {word} -->") for word in ("title", "a", "x", "rows", "data.max_length")] == [1] * 5
    drawn = bars(path)
    assert drawn.count("#4269d0") >= 3  # a bar of each client, though one has no such row
    assert drawn.count("#efb118") >= 3
    again = tmp_path / "again.svg"
    draw(clients, "title", 64, again)
    assert again.read_bytes() == path.read_bytes()


def test_many_labels_and_many_clients(tmp_path: Path) -> None:
    labels = {f"label {i}": 20 - i for i in range(12)}
    draw([client("a", labels), client("b", labels)], "t", 64, tmp_path / "labels.svg")
    text = (tmp_path / "labels.svg").read_text()
    assert "<!-- label 6 -->" in text
    assert "<!-- label 7 -->" not in text
    assert "<!-- 5 others -->" in text
    draw([client(f"client {i}", {}) for i in range(300)], "t", 64, tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")


def test_files_that_cannot_be_drawn_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, problem in (
        (tmp_path / "a.gif", f"--plot: {tmp_path / 'a.gif'} must end in .svg, .png or .pdf"),
        (tmp_path / "no" / "a.svg", f"--plot: {tmp_path / 'no'} is not a folder"),
    ):
        with pytest.raises(DataError) as caught:
            check(path)
        assert str(caught.value) == problem
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match=r"^--plot needs matplotlib: pip install 'thinwire\[plot\]'$"):
        check(tmp_path / "a.svg")
