"""Others' text as it may be shown: rows, answers and names of clients hold what moves a cursor or hides a line."""

from __future__ import annotations

import json
import re
from typing import Any

# Unicode's category Cc but for tab and newline, its Bidi_Control, the two separators of lines, and surrogates alone.
HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with each control character as its visible escape, such as \\x1b; newlines and tabs stay."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_json(value: Any, ascii: bool = True, indent: int | None = 2) -> str:
    """The value as JSON for people, indented, in ASCII or not; control characters are JSON's own escapes."""
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, indent=indent, ensure_ascii=ascii))
