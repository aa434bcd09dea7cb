"""The commands as a user meets them: run folders, one-line errors, exit statuses, going on after a stop."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tiny import CHOICES, tiny_folder, tiny_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from thinwire import __version__, cli, config
from thinwire import records as recorder
from thinwire.commands import show
from thinwire.model.net import Net
from thinwire.runtime import checkpoint
from thinwire.runtime.folder import locked

SOURCE = Path(__file__).parent.parent / "src"
METHODS = {
    "fedkseed": ["method.lr=1e-3"],
    "pro": ["method.lr=1e-3", "method.pro=true", "eval.every=0"],
    "fedavg": ["method.name=fedavg", "method.lr=1e-3", "method.steps=2"],
}
OWN = '''
from dataclasses import dataclass
from thinwire.core import Method
import torch


@dataclass(frozen=True)
class Count:
    n: int


@dataclass(frozen=True)
class Held:
    examples: int
    loss: float


class Counting(Method):
    """Trains nothing and counts."""

    step: int = 1
    Down, Up, State = Count, Held, Count

    def init(self, server):
        return Count(0)

    def broadcast(self, state, server, client_id, held):
        return state

    def client_update(self, down, client):
        return Held(len(client.data), float(down.n))

    def aggregate(self, state, server, replies):
        return Count(state.n + self.step), {"loss": sum(up.loss for _, up in replies)}

    def materialise(self, state, net):
        net.reset()
'''


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def thinwire(*args: str | Path) -> Result:
    """The command in this process, from its entry point on."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["thinwire", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        return Result(end.code or 0, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("main() returned")


def refused(*args: str | Path) -> str:
    """The one line of a command that the user has to mend."""
    result = thinwire(*args)
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert result.err.startswith("thinwire: ")
    assert "Traceback" not in result.err
    return result.err.removeprefix("thinwire: ").rstrip("\n")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on a tiny model only wait for each other
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows and run.toml, a run of 3 rounds over 3 clients."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_folder(folder / "model")
    write_jsonl(folder / "rows.jsonl", tiny_rows(24, closed=True))
    write_jsonl(folder / "open.jsonl", tiny_rows(12))
    (folder / "run.toml").write_text(
        f'''
name = "tiny"
rounds = 3
[model]
path = "{folder / "model"}"
[data]
path = "{folder / "rows.jsonl"}"
clients = 3
heldout = 6
prompt = "{{input}}: it was"
answer = " {{output}}"
choices = {json.dumps(CHOICES)}
max_length = 64
[method]
name = "fedkseed"
seeds = 16
steps = 3
[eval]
every = 1
rows = 5
'''
    )
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> Callable[[str], tuple[Path, Result]]:
    """Completed runs by the name of METHODS: their folder, and what was printed."""
    results: dict[str, Result] = {}

    def run(name: str) -> tuple[Path, Result]:
        folder = place / "runs" / name
        if name not in results:
            results[name] = thinwire("run", place / "run.toml", *METHODS[name], "--out", folder)
        return folder, results[name]

    return run


Done = Callable[[str], tuple[Path, Result]]


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    """summary.json."""
    return json.loads((folder / "summary.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    """All files under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# A whole run


@pytest.mark.parametrize("name", METHODS)
def test_a_run_leaves_the_folder_of_the_contract(place: Path, done: Done, name: str) -> None:
    folder, result = done(name)
    assert (result.code, result.err) == (0, "")
    assert {p.name for p in folder.iterdir()} == {
        "run.toml",
        "rounds.jsonl",
        "evals.jsonl",
        "summary.json",
        "state",
        "model",
    }
    assert {p.name for p in (folder / "state").glob("round-*")} == {"round-000002", "round-000003"}

    rounds = records(folder / "rounds.jsonl")
    assert [record["round"] for record in rounds] == [1, 2, 3]
    for record in rounds:
        assert {"clients", "bytes_down", "bytes_up", "seconds", "peak_memory_bytes", "metrics"} <= set(record)
        assert [client["id"] for client in record["clients"]] == [0, 1, 2]
        for client in record["clients"]:
            assert {"bytes_down", "bytes_up", "seconds", "examples", "loss"} <= set(client)
            assert "error" not in client
        assert record["bytes_up"] == sum(client["bytes_up"] for client in record["clients"]) > 0
        assert record["bytes_down"] == sum(client["bytes_down"] for client in record["clients"]) > 0

    evals = records(folder / "evals.jsonl")
    assert [record["round"] for record in evals] == ([0, 3] if name == "pro" else [0, 1, 2, 3])
    for record in evals:
        assert {"split", "loss", "perplexity", "rouge_l", "bleu", "accuracy"} <= set(record)
        assert (record["split"], record["rows"]) == ("heldout", 5)

    total = summary(folder)
    assert total["rounds"] == 3
    assert total["bytes_up"] == sum(record["bytes_up"] for record in rounds)
    assert total["bytes_down"] == sum(record["bytes_down"] for record in rounds)
    assert (total["first"], total["final"]) == (evals[:1], evals[-1:])
    assert {"seconds", "peak_memory_bytes"} <= set(total)
    assert len(total["sha256"]) == 64

    model = AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True)
    start = AutoModelForCausalLM.from_pretrained(place / "model", local_files_only=True)
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)("ab")["input_ids"] == [97, 98]


@pytest.mark.parametrize("name", METHODS)
def test_the_run_file_in_the_folder_is_the_resolved_one(place: Path, done: Done, name: str) -> None:
    folder, _ = done(name)
    asked, written = config.load(place / "run.toml", METHODS[name]), config.load(folder / "run.toml")
    assert written.model_copy(update={"environment": {}}) == asked
    assert {"thinwire", "python", "torch", "transformers", "numpy", "machine", "threads"} <= set(written.environment)
    tree = tomllib.loads((folder / "run.toml").read_text())
    assert {"seed", "rounds", "cohort", "model", "data", "method", "eval"} <= set(tree)
    assert set(tree["method"]) == {field for field, value in asked.method if value is not None}


def test_the_run_prints_its_course_and_its_result(done: Done) -> None:
    for name, ratio in (("fedkseed", "1/1,"), ("fedavg", " 1/1 ")):
        folder, result = done(name)
        assert f"tiny: {config.load(folder / 'run.toml').method.name} on " in result.out  # type: ignore[attr-defined]
        assert "18 rows stay where they are, with 3 clients" in result.out
        assert "\nround 3/3: 3 clients, loss " in result.out
        assert "\n  at the start, heldout: loss " in result.out
        assert ratio in result.out
        assert result.out.endswith(f"the model is in {folder / 'model'}\n")
        assert not any(sign in result.out for sign in ("%|", "\r", "\x1b", "Loading", "shards"))


def test_a_run_repeats(place: Path, done: Done, tmp_path: Path) -> None:
    assert thinwire("run", place / "run.toml", *METHODS["pro"], "--out", tmp_path / "again").code == 0
    assert summary(tmp_path / "again")["sha256"] == summary(done("pro")[0])["sha256"]


def test_a_complete_run_reports_it_and_changes_nothing(place: Path, done: Done) -> None:
    folder, first = done("fedkseed")
    before = files(folder)
    result = thinwire("run", place / "run.toml", *METHODS["fedkseed"], "--out", folder, "--resume")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == f"{folder}: this run is complete"
    printed = "".join(line for line in first.out.splitlines(True) if "against the estimate" not in line)
    assert printed.endswith(result.out.split("\n", 1)[1])  # the same tables
    assert files(folder) == before


def test_the_folder_is_named_after_the_run_by_default(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert thinwire("run", place / "run.toml", "rounds=1", "name=2024-05", "method.steps=1").code == 0
    assert summary(tmp_path / "runs" / "2024-05")["rounds"] == 1
    assert thinwire("eval", "runs/2024-05").code == 0


def test_open_answers_cohorts_and_half_precision(place: Path, tmp_path: Path) -> None:
    (tmp_path / "open.toml").write_text(
        f'rounds = 2\ncohort = [{{kind = "cyclic", rounds = 1}}, {{kind = "uniform", n = 2}}]\n'
        f'model = {{path = "{place / "model"}", dtype = "bfloat16"}}\n'
        f'data = {{path = "{place / "open.jsonl"}", clients = 3, heldout_tasks = "{place / "open.jsonl"}"}}\n'
        "method = {name = 'fedkseed', seeds = 8, steps = 2}\neval = {rows = 4, generate = 2, max_new_tokens = 3}\n"
    )
    out = tmp_path / "out"
    result = thinwire("run", tmp_path / "open.toml", "--out", out)
    assert (result.code, result.err) == (0, "")
    assert [len(record["clients"]) for record in records(out / "rounds.jsonl")] == [1, 2]
    final = summary(out)["final"]
    assert [record["split"] for record in final] == ["heldout", "heldout_tasks"]
    assert all(record["rouge_l"] is not None and record["accuracy"] is None for record in final)


def test_a_method_of_the_user_own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting_method.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)  # where the class is found
    own = ("method.path=counting_method:Counting", "method.step=2")
    result = thinwire("run", place / "run.toml", *own, "--out", "own")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("tiny: Counting on ")
    assert [record["metrics"]["loss"] for record in records(Path("own/rounds.jsonl"))] == [0, 6, 12]
    assert summary(Path("own"))["first"][0]["loss"] == summary(Path("own"))["final"][0]["loss"]
    again = thinwire("run", "own/run.toml", "--out", "own", "--resume")  # the file knows the class
    assert again.out.startswith("own: this run is complete\n")
    assert thinwire("eval", "own").code == 0


# What the user has to mend


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["method.name=fedav"], "{run}: method.name: 'fedav' is not a method (did you mean fedavg?); known: cgfed"),
        (["data.clientz=2"], "{run}: data.clientz: unknown field (did you mean clients?); known: "),
        (["rounds=0"], "{run}: rounds: must be greater than 0, got 0"),
        (["threads=0"], "{run}: threads: must be greater than or equal to 1, got 0"),
        (["method.lr=-1"], "{run}: method.lr: must be greater than 0, got -1"),
        (["method.lr=nan"], "{run}: method.lr: must be a finite number, got nan"),
        (["fast"], "'fast' is not key=value"),
        (["method.path=nowhere:Own"], "{run}: method.path: cannot import nowhere:Own: ModuleNotFoundError: "),
        (["data.path=none.jsonl"], "none.jsonl: cannot be read (No such file or directory)"),
        (["data.partition=files"], "data.partition: 'files' needs data.path to be a folder of files, got "),
        (["data.clients=19"], "{rows}: 19 clients are more than the 18 rows"),
        (["data.path={torn}"], "{torn}:2: the line is not JSON ("),
        (
            ["data.path={lacking}", "data.clients=1", "data.heldout=0"],
            "{lacking}:2: field 'input' is missing (present: output)",
        ),
        (["data.choices=['great', 'awful']"], "{rows}:"),
        (["data.path={empty}"], "{empty}: the file holds no row"),
        (["data.path={silos}", "data.partition=files"], "{silos}/b.jsonl: the file holds no row"),
        (["model.path=./none"], "no model at ./none: it is neither a folder, a .gguf file nor a name on the hub"),
        (["model.path={bare}"], "the model folder {bare} lacks weights (model.safetensors), a tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(place: Path, tmp_path: Path, changes: list[str], line: str) -> None:
    names = {"run": place / "run.toml", "rows": place / "rows.jsonl"}
    good = '{"input": "a", "output": "great"}\n'
    texts = {"torn": good + '{"input', "empty": "\n", "lacking": good + '{"output": "great"}\n'}
    for name, text in texts.items():
        names[name] = tmp_path / f"{name}.jsonl"
        names[name].write_text(text)
    for name in ("silos", "bare"):
        names[name] = tmp_path / name
        names[name].mkdir()
    shutil.copy(place / "rows.jsonl", names["silos"] / "a.jsonl")
    (names["silos"] / "b.jsonl").touch()
    shutil.copy(place / "model" / "config.json", names["bare"])
    before = files(tmp_path)
    given = [change.format(**names) if "path" in change else change for change in changes]
    out = tmp_path / "out"
    assert refused("run", place / "run.toml", *given, "--out", out).startswith(line.format(**names))
    assert not out.exists()
    assert files(tmp_path) == before


def test_an_answer_outside_the_choices_is_named_with_its_line(place: Path) -> None:
    line = refused("run", place / "run.toml", "data.choices=['great', 'awful']")
    assert "the answer 'terrible' is not one of the choices: great, awful" in line
    number = int(line.removeprefix(f"{place / 'rows.jsonl'}:").split(":")[0])
    assert json.loads((place / "rows.jsonl").read_text().splitlines()[number - 1])["output"] == "terrible"


def test_run_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("rounds = \n")
    assert refused("run", tmp_path / "bad.toml").startswith(f"{tmp_path / 'bad.toml'}: not TOML: ")
    assert refused("run", tmp_path / "no.toml") == f"{tmp_path / 'no.toml'}: No such file or directory"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["run"], "Missing argument 'FILE.toml'."),
        (["run", "--fast"], "No such option --fast"),
        (["rum"], "No such command 'rum'."),
        (["--fast"], "No such option --fast"),
    ],
)
def test_a_wrong_command_line_is_one_line_too(args: list[str], line: str) -> None:
    printed = refused(*args)
    # versions of click write the option with a colon or in quotes
    assert printed.replace("option: ", "option ").replace("'--fast'", "--fast").startswith(line)


def test_a_folder_that_is_taken_is_left_alone(place: Path, done: Done, tmp_path: Path) -> None:
    folder, _ = done("fedkseed")
    before = files(folder)
    mine = ("run", place / "run.toml", *METHODS["fedkseed"], "--out", folder)
    assert "already holds a run; choose another --out, or go on with --resume" in refused(*mine)
    assert refused(*mine, "seed=1") == refused(*mine)
    other = refused(*mine, "seed=1", "--resume")
    assert other == f"{folder}: holds another run: seed is 0 there, 1 here"
    other = refused("run", place / "run.toml", *METHODS["fedavg"], "--out", folder, "--resume")
    assert other == f"{folder}: holds another run: method.name is 'fedkseed' there, 'fedavg' here"
    assert files(folder) == before

    (tmp_path / "notes.txt").write_text("mine")
    start = ("run", place / "run.toml", "--out")
    for more in ([], ["--resume"]):
        assert refused(*start, tmp_path, *more) == f"{tmp_path}: not empty, and not a run; choose another --out"
    assert "not a folder" in refused(*start, tmp_path / "notes.txt")
    assert "not a folder" in refused(*start, tmp_path / "notes.txt" / "below")
    assert refused(*start, tmp_path / "new", "--resume") == f"{tmp_path / 'new'}: there is no run to resume"
    assert files(tmp_path) == {"notes.txt": b"mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_at_work_is_refused_whatever_is_asked_of_it(place: Path, done: Done, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start = ("run", place / "run.toml", *METHODS["fedkseed"], "--out", out)
    for folder, more in ((out, ()), (out, ("seed=1",)), (out, ("--resume",)), (done("fedkseed")[0], ("--resume",))):
        with locked(folder):
            assert "another process (pid" in refused(*start[:-1], folder, *more)
    assert not out.exists()


@pytest.mark.parametrize("changed", ["rows", "weights"])
def test_a_run_goes_on_with_the_rows_and_the_model_that_it_began_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    here = tmp_path / "place"
    shutil.copytree(place, here)
    file = here / "run.toml"
    file.write_text(file.read_text().replace(str(place), str(here)))
    start = ("run", file, *METHODS["fedkseed"], "--out", tmp_path / "out")

    def stop(self: show.Live, record: dict[str, Any], left: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(show.Live, "round_ends", stop)
        assert thinwire(*start).code == 1
    if changed == "rows":
        path = here / "rows.jsonl"
        path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    else:
        tiny_folder(here / "model", seed=7)
    what = "the clients' rows are" if changed == "rows" else "the start model's weights are"
    assert f"{what} not those that the run began with" in refused(*start, "--resume")


# Stops


def test_ctrl_c_ends_at_a_checkpoint_and_the_printed_command_goes_on(
    place: Path, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = done("fedkseed")

    def stop(self: show.Live, record: dict[str, Any], left: float) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt

    out = tmp_path / "my run"  # a name that a shell would cut
    change = "data.prompt={input}: it was"
    with monkeypatch.context() as patch:
        patch.setattr(show.Live, "round_ends", stop)
        result = thinwire("run", place / "run.toml", *METHODS["fedkseed"], change, "--out", out)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert result.err.startswith("thinwire: stopped; go on from the last whole round with: thinwire run ")
    assert "no model in it yet" in refused("eval", out)
    command = shlex.split(result.err.split("with: ")[1])
    assert command[-3:] == ["--out", str(out), "--resume"]
    assert change in command
    resumed = thinwire(*command[1:])
    assert (resumed.code, resumed.err) == (0, "")
    assert f"going on from the last checkpoint in {out}" in resumed.out
    assert "round 2/3" in resumed.out
    assert "round 1/3" not in resumed.out
    assert summary(out)["sha256"] == summary(reference)["sha256"]
    assert records(out / "evals.jsonl") == records(reference / "evals.jsonl")
    assert [record["round"] for record in records(out / "rounds.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("where", ["checkpoint", "record", "model"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    place: Path, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "somewhere")

    inner_write = checkpoint.write

    def write(folder: Path, state: Any, progress: checkpoint.Progress, *more: Any) -> None:
        if progress.round == 2:
            raise full
        inner_write(folder, state, progress, *more)

    def append(path: Path, record: dict[str, Any], inner: Any = recorder.append) -> None:
        if record["round"] == 1:
            path.open("a").write('{"round": 1, "cli')
            raise full
        inner(path, record)

    def save(self: Net, folder: Path, card: str | None = None) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(checkpoint, "write", write)
        elif where == "record":
            patch.setattr(recorder, "append", append)
        else:
            patch.setattr(Net, "save", save)
        result = thinwire("run", place / "run.toml", *METHODS["fedkseed"], "--out", tmp_path / "out")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "No space left on device" in result.err
    resumed = thinwire(*shlex.split(result.err.split("with: ")[1])[1:])
    assert (resumed.code, resumed.err) == (0, "")
    assert summary(tmp_path / "out")["sha256"] == summary(done("fedkseed")[0])["sha256"]
    assert [record["round"] for record in records(tmp_path / "out" / "rounds.jsonl")] == [1, 2, 3]


def test_a_stop_before_the_first_round(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Net, "open", stop)
    result = thinwire("run", place / "run.toml", "--out", tmp_path / "out")
    assert (result.code, result.err) == (1, "thinwire: stopped\n")
    assert not (tmp_path / "out").exists()


def test_a_bug_of_ours_is_no_user_error(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(Net, "open", broken)
    with pytest.raises(ValueError, match="ours"):
        thinwire("run", place / "run.toml", "--out", tmp_path / "out")


# The other commands


@pytest.mark.parametrize("name", METHODS)
def test_eval_repeats_the_last_scores_of_a_run(done: Done, name: str) -> None:
    folder, _ = done(name)
    before = files(folder)
    result = thinwire("eval", folder, "--json")
    assert (result.code, result.err) == (0, "")
    last = records(folder / "evals.jsonl")[-1]
    assert json.loads(result.out) == [{key: value for key, value in last.items() if key != "round"}]
    assert thinwire("eval", folder).out == f"{show_line(last)}\n"
    assert files(folder) == before


def show_line(record: dict[str, Any]) -> str:
    """The line of a split's scores."""
    scores = f"loss {record['loss']:.4f}, perplexity {record['perplexity']:.3f}, accuracy {record['accuracy']:.3f}"
    return f"{record['split']}: {scores} ({record['rows']} rows)"


def test_eval_of_a_model_folder(place: Path, done: Done) -> None:
    rows = f"data.path={place / 'rows.jsonl'}"
    as_asked = ["data.prompt={input}: it was", 'data.answer=" {output}"', f"data.choices={json.dumps(CHOICES)}"]
    result = thinwire("eval", place / "model", rows, *as_asked, "--json")
    assert (result.code, result.err) == (0, "")
    (score,) = json.loads(result.out)
    assert (score["split"], score["rows"]) == ("data", 24)
    assert score["accuracy"] is not None
    (few,) = json.loads(thinwire("eval", place / "model", rows, "data.rows=7", "--json").out)
    assert (few["rows"], few["accuracy"]) == (7, None)
    trained, _ = done("fedavg")
    (other,) = json.loads(thinwire("eval", trained / "model", rows, *as_asked, "--json").out)
    assert other["loss"] < score["loss"]


def test_eval_errors_are_one_line(place: Path, tmp_path: Path) -> None:
    model = place / "model"
    assert refused("eval", tmp_path / "none").startswith(f"{tmp_path / 'none'}: neither a folder nor a file")
    assert refused("eval", model) == "the command line: data.path: missing"
    assert refused("eval", model, "data.path=none.jsonl").startswith("none.jsonl: cannot be read")
    assert refused("eval", model, "data.paht=x").startswith("the command line: data.path: missing")
    assert refused("eval", tmp_path, f"data.path={place / 'rows.jsonl'}").startswith(
        f"the model folder {tmp_path} lacks"
    )
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x"}\n')
    line = refused("eval", model, f"data.path={tmp_path / 'bad.jsonl'}")
    assert line.startswith(f"{tmp_path / 'bad.jsonl'}:1: field 'output' is missing")


def test_methods_are_listed_with_their_fields() -> None:
    table = json.loads(thinwire("methods", "--json").out)
    assert {"fedavg", "fedkseed"} <= set(table)
    assert table["fedkseed"]["fields"]["pro"] == {"type": "bool", "default": False}
    assert table["fedavg"]["fields"]["clip"] == {"type": "float", "default": 1.0}
    assert table["fedavg"]["fields"]["optimiser"]["type"].startswith('"adamw" | "sgd"')
    text = thinwire("methods").out
    for name, method in table.items():
        assert f"{name}: {method['about']}\n  {method['paper']}\n" in text
        for field, info in method["fields"].items():
            assert f"  {field} = {json.dumps(info['default'])}  ({info['type']})\n" in text


def test_help_and_version() -> None:
    assert thinwire("--version").out == f"{__version__}\n"
    bare, asked = thinwire(), thinwire("--help")
    assert (bare.code, asked.code) == (0, 0)
    assert bare.out.split() == asked.out.split()
    assert all(command in asked.out for command in ("run", "methods", "eval"))
    assert "KEY=VALUE" in thinwire("run", "--help").out


# In a process of their own


def environment() -> dict[str, str]:
    """For a child process: this source, one thread, no hub."""
    return os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_imports_nothing_heavy(option: str) -> None:
    heavy = {"torch", "transformers", "numpy", "pydantic", "numba", "rich", "safetensors"}
    if option == "--version":
        heavy.remove("pydantic")  # typer reads its own options with it
    code = (
        "import atexit, sys\nfrom thinwire.cli import main\n"
        f"atexit.register(lambda: print('heavy:', sorted(set(sys.modules) & {heavy})))\nmain()"
    )
    command = [sys.executable, "-c", code, option]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "heavy: []"
    assert result.stderr == ""


def test_an_interrupted_process_goes_on(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = ["rounds=25", "method.steps=1", "cohort.kind=cyclic", "eval.every=0"]
    command = [sys.executable, "-u", "-m", "thinwire.cli", "run", str(place / "run.toml"), *changes, "--out", str(out)]
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell ran us with &
    ) as process:
        assert process.stdout is not None
        printed = ""
        while "round 2/25" not in printed:
            line = process.stdout.readline()
            assert line, "the process ended early"
            printed += line
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("\n") == 1
    assert err.startswith("thinwire: stopped; go on from the last whole round with: thinwire run ")
    assert not any(sign in printed + rest for sign in ("%|", "\r", "\x1b", "Loading"))
    assert thinwire(*shlex.split(err.split("with: ")[1])[1:]).code == 0
    assert [record["round"] for record in records(out / "rounds.jsonl")] == list(range(1, 26))
