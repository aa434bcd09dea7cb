"""What a hub that means harm can do to a site that keeps a policy: one worker, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="comes with: pip install 'thinwire[flower]'")

from silos import Silos
from tiny import tiny_rows, write_jsonl

from thinwire import assemble, config, wire
from thinwire.core import Server
from thinwire.federation import audit, worker
from thinwire.federation.fingerprint import fingerprints
from thinwire.federation.policy import task_of
from thinwire.federation.site_run import run_settings
from thinwire.federation.worker import FAILED, Site, Worker
from thinwire.keys import Key
from thinwire.runtime.payloads import Hello
from thinwire.runtime.store import VersionStore

THIN: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 2, "batch_size": 4}
SESSION = "0123456789abcdef"
NAMED = {"template": "plain", "prompt": None, "answer": None, "choices": None}
STRICT = 'methods = ["fedkseed"]\nkinds = ["Steps"]\nevaluate = false\n'


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"), sites=1)


class Attack:
    """A hub against one worker; `ask` returns the error, or the bytes of the reply."""

    def __init__(self, silos: Silos, place: Path, policy: str = STRICT, **site: Any) -> None:
        self.silos, self.place = silos, place / "site"
        (place / "policy.toml").write_text(policy)
        data = write_jsonl(place / "rows.jsonl", tiny_rows(12, 1, closed=True))
        fields = {"hold_out": False, "model": str(silos.folder / "model"), "policy": str(place / "policy.toml"), **site}
        self.site = Site("north", str(data), str(self.place), "", **fields)
        self.worker = Worker(self.site)
        self.count = 0

    def run(self, method: dict[str, Any] = THIN, **fields: Any) -> config.Run:
        """A run file under a template that all sites allow."""
        return self.silos.run(method, rounds=9, **{**fields, "data": {**NAMED, **fields.get("data", {})}})

    def about(self, run: config.Run, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """The settings and hashes as an honest hub has them, but for the changes."""
        plain = run_settings(run, ("north",), SESSION)
        settings = json.dumps({**json.loads(plain), **(changes or {})})
        tiny = assemble.net_of(run.model_copy(update={"model": self.run().model}))
        return {"settings": settings, **fingerprints(run, tiny)}

    def frame(self, run: config.Run, round: int = 1, **changes: Any) -> bytes:
        """What this round's client receives; `changes` are fields of the payload."""
        net = assemble.net_of(run, remember=True)
        key, versions = Key.root(0), VersionStore(self.place / "hub")
        server = Server(net, key, round, 9, (0,), versions)
        down = run.method.broadcast(run.method.init(server), server, 0, None)
        down = type(down)(**{**vars(down), **changes})
        return bytes(wire.encode(down, run=assemble.identity(run), round=round, client=0))

    def hello(self, run: config.Run) -> bytes:
        return bytes(wire.encode(Hello(), run=assemble.identity(run), client=0))

    def ask(self, action: str, about: dict[str, Any], frame: bytes, table: dict[str, Any] | None = None) -> str | bytes:
        """Put one whole frame to the worker."""
        self.count += 1
        fields = {"action": action, "transfer": f"{self.count:016x}", "offset": 0, "total": len(frame), "room": 1 << 20}
        answer, body = self.worker.answer({**about, **fields, "counted": 0, **(table or {})}, frame)
        return str(answer["error"]) if "error" in answer else body

    def lines(self) -> list[dict[str, Any]]:
        path = self.place / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def attack(silos: Silos, tmp_path: Path) -> Attack:
    return Attack(silos, tmp_path)


def test_an_honest_hub_is_answered_and_every_line_follows_from_the_last(attack: Attack) -> None:
    run = attack.run()
    assert attack.ask("join", attack.about(run), attack.hello(run)) != FAILED
    reply = attack.ask("train", attack.about(run), attack.frame(run))
    assert isinstance(reply, bytes)
    assert wire.Frame(reply).header().kind == "Steps"
    lines = attack.lines()
    assert [(line["direction"], line["verdict"], line["template"]) for line in lines] == [
        ("in", "passed", "plain"),
        ("out", "passed", "plain"),
    ] * 2
    assert audit.broken(attack.place / "audit.jsonl") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"session": "/../../../escape"},
        {"session": "../../escape"},
        {"session": SESSION + "\n"},
        {"session": SESSION.upper().replace("0", "G")},
        {"session": 1},
        {"run": -1},
        {"run": 1 << 32},
        {"run": "../x"},
        {"run": 1.5},
        {"run": True},
        {"sites": ["../north"]},
        {"sites": "north"},
        {"sites": [["north"]]},
        {"toml": 1},
        {"toml": "= ="},
        {"toml": ""},
        {"toml": "method = []"},
        {"toml": '[method]\npath = ["x"]'},
        {"toml": "x = " + "[" * 3000},
    ],
)
def test_no_name_of_the_hub_s_choice_gets_out_of_the_folder(changes: dict[str, Any], attack: Attack) -> None:
    before = everything(attack.place.parent)
    run = attack.run()
    about = attack.about(run, changes)
    for action, frame in (("join", attack.hello(run)), ("train", attack.frame(run))):
        assert "not a run" in str(attack.ask(action, about, frame)) or "policy" in str(attack.ask(action, about, frame))
    shutil.rmtree(attack.place / "hub", ignore_errors=True)
    new = everything(attack.place.parent) - before
    assert {path.name for path in new} == {"audit.jsonl", "notices.txt"}


@pytest.mark.parametrize(
    "table",
    [
        {"transfer": "../../../escape0"},
        {"transfer": 7},
        {"action": "../x"},
        {"action": "drop"},
        {"offset": -1},
        {"offset": 1.0},
        {"total": -1},
        {"total": 1 << 60},
        {"room": 0},
        {"room": -1},
        {"room": 1 << 40},
        {"counted": -5},
        {"counted": "0"},
        {"settings": 3},
        {"settings": "x" * (1 << 21)},
        {"base": "\x1b[2J"},
    ],
)
def test_a_table_of_wrong_values_is_no_question(table: dict[str, Any], attack: Attack) -> None:
    run = attack.run()
    assert str(attack.ask("join", attack.about(run), attack.hello(run), table)).startswith("not a question")
    assert not list(attack.place.glob("spool/*"))


@pytest.mark.parametrize("name", ["transfer", "offset", "total", "room", "counted", "settings", "action"])
def test_a_table_without_a_value_is_no_question(name: str, attack: Attack) -> None:
    table = {"action": "join", "transfer": "0" * 16, "offset": 0, "total": 1, "room": 1, "counted": 0, "settings": ""}
    del table[name]
    answer, _ = attack.worker.answer(table, b"x")
    assert str(answer["error"]).startswith(f"not a question: {name}")


PREDICATE = "{% if 'amber' in input %}{{ 1 // 0 }}{% endif %}{{ input }}"


@pytest.mark.parametrize("rows", ["has it", "has it not"])
@pytest.mark.parametrize(
    "asked",
    [
        {"template": "jinja", "prompt": PREDICATE, "answer": "{{ output }}"},
        {"template": "plain", "prompt": "{input}", "answer": "{output}"},
        {"template": "plain", "words": {"great": "yes"}},
        {"choices": ["great", "terrible"]},
        {"max_length": 8},
        {"max_length": 1 << 20},
        {"too_long": "drop"},
    ],
)
def test_no_question_about_rows_that_the_site_has_not_allowed(asked: dict[str, Any], rows: str, attack: Attack) -> None:
    """What is answered is the same whatever the rows hold, and no row was read: there are none to read."""
    if rows == "has it not":
        Path(attack.site.data).unlink()
    run = attack.run(data=asked)
    answer = attack.ask("join", attack.about(run), attack.hello(run))
    assert "this site's policy does not allow" in str(answer)
    assert [line["verdict"] for line in attack.lines()] == [f"refused: {str(answer).removeprefix('Illegal: ')}"]


def test_a_template_that_the_policy_lists_by_its_hash_is_read(silos: Silos, tmp_path: Path) -> None:
    plain = Attack(silos, tmp_path)
    own = {"template": "plain", "prompt": "{input}: it was", "answer": " {output}", "choices": ["great", "terrible"]}
    run = plain.run(data=own)
    task = task_of(run.data)
    refusal = plain.ask("join", plain.about(run), plain.hello(run))
    assert f'add "{task}" to templates' in str(refusal)  # what the operator is to write is in the line
    assert task in (plain.place / "notices.txt").read_text()
    assert task_of(plain.run(data={**own, "answer": "{output}"}).data) != task
    listed = f'templates = ["{task}"]\nchoices = [["great", "terrible"]]'
    (tmp_path / "other").mkdir()
    allowed = Attack(silos, tmp_path / "other", policy=listed)
    assert isinstance(allowed.ask("join", allowed.about(run), allowed.hello(run)), bytes)
    named = allowed.run()
    assert "does not allow the template" in str(allowed.ask("join", allowed.about(named), allowed.hello(named)))


def test_what_goes_wrong_with_rows_is_reported_in_one_text_and_is_in_the_log(attack: Attack) -> None:
    run = attack.run()
    about, hello = attack.about(run), attack.hello(run)
    texts = set()
    for rows in ([{"text": "no column"}], [{"instruction": "a", "input": "b", "output": ""}], []):
        Path(attack.site.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
        attack.worker = Worker(attack.site)
        texts.add(attack.ask("join", about, hello))
    Path(attack.site.data).unlink()
    attack.worker = Worker(attack.site)
    texts.add(attack.ask("join", about, hello))
    assert texts == {FAILED}
    lines = attack.lines()
    assert [line["verdict"] for line in lines] == ["passed", f"error: {FAILED}"] * 4
    assert "output" in (attack.place / "notices.txt").read_text()  # the site's own operator reads the reason


def test_a_mismatch_is_found_before_a_row_is_read(attack: Attack) -> None:
    run = attack.run()
    Path(attack.site.data).unlink()
    about = {**attack.about(run), "base": "0" * 16}
    assert "base model: the server's is 0000" in str(attack.ask("join", about, attack.hello(run)))


def test_pieces_that_never_make_a_frame_do_not_fill_the_disk(attack: Attack) -> None:
    about, most = attack.about(attack.run()), 0
    for number in range(40):
        fields = {"action": "train", "transfer": f"{number:016x}", "offset": 0, "total": 1 << 24, "room": 1}
        answer, _ = attack.worker.answer({**about, **fields, "counted": 0}, bytes(100_000))
        assert answer == {"total": 0}
        most = max(most, sum(path.stat().st_size for path in attack.place.glob("spool/*")))
    assert most == 100_000
    assert len(list(attack.place.glob("spool/*"))) == 1
    assert [line["verdict"] for line in attack.lines()] == ["dropped: 100000 of 16777216 bytes came"] * 39


def test_a_frame_is_not_begun_beyond_the_policy_or_the_disk(
    silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = Attack(silos, tmp_path, policy="max_bytes_in = 1000")
    about = attack.about(attack.run())
    assert "1001 bytes to come in" in str(attack.ask("train", about, b"x", {"total": 1001}))
    monkeypatch.setattr(worker, "SPARE", 1 << 60)
    assert "no room for a frame of 900 bytes" in str(attack.ask("train", about, b"x", {"total": 900}))
    assert not list(attack.place.glob("spool/*"))


@pytest.mark.parametrize(
    "pieces", [[(0, 10), (5, 10)], [(0, 10), (0, 10)], [(95, 10)], [(i * 4, 1) for i in range(17)]]
)
def test_pieces_overlap_nowhere_and_come_in_no_crumbs(pieces: list[tuple[int, int]], attack: Attack) -> None:
    about = attack.about(attack.run())
    fields = {"action": "train", "transfer": "0" * 16, "total": 100, "room": 1, "counted": 0}
    answers = [attack.worker.answer({**about, **fields, "offset": at}, bytes(size))[0] for at, size in pieces]
    assert "do not fit together" in str(answers[-1]["error"])
    assert not list(attack.place.glob("spool/*"))


def test_a_round_is_answered_once(attack: Attack) -> None:
    run = attack.run()
    about, first = attack.about(run), attack.frame(run)
    reply = attack.ask("train", about, first)
    assert isinstance(reply, bytes)
    others = {attack.ask("train", about, attack.frame(run, draws=draws)) for draws in range(30)}
    assert others == {"Illegal: round 1 is answered already, to another request"}
    other = attack.about(attack.run({**THIN, "lr": 1e-2}), {"run": assemble.identity(run)})  # another file of it
    assert attack.ask("train", other, first) == reply
    assert "is answered already" in str(attack.ask("train", other, attack.frame(run, lr=1e-2)))
    assert attack.ask("train", about, first) == reply  # what a retry needs
    attack.worker = Worker(attack.site)  # and from the disk, too
    assert attack.ask("train", about, first) == reply
    again = [line for line in attack.lines() if line.get("again")]
    assert len(again) == 3
    assert {line["sha256"] for line in again} == {line["sha256"] for line in attack.lines() if line["kind"] == "Steps"}
    assert len(list(attack.place.glob("runs/*/replies/*"))) == 1
    attack.ask("train", about, attack.frame(run, round=2))
    assert len(list(attack.place.glob("runs/*/replies/*"))) == 1
    assert "it is replayed" in str(attack.ask("train", about, first))


def test_rounds_and_run_files_are_counted(silos: Silos, tmp_path: Path) -> None:
    attack = Attack(silos, tmp_path, policy="max_rounds = 2\nmax_runs = 3\nkept_runs = 2")
    run = attack.run()
    about = attack.about(run)
    replies = [attack.ask("train", about, attack.frame(run, round)) for round in (1, 2, 3)]
    assert [isinstance(reply, bytes) for reply in replies] == [True, True, False]
    assert "more than 2 answers in a run" in str(replies[2])
    answers = [attack.ask("join", attack.about(run, {"session": f"{n:016x}"}), attack.hello(run)) for n in range(4)]
    assert [isinstance(reply, bytes) for reply in answers] == [True, True, False, False]
    assert "more than 3 run files" in str(answers[2])
    assert len(list((attack.place / "runs").iterdir())) == 2
    attack.worker = Worker(attack.site)  # a folder that is gone, and a process that is new, begin no budget anew
    assert "more than 2 answers" in str(attack.ask("train", about, attack.frame(run, 4)))
    assert "more than 3 run files" in str(
        attack.ask("join", attack.about(run, {"session": "f" * 16}), attack.hello(run))
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"method": {**THIN, "steps": 200_000_000}}, "200000000 steps a visit"),
        ({"method": {**THIN, "steps": 10_000, "queries": 2}}, "20000 steps a visit"),
        ({"method": {**THIN, "batch_size": 1 << 30}}, "method.batch_size = 1073741824"),
        ({"eval": {"batch_size": 1 << 30}}, "eval.batch_size = 1073741824"),
        ({"eval": {"generate": 1, "max_new_tokens": 1 << 30}}, "eval.max_new_tokens = 1073741824"),
        ({"model": {"lora": {"rank": 1 << 30}}}, "model.lora.rank = 1073741824"),
    ],
)
def test_what_would_take_all_memory_is_refused_before_any_is_taken(
    fields: dict[str, Any], reason: str, silos: Silos, tmp_path: Path
) -> None:
    attack = Attack(silos, tmp_path, policy="")
    Path(attack.site.data).unlink()
    about = attack.about(attack.run())
    about["settings"] = run_settings(attack.run(**{"method": THIN, **fields}), ("north",), SESSION)
    assert reason in str(attack.ask("join", about, attack.hello(attack.run())))
    assert attack.worker.run is not None
    assert not attack.worker.run.fingerprints  # no model was loaded


def test_no_path_of_the_hub_s_is_looked_at(silos: Silos, tmp_path: Path) -> None:
    attack = Attack(silos, tmp_path, model=None)
    answers = set()
    for path in ("/etc", "/nowhere", str(silos.folder / "model")):
        run = attack.run()
        about = attack.about(run)
        tree = json.loads(about["settings"])
        tree["toml"] = tree["toml"].replace(str(silos.folder / "model"), path)
        answers.add(attack.ask("join", {**about, "settings": json.dumps(tree)}, attack.hello(run)))
    assert answers == {"this site names no start model, and does not take the server's word for one"}


def test_a_site_that_takes_the_hub_s_model_does_not_reveal_what_is_at_a_path(silos: Silos, tmp_path: Path) -> None:
    attack = Attack(silos, tmp_path, policy="model = true", model=None)
    (tmp_path / "empty").mkdir()
    answers = set()
    for path in ("/etc", "/nowhere", str(tmp_path / "empty")):
        run = attack.run()
        about = attack.about(run)
        tree = json.loads(about["settings"])
        tree["toml"] = tree["toml"].replace(str(silos.folder / "model"), path)
        answers.add(attack.ask("join", {**about, "settings": json.dumps(tree)}, attack.hello(run)))
    assert answers == {FAILED}


def test_a_foreign_class_and_a_foreign_method_are_not_touched(attack: Attack) -> None:
    run = attack.run({"name": "fedavg", "lr": 1e-3, "steps": 1, "batch_size": 1})
    assert "does not allow the method fedavg" in str(attack.ask("join", attack.about(run), attack.hello(run)))
    assert "evaluation" in str(attack.ask("evaluate", attack.about(attack.run()), attack.frame(attack.run())))


def test_a_frame_that_is_none_is_noted(attack: Attack) -> None:
    about = attack.about(attack.run())
    for frame in (b"x", b"thw\x01" + b"\x90" * 100, bytes(3000)):
        assert isinstance(attack.ask("train", about, frame), str)
    assert [line["verdict"].partition(":")[0] for line in attack.lines()] == ["refused"] * 3
    assert audit.broken(attack.place / "audit.jsonl") is None


def everything(folder: Path) -> set[Path]:
    """All that lies below the folder, beside which the escape of two folders up would lie too."""

    def walk(place: Path) -> Iterator[Path]:
        for path in place.iterdir():
            yield path
            if path.is_dir():
                yield from walk(path)

    return set(walk(folder)) | set(folder.parent.iterdir())


def test_a_log_that_was_changed_is_found(attack: Attack) -> None:
    run = attack.run()
    path = attack.place / "audit.jsonl"
    attack.ask("join", attack.about(run), attack.hello(run))
    attack.ask("train", attack.about(run), attack.frame(run))
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    assert audit.broken(path) is None
    for changed, bad in (
        (lines[:1] + lines[2:], 2),
        (lines[1:], 1),
        ([lines[0].replace("join", "jojn"), *lines[1:]], 2),
        ([*lines[:2], lines[2].replace('"before"', '"after"'), lines[3]], 3),
        ([*lines[:3], lines[3][:-20]], 4),
    ):
        path.write_text("".join(changed))
        assert f"audit.jsonl:{bad}: does not follow" in str(audit.broken(path))
    attack.worker = Worker(attack.site)  # goes on behind the line that was cut, on a line of its own
    attack.ask("join", attack.about(run), attack.hello(run))
    assert json.loads(path.read_text().splitlines()[-1])["verdict"] == "passed"
    old = json.dumps({"direction": "in", "verdict": "passed"}) + "\n"  # lines of an older thinwire may come first
    path.write_text(old)
    attack.worker = Worker(attack.site)
    attack.ask("join", attack.about(run), attack.hello(run))
    assert audit.broken(path) is None
    assert "ended: no answer" in path.read_text().splitlines()[1]
