"""A file is whole, old or new, whatever happens while it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from thinwire import files


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    for content in ("one", b"two", "drei ü"):
        files.write(place, content)
        assert place.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_old_file_stays_where_writing_fails(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    files.write(place, "old")

    def failing() -> None:
        with files.whole(place) as partial:
            partial.write_text("ne")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        failing()
    assert place.read_text() == "old"
