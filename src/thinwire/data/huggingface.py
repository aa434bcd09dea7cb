"""Rows from Hugging Face data sets: by their name on the hub, or a folder that `save_to_disk` wrote.

A data set is written NAME, NAME@SPLIT, NAME:SUBSET or NAME:SUBSET@SPLIT, such as nyu-mll/glue:sst2@validation; a saved
folder FOLDER or FOLDER@SPLIT. The split is train where none is named. A column of class labels holds their names. No
code of a data set is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinwire.data.errors import DataError
from thinwire.data.rows import Row, present

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT = "train"
BATCH = 1000
SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves
NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:(?P<subset>[\w.-]+))?(@(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Place:
    """Where a data set is: a folder, or a name on the hub, with its subset; and the split, None where none is named."""

    name: str
    subset: str | None
    split: str | None
    saved: bool


def place_of(source: str) -> Place | None:
    """What `source` names, or None where it can be neither a saved folder nor a name on the hub."""
    folder, _, split = source.rpartition("@")
    for path, part in ((source, None), (folder, split)):
        if path and any((Path(path) / file).is_file() for file in SAVED):
            return Place(path, None, part, saved=True)
    match = NAME.fullmatch(source)
    if match is None or Path(source).exists():
        return None
    return Place(match["name"], match["subset"], match["split"], saved=False)


def read_hub(source: str) -> list[Row]:
    """The rows of a data set, `line` their number from 1; DataError where it cannot be loaded or holds no row."""
    place = place_of(source)
    if place is None:
        raise DataError(f"{source}: is neither a saved data set nor the name of one")
    found = _load(place, source)
    labels = {column: feature for column, feature in found.features.items() if type(feature).__name__ == "ClassLabel"}
    rows: list[Row] = []
    for batch in found.with_format("arrow").iter(BATCH):  # pictures and sounds are not decoded so
        for fields in batch.to_pylist():
            for column, feature in labels.items():
                index = fields[column]
                # hidden labels of test splits are -1
                fields[column] = feature.int2str(index) if index is not None and index >= 0 else None
            rows.append(Row(present(fields), source, len(rows) + 1))
    if not rows:
        raise DataError(f"{source}: the data set holds no row")
    return rows


def _load(place: Place, source: str) -> Dataset:
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if place.saved:
            found: Any = datasets.load_from_disk(place.name)
        else:
            found = datasets.load_dataset(place.name, place.subset)
    except Exception as error:  # the library raises what its many readers and the network raise
        problem = (str(error) or type(error).__name__).splitlines()[0]
        what = "cannot be read" if place.saved else "is no file or folder here, and no data set that can be loaded"
        parts = sorted(Path(place.name).glob("*.arrow")) if place.saved else []
        hint = f"; a file of it can be read by itself, such as {parts[0]}" if parts else ""
        raise DataError(f"{source}: {what} ({problem}){hint}") from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    if isinstance(found, datasets.DatasetDict):
        if (split := place.split or SPLIT) not in found:
            raise DataError(f"{source}: there is no split {split!r}; there are: {', '.join(found)} (write NAME@SPLIT)")
        return found[split]
    if place.split is not None:
        raise DataError(f"{source}: {place.name} has no splits")
    return found
