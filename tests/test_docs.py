"""What README and docs have people type is typed here, in short forms, on a tiny model.

A fenced block after `<!-- file: NAME -->` is written to that file before; one after `<!-- not run: WHY -->` is left
alone. Commands of ours are run in the order of the page, with fields that make them short; make targets, benchmarks
and recipes that are too long for a test must at least be there. federation/test_five_silos.py types all of one page.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import tiny_folder, tiny_rows, write_jsonl
from typer.testing import CliRunner

from thinwire.cli import app

ROOT = Path(__file__).parent.parent
HOWTO = ["choosing", "numbers", "adding", "scores", "run", "compare"]
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("tutorial", "data", "cgfed", "onebit", "results", "federation"))]
PAGES += [f"docs/howto/{name}.md" for name in HOWTO]
PAGES += ["CONTRIBUTING.md", "docs/agreement.md", "docs/cluster.md", "docs/operator.md"]
SHORT = ["rounds=1", "threads=1", "method.batch_size=1", "data.max_length=128", "eval.rows=2", "eval.max_new_tokens=2"]
SLOW = ("compare", "server", "client", "local-federation", "chat")  # checked by their own tests
NEEDS = {f"docs/howto/{name}.md": "docs/tutorial.md" for name in HOWTO[:3]}  # whose files they go on with
NEEDS |= dict.fromkeys(("CONTRIBUTING.md", "docs/agreement.md", "docs/operator.md"), "docs/tutorial.md")
READ = ["README.md", *sorted(str(p.relative_to(ROOT)) for f in ("docs", "docs/howto") for p in (ROOT / f).glob("*.md"))]
WORDS = 40  # of a sentence, at most


@dataclass(frozen=True)
class Block:
    """A fenced block: what is in the comment before it, its language, its text."""

    note: str
    language: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    found = re.finditer(
        r"(?:<!-- (.*?) -->\n)?^```([^\n]*)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    )
    for block in found:
        yield Block(block[1] or "", block[2].strip(), block[3])


def commands(page: str) -> list[str]:
    """The lines of a page that are typed in a shell, but for those that are not to be run; ends of lines joined."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language in ("", "sh", "bash", "console") and not block.note.startswith("not run"):
            text = block.text.replace("\\\n", " ")
            lines += re.findall(r"^(?:\$ )?((?:thinwire|make|python) [\w./-]+.*)", text, re.MULTILINE)
    return lines


def write_files(page: str, place: Path) -> None:
    """The files that a page shows."""
    for block in blocks(page):
        if block.note.startswith("file: "):
            file = place / block.note.removeprefix("file: ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.language == "toml" and (named := re.search(r'^name = "([\w-]+)"', block.text, re.MULTILINE)):
            (place / f"{named[1]}.toml").write_text(block.text)


def write_tickets(file: Path) -> None:
    """A table as the page on data shows it: 200 rows of four branches and three teams."""
    texts = {
        "it": "I cannot log in to the archive since this morning.",
        "facilities": '"The heating in room 144 does not work. My colleague said: ""call the desk""."',
        "payroll": "I need a salary statement for the bank.",
    }
    teams, branches = list(texts), ["north", "south", "east", "west"]
    lines = [f"T{1000 + i},{branches[i % 4]},{texts[team]},{team}" for i in range(200) if (team := teams[i * 7 % 3])]
    file.write_text("\n".join(["ticket,branch,message,team", *lines]) + "\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("docs") / "model")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "docs/howto/run.md":
        (tmp_path / "silos").mkdir()
        for name in ("a", "b", "c", "d"):
            write_jsonl(tmp_path / "silos" / f"{name}.jsonl", tiny_rows(12))
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(4))
    (tmp_path / "data" / "natural_instructions").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "natural_instructions" / "train.jsonl", tiny_rows(60))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    write_tickets(tmp_path / "tickets.csv")
    (tmp_path / "some" / "huggingface").mkdir(parents=True)
    (tmp_path / "some" / "huggingface" / "folder").symlink_to(model)
    for source in filter(None, (NEEDS.get(page), page)):
        write_files(source, tmp_path)
    ran = 0
    for line in commands(page):
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), line
        elif words[1].startswith("--install"):
            pass  # it would change the shell of whoever runs the tests
        elif words[1] in SLOW:
            assert not words[2].startswith("recipes/") or (ROOT / words[2]).is_file(), line
        else:
            if words[1] == "keys":
                pytest.importorskip("flwr", reason="the extra `flower` is not installed")
                if words[2] == "register":  # the page shows how the line looks, and not a whole one
                    words[-1] = (tmp_path / "keys" / f"{words[3]}.pub").read_text().strip()
            if words[1] == "report":
                pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
            if "--plot" in words:
                pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
            if "--tasks" in words:
                pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")
            done = CliRunner().invoke(app, short(words[1:], model))
            assert done.exit_code == 0, f"{line}\n{done.output}"
            ran += 1
    assert ran or page in ("README.md", "docs/howto/choosing.md", "docs/howto/compare.md", "docs/results.md")


def short(words: list[str], model: Path) -> list[str]:
    """The command with fields that make it short."""
    if words[0] == "data":
        return [*words, f"model.path={model}", "data.max_length=128"]  # the tiny tokenizer makes more tokens
    if words[0] not in ("run", "estimate", "fit-codec"):
        return words
    extra = [f"model.path={model}", *SHORT]
    if "recipes/cgfed.toml" in words:
        extra += ["rounds=2", "data.clients=3", "data.minimum=4", "cohort.n=3"]
    if "method.path=counting:Counting" in words:
        extra = [field for field in extra if not field.startswith("method.")]
    else:
        extra.append("method.steps=1")
    return [*words, *extra]


def test_pages_that_are_listed_are_there_and_their_commands_known() -> None:
    known = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
        if command.callback
    }
    known |= {group.name for group in app.registered_groups}
    for page in [*PAGES, *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]:
        for line in commands(page):
            words = shlex.split(line, comments=True)
            if words[0] == "thinwire" and not words[1].startswith("-"):
                assert words[1] in known | {"eval"}, f"{page}: {line}"


def test_each_entry_of_the_log_begins_with_five_lines_and_stands_in_the_index() -> None:
    index, *entries = re.split(r"^## (?=\d{4}-)", (ROOT / "LOG.md").read_text(), flags=re.MULTILINE)
    heads = ("Question", "Command", "Commit", "Result", "Decision")
    slugs = set()
    for entry in entries:
        title, _, *lines = entry.splitlines()
        assert tuple(re.findall(r"^- \*\*(\w+):\*\* \S", "\n".join(lines[:5]), re.MULTILINE)) == heads, title
        slugs.add(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
    assert set(re.findall(r"\]\(#([^)]+)\)", index)) == slugs
    assert len(slugs) == len(entries)


def sentences(text: str) -> Iterator[str]:
    """A page's sentences, each to its full stop, items and cells apart; a code span or a formula is a word."""
    text = re.sub(r"^```.*?^```|<!--.*?-->", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]+`|\$[^$\n]+\$", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # of a link its words
    text = re.sub(r"^\|.*$", lambda row: row[0].replace("|", "\n\n"), text, flags=re.MULTILINE)
    indented = r" {4}(?! *[-*\d]).*\n"  # code, where a blank line is before it
    for paragraph in re.split(rf"\n *\n(?:{indented}|\n)*|^ *(?:[-*]|\d+\.) +|^#.*$", text, flags=re.MULTILINE):
        yield from filter(None, re.split(r"(?<=[.!?])(?<! al\.)[*\")_]*\s+", " ".join(paragraph.split())))


def test_sentences_are_counted_to_their_full_stop() -> None:
    page = "# A title\n\nOne `a. b c`, two: three;\nTo [1, 2](x.md). **Bold.** (Zhu et al. 2020.) Is $a + b$ 0.5?\n\n"
    page += "    code = 1\n\n    more = 2\n\n- an item\n  of two lines\n1. next\n\n```\nfenced\n```\n| a b | c. D |\n"
    found = ["One code, two: three; To 1, 2.", "**Bold.", "(Zhu et al. 2020.", "Is code 0.5?"]
    assert list(sentences(page)) == [*found, "an item of two lines", "next", "a b", "c.", "D"]


@pytest.mark.parametrize("page", READ)
def test_no_sentence_is_too_long_to_read(page: str) -> None:
    assert [text for text in sentences((ROOT / page).read_text()) if len(text.split()) > WORDS] == []
