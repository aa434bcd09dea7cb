"""What others wrote, as it is printed."""

from __future__ import annotations

import json
import sys
import unicodedata

from thinwire.data.shown import printable, printable_json

SHOWN = "\n\t"


def test_every_control_character_is_escaped_and_nothing_else() -> None:
    for code in (*range(0x3000), *range(0xD700, 0xE100), 0x1F600, sys.maxunicode):
        text = chr(code)
        turns = unicodedata.bidirectional(text) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        control = unicodedata.category(text) in ("Cc", "Cs", "Zl", "Zp") or turns or code in (0x61C, 0x200E, 0x200F)
        shown = printable(text)
        assert (shown != text) == (control and text not in SHOWN), hex(code)
        assert shown.isprintable() or not control or text in SHOWN, hex(code)


def test_the_escape_names_what_stood_there() -> None:
    text = "\x1b[2J\x07 \u202eevil\u2066 \x9b1m \r\ud83d é 😀\n"
    assert printable(text) == "\\x1b[2J\\x07 \\u202eevil\\u2066 \\x9b1m \\r\\ud83d é 😀\n"
    assert printable(printable(text)) == printable(text)


def test_json_stays_json() -> None:
    value = {"a\x1b": ["\x7f\x9b\u202e\r\n", "é"]}
    for ascii in (True, False):
        shown = printable_json(value, ascii)
        assert json.loads(shown) == value
        assert printable(shown) == shown
    assert "é" in printable_json(value, ascii=False)
