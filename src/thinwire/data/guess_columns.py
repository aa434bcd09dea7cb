"""A guess at how a user's columns become prompts and answers, for people to correct."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thinwire.data.errors import DataError
from thinwire.data.pairs import TEXTS
from thinwire.data.preference import SIDES
from thinwire.data.rows import Row

# What people call columns, the likeliest first.
ANSWERS = (
    "answer", "output", "completion", "response", "reply", "target", "label", "labels", "class", "category",
    "sentiment", "intent", "topic", "summary", "translation", "result", "diagnosis", "verdict",
)  # fmt: skip
PROMPTS = (
    "question", "prompt", "input", "instruction", "text", "message", "sentence", "query", "context", "document",
    "review", "body", "title", "subject", "description", "abstract", "article", "note", "comment", "content",
)  # fmt: skip
CLIENTS = (
    "client", "silo", "site", "hospital", "ward", "clinic", "bank", "branch", "office", "plant", "store", "shop",
    "region", "country", "city", "location", "department", "source", "user", "customer", "device", "organisation",
    "organization", "tenant",
)  # fmt: skip
ASIDE = ("id", "uuid", "index", "date", "time", "timestamp", "created", "updated", "url")
LABELS = 20  # the most answers of a closed set
CLOSED = 40  # the most characters of one
MOST_CLIENTS = 100
LENGTHS = (32, 64, 128, 256, 512, 1024)  # tokens


@dataclass(frozen=True)
class Proposal:
    """`template` by name, or `prompt` and `answer`. `client`: the column that names clients, None where none does.

    `preferences`: an answer of a row was chosen, and another was rejected. `pairs`: two texts of a row belong together.
    """

    template: str | None
    prompt: str | None
    answer: str | None
    choices: tuple[str, ...] | None
    client: str | None
    max_length: int
    columns: tuple[str, ...]
    preferences: bool = False
    pairs: bool = False


def propose(rows: Sequence[Row]) -> Proposal:
    """How the rows may be read; DataError where no two columns of texts stand in them all."""
    columns = tuple(rows[0].fields)
    named = _template([name for name in columns if any(row.has(name) for row in rows)])
    texts = [name for name in columns if _is_text(rows, name)]
    client = _first(texts, CLIENTS, lambda name: 2 <= _distinct(rows, name) <= min(MOST_CLIENTS, len(rows) // 2))
    if {*TEXTS[:2]} <= {*columns}:
        longest = max(_max_length(rows, [name]) for name in TEXTS if name in columns)
        return Proposal(None, None, None, None, client, longest, columns, pairs=True)
    if named is not None:
        known = ("instruction", "input", "output", "prompt", "completion", "messages", *SIDES)
        longest = _max_length(rows, [name for name in known if name in columns])
        return Proposal(named, None, None, None, client, longest, columns, {*SIDES} <= {*columns})

    usable = [name for name in texts if re.fullmatch(r"[^.\[\]{}!:]*[^\d.\[\]{}!:\s][^.\[\]{}!:]*", name)]
    answer = _first(usable, ANSWERS, lambda name: True)
    rest = [name for name in usable if name not in (answer, client)]
    if answer is None:
        labels = [name for name in rest if _choices(rows, name) is not None]
        answer = next(reversed(labels or rest), None)
        rest = [name for name in rest if name != answer]
    asked = [name for name in rest if _words(name) & {*PROMPTS}]
    asked = asked or [name for name in rest if not _is_aside(rows, name)] or rest
    if answer is None or not asked:
        raise DataError(
            f"{rows[0].source}: no prompt and answer can be found among the columns ({', '.join(columns)}); "
            "write data.prompt and data.answer yourself"
        )
    prompt = "".join(f"{name}: {{{name}}}\n" for name in asked) + f"{answer}:"
    choices = _choices(rows, answer)
    return Proposal(None, prompt, f" {{{answer}}}", choices, client, _max_length(rows, [*asked, answer]), columns)


def _template(columns: Sequence[str]) -> str | None:
    if "messages" in columns or {"instruction", "output"} <= {*columns} or {*SIDES} <= {*columns}:
        return "chat"
    return "completion" if {"prompt", "completion"} <= {*columns} else None


def _first(columns: Sequence[str], names: Sequence[str], fits: Callable[[str], bool]) -> str | None:
    """The column that is called as the first of these names that any fitting column is called."""
    found = [column for name in names for column in columns if name in _words(column) and fits(column)]
    return found[0] if found else None


def _words(column: str) -> set[str]:
    """The words of a column's name: of branchOffice and branch_office, branch and office."""
    return {word.lower() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+", column)}


def _is_text(rows: Sequence[Row], column: str) -> bool:
    values = [row.fields.get(column) for row in rows]
    return any(value is not None for value in values) and all(isinstance(v, str | int | float | None) for v in values)


def _texts(rows: Sequence[Row], column: str) -> list[str]:
    return [str(value).strip() for row in rows if (value := row.fields.get(column)) is not None]


def _distinct(rows: Sequence[Row], column: str) -> int:
    return len({*_texts(rows, column)})


def _choices(rows: Sequence[Row], column: str) -> tuple[str, ...] | None:
    """The closed set of answers that the column holds, the commonest first; None where it holds none."""
    counts = Counter(str(row.fields.get(column)) for row in rows)
    few = 2 <= len(counts) <= min(LABELS, len(rows) // 4) and min(counts.values()) >= 3
    short = all(text.strip() and text != "None" and len(text) <= CLOSED and "\n" not in text for text in counts)
    return tuple(sorted(counts, key=lambda text: (-counts[text], text))) if few and short else None


def _is_aside(rows: Sequence[Row], column: str) -> bool:
    """Whether the column is a number, a date or a mark of the row, and carries no meaning."""
    texts = _texts(rows, column)
    marks = len({*texts}) == len(texts) and not any(" " in text for text in texts)
    return bool(_words(column) & {*ASIDE}) or marks


def _max_length(rows: Sequence[Row], columns: Sequence[str]) -> int:
    """Tokens that should do for every row: a token is rarely shorter than three characters on average."""
    longest = max(sum(len(str(row.fields.get(name, ""))) + len(name) + 2 for name in columns) for row in rows)
    return next((length for length in LENGTHS if longest / 3 + 8 <= length), LENGTHS[-1])
