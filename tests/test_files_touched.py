"""The table of the files that each method touches is the tree's, and none lacks what each must have."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "docs"))

import files_touched

from thinwire.methods import METHODS


def test_the_table_is_current() -> None:
    page = files_touched.PAGE.read_text()
    assert files_touched.BEGIN in page
    assert files_touched.written(page) == page, "python docs/files_touched.py makes it anew"


def test_each_method_has_its_line_and_no_cell_but_the_last_is_empty() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in files_touched.table().splitlines()[2:]]
    assert [cells[0] for cells in lines] == sorted(METHODS)
    assert [cells[0] for cells in lines if not all(cells[:-1])] == []
