"""thinwire data: what it shows of a user's files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import refused, thinwire
from tiny import tiny_encoder, tiny_folder

from thinwire.commands import data as command
from thinwire.data.shown import printable

TOWNS = ("north", "south")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, tickets.csv (24 rows of two branches, two teams) and run.toml."""
    folder = tmp_path_factory.mktemp("data-command")
    tiny_folder(folder / "model")
    lines = ["branch,message,team"]
    # the north writes to it 9 times of 12, the south 3 times
    for i in range(24):
        team = "it" if (i % 8 < 6) == (i % 2 == 0) else "payroll"
        lines.append(f'{TOWNS[i % 2]},"ticket {i}\nof {team}",{team}')
    (folder / "tickets.csv").write_text("\n".join(lines) + "\n")
    (folder / "run.toml").write_text(
        f"""
name = "tickets"
[model]
path = "{folder / "model"}"
[data]
path = "{folder / "tickets.csv"}"
partition = "column"
column = "branch"
heldout = 0
prompt = "{{message}}\\nteam:"
answer = " {{team}}"
max_length = 64
[method]
name = "fedavg"
"""
    )
    return folder


def shown(*args: str | Path) -> str:
    result = thinwire("data", *args)
    assert (result.code, result.err) == (0, "")
    return result.out


def test_clients_lengths_skew_and_marked_examples(place: Path) -> None:
    out = shown(place / "run.toml")
    assert out.startswith("tickets: 24 rows with 2 clients; at most 64 tokens\n")
    assert "no row is longer than 64 tokens: none is cut\n" in out
    assert "label skew (team): 0.50 (0: all clients alike, 1: each has one label only)\n" in out
    example = f"example 1, north, {place / 'tickets.csv'}:2: 24 tokens  | read, not trained on  > trained on\n"
    assert f"\n{example}  | ticket 0\n  | of it\n  | team:\n  >  it<eos>\n" in out
    assert f"example 2, south, {place / 'tickets.csv'}:4: " in out
    assert f"example 3, north, {place / 'tickets.csv'}:6: " in out
    assert "example 4" not in out


def test_others_text_is_escaped(place: Path) -> None:
    others, file = "\x1b[31mred\u202e", place / "others.jsonl"
    rows = [{"branch": others, "message": f"\x1b[2J\x07 {i}", "team": "\x9bw"} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    change = f"data.path={file}"
    out = shown(place / "run.toml", change)
    assert printable(out) == out
    assert "example 1, \\x1b[31mred\\u202e, " in out
    assert "  | \\x1b[2J\\x07 0\n" in out
    out = shown(place / "run.toml", change, "--json")
    assert printable(out) == out
    assert json.loads(out)["clients"][0]["name"] == others
    line = refused("data", place / "run.toml", change, 'data.choices=["a", "b"]')
    assert printable(line) == line
    assert "\\x9bw" in line


def test_what_a_folder_of_clients_leaves_out_is_a_line(place: Path) -> None:
    folder = place / "silos"
    (folder / "west").mkdir(parents=True)
    (folder / "north.jsonl").write_text('{"message": "x", "team": "y"}\n')
    (folder / "so\x1b[2Juth.txt").write_text("")
    change = (f"data.path={folder}", "data.partition=files")
    result = thinwire("data", place / "run.toml", *change)
    left = "so\\x1b[2Juth.txt (no kind of file that is read), west (a folder)"
    assert (result.code, result.err) == (0, f"thinwire: {folder}: no clients, left out: {left}\n")
    result = thinwire("init", place / "silos.toml", "--data", folder)
    assert "west (a folder)" in result.err
    assert f"  clients: the 1 files of {folder}: north\n" in result.out
    result = thinwire("estimate", place / "run.toml", *change)
    assert "west (a folder)" in result.err
    assert "  1 clients, " in result.out


def test_the_same_as_json(place: Path) -> None:
    found = json.loads(shown(place / "run.toml", "--json", "data.heldout=4", "data.max_length=28"))
    north, south = found["clients"]
    (held,) = found["splits"]
    assert (north["name"], south["name"], held["name"]) == ("north", "south", "heldout")
    assert north["rows"] + south["rows"] + held["rows"] == 24
    assert sum(sum(each["labels"].values()) for each in (north, south, held)) == 24
    assert north["tokens"]["max"] == 28
    assert north["cut"] > 0
    assert found["label"] == "team"
    first = found["examples"][0]
    assert first["tokens"] - first["trained_tokens"] == len(first["masked"])
    assert first["trained"].rstrip("<eos>") in (" it", " payrol", " payroll")


def test_rows_that_are_cut_or_left_out_are_counted_by_client(place: Path) -> None:
    for choice, text in (("answer", "cut to 30 tokens"), ("drop", "left out as longer")):
        out = shown(place / "run.toml", "data.max_length=30", f"data.too_long={choice}")
        line = next(line for line in out.splitlines() if text in line)
        counts = {
            name: int(count) for name, count in (part.split() for part in line[line.index("(") + 1 : -1].split(", "))
        }
        assert line.startswith(f"{sum(counts.values())} of 24 rows {text} (")
        assert set(counts) == set(TOWNS)
        assert ("dropped" if choice == "drop" else "cut") in out.split("┡")[0]


def test_closed_answers_and_packing_are_reported(place: Path) -> None:
    out = shown(place / "run.toml", "data.choices=['it', 'payroll']")
    assert "  > trained on; the answer is scored against it, payroll\n" in out
    out = shown(place / "run.toml", "data.pack=true", "data.max_length=128")
    packed = next(line for line in out.splitlines() if line.startswith("packed into "))
    assert packed.endswith(" filled")
    assert " rows of 128 tokens, " in packed


def test_a_picture(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "part.svg"
    out = shown(place / "run.toml", "--plot", path)
    assert out.endswith(f"\nthe picture is in {path}\n")
    text = path.read_text()
    assert all(f"<!-- {word} -->" in text for word in ("north", "south", "it", "payroll"))


def test_labels_are_what_the_run_is_partitioned_by(place: Path) -> None:
    # messages are no labels: all are different, and so the dirichlet column is what is counted
    changes = ("data.partition=dirichlet", "data.clients=2", "data.alpha=100")
    out = shown(place / "run.toml", *changes, "data.answer= {message}")
    assert "label skew (branch): " in out
    out = shown(place / "run.toml", "data.answer= {message}")
    assert "label skew" not in out
    out = shown(place / "run.toml", "data.answer= {message} {team}")
    assert "label skew" not in out


def test_long_texts_are_shown_in_part() -> None:
    text = command._middle("a" * 1000 + "b" * 1000)
    assert text == "a" * 750 + "\n[500 characters are not shown]\n" + "b" * 750
    assert command._middle("a" * 1500) == "a" * 1500


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["--plot", "part.gif"], "--plot: part.gif must end in .svg, .png or .pdf"),
        (["data.max_length=20"], "{csv}:2: the prompt has 20 tokens, which leaves no room for the answer within "),
        (["data.answer= {teem}"], "{csv}:2: field 'teem' is missing (present: branch, message, team)"),
        (["data.choices=['it', 'pay']"], "{csv}:"),
        (["data.choices=['it', 'payroll', 'lift']"], "data.choices: no client's row has the answer 'lift'"),
        (["data.max_length=9999", "data.prompt={long}"], "{csv}:2: the row has "),
        (["data.path={ragged}"], "{ragged}:3: 4 cells where the first line names 3 columns"),
        (["data.path={none}"], "{none}: is not a Parquet file that can be read ("),
        (["data.path={folder}", "data.partition=files"], "{folder}/b.csv: the file holds no row"),
        (["data.column=team", "data.path={gap}"], "{gap}:3: field 'team' is empty"),
    ],
)
def test_bad_input_is_one_line(place: Path, tmp_path: Path, changes: list[str], line: str) -> None:
    names = {name: str(tmp_path / f"{name}.csv") for name in ("ragged", "gap")}
    names |= {"csv": str(place / "tickets.csv"), "none": str(tmp_path / "none.parquet"), "folder": str(tmp_path / "f")}
    head = "branch,message,team\nnorth,a,it\n"
    Path(names["ragged"]).write_text(head + "south,a, b,it\n")
    Path(names["gap"]).write_text(head + "south,a,\n")
    Path(names["none"]).write_text(head)
    Path(names["folder"]).mkdir()
    (tmp_path / "f" / "a.csv").write_text(head)
    (tmp_path / "f" / "b.csv").write_text("branch,message,team\n")
    names["long"] = "{message}" * 80
    given = [change.format(**names) if "path" in change or "long}" in change else change for change in changes]
    assert refused("data", place / "run.toml", *given).startswith(line.format(**names))


def test_the_run_says_at_its_start_what_it_cuts(place: Path, tmp_path: Path) -> None:
    changes = ("rounds=1", "method.steps=1", "data.max_length=30", "data.heldout=2")
    result = thinwire("run", place / "run.toml", *changes, "--out", tmp_path / "run")
    assert result.code == 0, result
    lines = result.out.splitlines()
    assert " of 20 rows cut to 30 tokens (" in lines[3]
    assert lines[4].startswith("  at the start, heldout: ")


@pytest.mark.parametrize(
    "method", [("fedavg",), ("fedkseed", "method.seeds=8"), ("fedkseed", "method.law=lowrank", "method.seeds=8")]
)
def test_runs_train_on_packed_rows(place: Path, tmp_path: Path, method: tuple[str, ...]) -> None:
    name, *fields = method
    changes = (f"method.name={name}", *fields, "method.steps=2", "method.batch_size=2", "rounds=1", "eval.rows=2")
    result = thinwire(
        "run", place / "run.toml", *changes, "data.pack=true", "data.max_length=128", "--out", tmp_path / "run"
    )
    assert (result.code, result.err) == (0, "")
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [client["examples"] for client in record["clients"]] == [12, 12]  # rows, however they are packed
    assert all(client["loss"] > 0 for client in record["clients"])


def test_a_classifier_is_shown_its_classes(place: Path, tmp_path: Path) -> None:
    encoder = f"model.path={tiny_encoder(tmp_path / 'encoder')}"
    out = shown(place / "run.toml", encoder, "data.heldout=2", "data.max_length=12")
    assert "label skew (team): " in out
    assert " of 20 rows cut to 12 tokens (" in out
    example = out[out.index("\nexample 1, ") :]
    assert f"{place / 'tickets.csv'}:" in example.splitlines()[1]
    assert "; the answer is scored against it, payroll\n" in example
    assert example.split("\n\n")[0].splitlines()[-1] in ("  > it", "  > payroll")


def test_what_a_chat_template_does_is_reported_once(place: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "output": "yes"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{{ strftime_now('%Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}[E]{% endfor %}"
    (place / "model" / "chat_template.jinja").write_text(template)
    file, data = tmp_path / "run.toml", f'path = "{tmp_path}/rows.jsonl"\nclients = 2\nheldout = 0\ntemplate = "chat"'
    model, method = f'path = "{place / "model"}"', 'name = "fedavg"\nsteps = 1\nbatch_size = 1'
    file.write_text(f'name = "talk"\nrounds = 1\n[model]\n{model}\n[data]\n{data}\n[method]\n{method}\n')
    out = shown(file)
    printed = [line for line in out.splitlines() if line.startswith(("the chat template", "answers end"))]
    assert printed[0] == "the chat template asks for the date: it is 26 July 2024 in all prompts, whatever the day"
    assert [line for line in printed if "generation prompt" in line or "'[E]'" in line] == printed[1:]
    assert len(printed) == 3
    result = thinwire("data", file, "--json")
    assert json.loads(result.out)["notes"] == printed
    assert result.err.splitlines() == [f"thinwire: {line}" for line in printed]
    ran = thinwire("run", file, "--out", tmp_path / "run")
    assert [line for line in ran.out.splitlines() if line.strip() in printed] == [f"  {line}" for line in printed]
