"""A run file is checked whole: what is wrong is one line that names the field, and what is right is written whole."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from thinwire import assemble, config
from thinwire.config import ConfigError, Run
from thinwire.core import Method
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedkseed import FedKSeed
from thinwire.runtime.cohort import All, Cyclic, Uniform

BASE = """
rounds = 3
[data]
path = "rows.jsonl"
[method]
name = "fedkseed"
seeds = 64
"""


class Own(Method):
    """A user's method, as far as the config sees it."""

    strength: float = 1.0
    order: tuple[int, ...] = (1, 2)
    Down, Up, State = int, int, int


class Halfway(Method):
    """A method that has no payloads."""


def run_of(*overrides: str, text: str = BASE) -> Run:
    """The run of a file with that text."""
    tree = tomllib.loads(text)
    config.override(tree, overrides)
    return config.parse(tree, "run.toml")


def complaint(*overrides: str, text: str = BASE) -> str:
    """The line about a wrong run, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        run_of(*overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("run.toml: ")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (['federation.sites=["a", "a"]'], "federation.sites: a name is there twice"),
        (['federation.sites=["../a"]'], "federation.sites: '../a' is not a name"),
        (["federation.deadline=0"], "federation.deadline: must be greater than 0, got 0"),
        (["federation.site=1"], "federation.site: unknown field (did you mean sites?); known: audit, chunk_bytes"),
        (["federation.weights.caps=0.5"], "federation.weights.caps: unknown field (did you mean cap?); known: by, cap"),
        (["federation.weights.by=size"], "federation.weights.by: must be 'method', 'examples', 'equal' or 'table'"),
        (["federation.weights.cap=0"], "federation.weights.cap: must be greater than 0, got 0"),
        (["federation.weights.by=table"], 'federation.weights: by = "table" and a table go together'),
        (["federation.weights.floor=0.5", "federation.weights.cap=0.4"], "federation.weights: a floor of 0.5 is above"),
        (
            ["federation.weights.by=table", "federation.weights.table={a=0.5, b=0.4}"],
            "federation.weights.table: its shares sum to 0.9, not to 1",
        ),
        (["eval.target=1.5"], "eval.target: is compared with evaluations, so it goes together with eval.every"),
        (["eval.warmup=2"], 'eval.warmup: goes with eval.patience, eval.target or eval.keep = "best"'),
        (["eval.on=sites"], 'eval.on: goes with eval.patience, eval.target or eval.keep = "best"'),
        (["data.selection=1.5"], "data.selection: 1.5 is neither a share between 0 and 1 nor a source"),
        # unknown names
        (["method.name=fedkseeed"], "method.name: 'fedkseeed' is not a method (did you mean fedkseed?); known: cgfed"),
        (["method.name=zzz"], "method.name: 'zzz' is not a method; known: cgfed"),
        (["method.name=7"], "method.name: 7 is not a method; known: "),
        (["roundz=3"], "roundz: unknown field (did you mean rounds?); known: cohort, data, environment, eval"),
        (["data.clientz=3"], "data.clientz: unknown field (did you mean clients?); known: alpha, answer"),
        (["model.width=3"], "model.width: unknown field; known: autocast, bits, device, dtype, lora, path"),
        (["model.shards=true", "model.device=auto"], 'model.shards: device = "auto" gives each GPU some of the layers'),
        (["model.shards=true", "model.view.kind=tied"], "model.shards: is of the views full, filter, lora, not of"),
        (
            ["model.shards=true", "model.bits=8", "model.lora.rank=2", 'model.lora.targets=["q_proj"]'],
            "model.shards: weights in few bits stay whole; leave model.bits out",
        ),
        (["eval.patience=2"], "eval.patience: counts evaluations, so it goes together with eval.every"),
        (["eval.evry=3"], "eval.evry: unknown field (did you mean every?); known: batch_size, every"),
        (["method.lrr=1e-3"], "method.lrr: unknown field (did you mean lr?); known: aggregation, amplitude_clip, "),
        (["method.name=fedavg", "method.seeds=8"], "method.seeds: unknown field (did you mean steps?); known: "),
        (["cohort.kind=cyclic", "cohort.n=2"], "cohort.n: unknown field; known: kind, rounds"),
        (['cohort=[{kind="all", rounds=1}, {kind="all", x=1}]'], "cohort.1.x: unknown field; known: kind, rounds"),
        # missing
        (["method={}"], "method.name: missing; known: cgfed"),
        (["data={}"], "data.path: missing"),
        (["cohort.kind=uniform"], "cohort.n: missing"),
        (['cohort=[{kind="uniform"}]'], "cohort.0.n: missing"),
        (["cohort={}"], "cohort.kind: missing; known: all, uniform, cyclic"),
        (['data.prompt="{a}"'], "data.answer: missing; it goes together with data.prompt"),
        (['data.answer="{a}"'], "data.prompt: missing; it goes together with data.answer"),
        (['data.values=["a"]'], 'data.values: goes with data.partition = "column" only'),
        # types
        (["rounds=many"], "rounds: must be a valid integer, got 'many'"),
        (['rounds="3"'], "rounds: must be a valid integer, got '3'"),
        (["rounds=true"], "rounds: must be a valid integer, got True"),
        (["rounds=2.5"], "rounds: must be a valid integer, got 2.5"),
        (["method.pro=1"], "method.pro: must be a valid boolean, got 1"),
        (["method.lr=fast"], "method.lr: must be a valid number, got 'fast'"),
        (['method.lr="1e-3"'], "method.lr: must be a valid number, got '1e-3'"),
        (["data.heldout=true"], "data.heldout: must be a valid number or a valid integer or a valid string, got True"),
        (["data.choices=yes"], "data.choices: must be a valid array, got 'yes'"),
        (["data.choices=[1, 2]"], "data.choices.0: must be a valid string, got 1"),
        (["data=rows.jsonl"], "data: must be an object, got 'rows.jsonl'"),
        (["method=fedavg"], "method: must be a table, such as { name = \"fedkseed\" }, got 'fedavg'"),
        (["data.path.x=1"], "data.path.x: data.path is not a table"),
        (["cohort=all"], "cohort: must be a valid array, got 'all'"),
        (["cohort=[]"], "cohort: needs at least one segment"),
        # values
        (["rounds=0"], "rounds: must be greater than 0, got 0"),
        (["threads=0"], "threads: must be greater than or equal to 1, got 0"),
        (["threads=100000"], "threads: must be less than or equal to 1024, got 100000"),
        (["data.max_length=1"], "data.max_length: must be greater than or equal to 2, got 1"),
        (["seed=-1"], "seed: must be greater than or equal to 0, got -1"),
        (["method.lr=-1e-3"], "method.lr: must be greater than 0, got -0.001"),
        (["method.lr=inf"], "method.lr: must be a finite number, got inf"),
        (["method.lr=nan"], "method.lr: must be a finite number, got nan"),
        (["data.alpha=inf"], "data.alpha: must be a finite number, got inf"),
        (["data.choices=[1, nan]"], "data.choices.1: must be a finite number, got nan"),
        (["data.heldout=1.5"], "data.heldout: 1.5 is neither a share below 1, a number of rows nor a source"),
        (["data.heldout=-2"], "data.heldout: -2 is neither a share below 1"),
        (['data.choices=["yes"]'], "data.choices: needs at least two different answers, got ['yes']"),
        (['data.choices=["a", "a"]'], "data.choices: needs at least two different answers, got ['a', 'a']"),
        (["data.partition=random"], "data.partition: must be 'files', 'iid', 'size', 'dirichlet', 'column' or 'task'"),
        (["data.template=jinja"], 'data.prompt: missing; with data.template = "jinja" it is a Jinja template'),
        (["data.pack=true", 'data.choices=["a", "b"]'], "data.pack: goes with open answers, or data.loss = "),
        (["data.pack=true", "data.balanced=true"], "data.pack: does not go with data.balanced"),
        (["data.rejected=x"], 'data.rejected: goes with data.loss = "dpo" or "contrastive" only'),
        (["data.beta=0.2"], 'data.beta: goes with data.loss = "dpo" only'),
        (["data.loss=dpo", "data.beta=0"], "data.beta: must be greater than 0, got 0"),
        (["data.loss=dpo", "data.pack=true"], 'data.pack: does not go with data.loss = "dpo"'),
        (["data.loss=dpo", 'data.choices=["a", "b"]'], 'data.choices: does not go with data.loss = "dpo"'),
        (["data.loss=dpo", "data.words.a=b"], 'data.words: does not go with data.loss = "dpo"'),
        (["data.loss=dpo", "data.shuffle_answers=true"], 'data.shuffle_answers: does not go with data.loss = "dpo"'),
        (["data.loss=dpo", "data.prompt={a}", "data.answer={b}"], "data.rejected: missing; with data.loss = "),
        (["data.loss=dpo", "data.rejected={c}"], "data.prompt: missing; with data.loss = "),
        (["data.scale=5"], 'data.scale: goes with data.loss = "contrastive" only'),
        (["data.loss=contrastive", "data.beta=0.2"], 'data.beta: goes with data.loss = "dpo" only'),
        (["data.loss=contrastive", "data.scale=0"], "data.scale: must be greater than 0, got 0"),
        (["data.loss=contrastive", "data.pack=true"], 'data.pack: does not go with data.loss = "contrastive"'),
        (["data.loss=contrastive", "data.rejected={c}"], "data.prompt: missing; with data.loss = "),
        (["data.loss=contrastive", "data.order=lfr"], "data.order: lfr is about each row's own loss"),
        (["data.loss=contrastive", "data.template=chat"], 'data.template: does not go with data.loss = "contrastive"'),
        (["data.loss=contrastive", "eval.generate=4"], 'eval.generate: does not go with data.loss = "contrastive"'),
        (["data.loss=contrastive", 'eval.prompts=["a"]'], 'eval.prompts: does not go with data.loss = "contrastive"'),
        (["data.loss=contrastive", "model.task=causal"], 'model.task: does not go with data.loss = "contrastive"'),
        (["data.loss=contrastive", "model.view.kind=prompt"], 'model.view: does not go with data.loss = "contrastive"'),
        (
            ["data.loss=contrastive", "privacy.level=record", "privacy.epsilon=1"],
            'privacy.level: does not go with data.loss = "contrastive": a row\'s loss depends on the others',
        ),
        (["method.schedule=step"], "method.schedule: must be 'constant', 'linear' or 'cosine', got 'step'"),
        (["model.dtype=int8"], "model.dtype: must be 'float32', 'bfloat16' or 'float16', got 'int8'"),
        (["model.bits=4"], "model: bits needs [model.lora]: quantised weights cannot be trained themselves"),
        (["model.bits=3", "model.lora.rank=4"], "model.bits: must be 8 or 4, got 3"),
        (
            ["model.view.kind=lore"],
            "model.view.kind: 'lore' is not one of 'core', 'filter', 'full', 'lora', 'prompt', 'tied'",
        ),
        (["model.view={}"], "model.view.kind: missing; known: core, filter, full, lora, prompt, tied"),
        (["model.view.kind=lora", "model.view.rank=0"], "model.view.rank: must be greater than 0, got 0"),
        (["model.view.kind=full", "model.view.rank=4"], "model.view.rank: unknown field; known: keep, kind"),
        (["model.lora.rnk=4"], "model.lora.rnk: unknown field (did you mean rank?); known: alpha, freeze_a, keep, "),
        (["model.view.kind=full", "model.lora.rank=4"], "model.lora: is short for [model.view] with kind = "),
        (["model.view.kind=full", "model.bits=4"], "model: bits needs [model.lora]"),
        (["cohort.kind=some"], "cohort.kind: 'some' is not one of 'all', 'uniform', 'cyclic'"),
        (['cohort=[{kind="all"}, {kind="cyclic"}]'], "cohort.0.rounds: missing; only the last segment may go without"),
        (["name=a/b"], "name: "),
        # overrides
        (["rounds"], "'rounds' is not key=value"),
        (["=3"], "'=3' is not key=value"),
        (["data..path=3"], "'data..path=3' is not key=value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_field(changes: Sequence[str], line: str) -> None:
    assert complaint(*changes).startswith(line)


def test_missing_tables() -> None:
    assert complaint(text="") == "data: missing"
    assert complaint(text='[data]\npath = "x"') == "method: missing"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"rounds = ", "run.toml: not TOML: "),
        (b"\xff\xfe", "run.toml: not TOML: "),
        (b"name = 2024-13-41", "run.toml: not TOML: "),
        (b"rounds = 1\nrounds = 2", "run.toml: not TOML: "),
        (None, "run.toml: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes | None, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("run.toml").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        config.load(Path("run.toml"))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path)


def test_a_small_file_gets_every_default() -> None:
    run = run_of()
    assert (run.name, run.seed, run.rounds, run.threads, run.cohort) == ("run", 0, 3, None, (All(),))
    assert run.method == FedKSeed(seeds=64)
    assert (run.data.partition, run.data.heldout, run.eval.every) == ("iid", 0.1, 0)


def test_overrides_reach_any_depth_and_keep_the_types_of_toml() -> None:
    run = run_of(
        "seed=7",
        " data.heldout = 8",
        "method.lr=1",
        "method.pro=true",
        "data.prompt={input}: it was",
        'data.answer=" {output}"',
        "data.choices=['yes', 'no']",
        "name=2024-01-01",
        "cohort.kind=uniform",
        "cohort.n=2",
    )
    assert isinstance(run.method, FedKSeed)
    assert (run.seed, run.data.heldout, run.method.lr, run.method.pro) == (7, 8, 1.0, True)
    assert (run.data.prompt, run.data.answer, run.data.choices) == ("{input}: it was", " {output}", ("yes", "no"))
    assert (run.name, run.cohort) == ("2024-01-01", (Uniform(n=2),))
    assert run_of("data.heldout=held.jsonl").data.heldout == "held.jsonl"
    assert run_of("eval.every=2", "model.path=a=b").model.path == "a=b"


@pytest.mark.parametrize("order", [1, -1])
def test_another_method_drops_the_fields_of_the_old_one_but_no_override(order: int) -> None:
    run = run_of(*["method.name=fedavg", "method.lr=0.5"][::order])
    assert run.method == FedAvg(lr=0.5)


def test_the_same_method_keeps_its_fields() -> None:
    assert run_of("method.name=fedkseed").method == FedKSeed(seeds=64)


def test_segments_of_cohorts() -> None:
    run = run_of('cohort=[{kind="all", rounds=2}, {kind="cyclic"}]')
    assert run.cohort == (All(rounds=2), Cyclic())


def test_what_came_later_and_is_not_used_changes_no_runs_number(tmp_path: Path) -> None:
    """A run file that was written without the fields is resumed, and its frames carry the number that they did."""
    run = run_of("eval.every=1")
    written = run.to_toml().replace("patience = 0\n", "").replace('keep = "last"\n', "")
    (tmp_path / "run.toml").write_text(written)
    old = config.load(tmp_path / "run.toml")
    assert run.first_difference(old) is None
    aside = {"environment": {}, "threads": None, "track": config.Track(), "federation": None}
    as_it_was = run.model_copy(update=aside).to_toml({"eval": {"patience", "keep"}, "data": {"order", "focus"}})
    assert "patience" not in as_it_was
    assert assemble.identity(run) == int.from_bytes(hashlib.sha256(as_it_was.encode()).digest()[:4], "little")
    changes = ("eval.patience=3", "eval.keep=best", "data.order=lfr", "eval.target=1.5", "data.selection=0.1")
    changes += ("federation.weights.cap=0.5", "federation.weights.fair=0.1")
    others = [assemble.identity(run_of("eval.every=1", change)) for change in changes]
    assert len({assemble.identity(run), *others}) == 1 + len(changes)
    assert assemble.identity(run_of("eval.every=1", "federation.deadline=5")) == assemble.identity(run)
    assert "beta" not in written
    others = [assemble.identity(run_of("data.loss=dpo", f"data.beta={beta}")) for beta in (0.1, 0.2)]
    assert len({assemble.identity(run_of()), *others}) == 3
    assert "scale" not in written
    others = [assemble.identity(run_of("data.loss=contrastive", f"data.scale={scale}")) for scale in (20, 5)]
    assert len({assemble.identity(run_of()), *others}) == 3


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["method.pro=true", "data.heldout=8", "seed=99999999999999999999", "threads=2"],
        ["method.name=fedavg", 'cohort=[{kind="all", rounds=2}, {kind="uniform", n=2}]'],
        ["data.choices=['ü', '\"x\"']", 'data.prompt="a\\nb{input}"', "data.answer={output}", "data.heldout=0"],
        ["method.path=test_config:Own", "method.strength=2", "method.order=[3]"],
        ["data.loss=dpo", "data.prompt={a}", "data.answer={b}", "data.rejected={c}", "data.beta=0.3"],
        ["data.loss=contrastive", "data.prompt={a}", "data.answer={b}", "data.rejected={c}", "data.scale=7.5"],
    ],
)
def test_the_resolved_file_is_a_run_file_of_the_same_run(tmp_path: Path, changes: list[str]) -> None:
    run = run_of(*changes).model_copy(update={"environment": {"torch": "2.13"}})
    (tmp_path / "run.toml").write_text(run.to_toml(), encoding="utf-8")
    again = config.load(tmp_path / "run.toml")
    assert again == run
    assert type(again.method) is type(run.method)
    assert again.first_difference(run) is None
    assert again.to_toml() == run.to_toml()
    written = tomllib.loads(run.to_toml())
    expected = {field for field, value in run.method if value is not None}
    assert expected <= set(written["method"])
    assert {"path", "partition", "heldout", "max_length"} <= set(written["data"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["method.lr=0.5"], "method.lr is 1e-05 there, 0.5 here"),
        (["seed=1", "rounds=4"], "seed is 0 there, 1 here"),
        (["cohort.kind=cyclic"], "cohort.0.kind is 'all' there, 'cyclic' here"),
        (["data.rows=9"], "data.rows is None there, 9 here"),
        (["threads=2"], None),
        (["eval.keep=best"], "eval.keep is 'last' there, 'best' here"),
        (["federation.deadline=5", "federation.audit=false"], None),
        (["federation.weights.cap=0.5"], "federation.weights.by is None there, 'method' here"),
    ],
)
def test_the_first_difference_is_named(changes: list[str], line: str | None) -> None:
    assert run_of(*changes).first_difference(run_of()) == line


def test_a_method_of_the_user_own() -> None:
    run = run_of("method.path=test_config:Own", "method.strength=2")
    assert run.method == Own(strength=2.0)  # and the fields of the old method are gone
    assert config.method_name(run.method) == "Own"
    assert config.method_name(FedAvg()) == "fedavg"
    own = '[data]\npath = "x"\n[method]\npath = "test_config:Own"\nstrength = 2'
    assert run_of("method.name=fedavg", text=own).method == FedAvg()
    assert complaint("method.strenght=1", text=own).startswith(
        "method.strenght: unknown field (did you mean strength?)"
    )


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("test_config", "method.path: 'test_config' is not of the form package.module:Class"),
        (":Own", "method.path: ':Own' is not of the form package.module:Class"),
        ("test_config:", "method.path: 'test_config:' is not of the form package.module:Class"),
        ("5", "method.path: 5 is not of the form package.module:Class"),
        ("no_such_module:Own", "method.path: cannot import no_such_module:Own: ModuleNotFoundError: "),
        ("test_config:Owm", "method.path: cannot import test_config:Owm: AttributeError: "),
        ("test_config:run_of", "method.path: test_config:run_of is not a thinwire.core.Method"),
        ("pathlib:Path", "method.path: pathlib:Path is not a thinwire.core.Method"),
        ("test_config:Halfway", "method.path: test_config:Halfway has no Down"),
    ],
)
def test_a_method_path_that_leads_nowhere(path: str, line: str) -> None:
    assert complaint(f"method.path={path}").startswith(line)


def test_a_module_of_the_user_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_method.py").write_text("class Own(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert complaint("method.path=broken_method:Own").startswith(
        "method.path: cannot import broken_method:Own: SyntaxError: invalid syntax (broken_method.py, line 1)"
    )


def test_a_view_has_a_short_form_which_is_the_same_run() -> None:
    short, long = run_of("model.lora.rank=4"), run_of("model.view.kind=lora", "model.view.rank=4")
    assert short == long
    assert short.model.view == short.model.lora == config.Lora(rank=4)
    whole = run_of("model.view.kind=full")
    assert whole == run_of()
    assert whole.model.lora is None
    for run in (short, long, whole):
        assert config.parse(tomllib.loads(run.to_toml())) == run


def test_a_run_writes_its_view_as_runs_did_before_there_were_others() -> None:
    """The number that its frames carry is of what it writes."""
    lora = {"rank": 4, "alpha": 16.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    plain = {"path": "smollm2-135m-instruct", "task": "auto", "dtype": "float32", "device": "cpu"}
    for changes in (["model.view.kind=lora", "model.view.rank=4"], ["model.lora.rank=4"]):
        assert tomllib.loads(run_of(*changes).to_toml())["model"] == plain | {"lora": lora}
    assert tomllib.loads(run_of("model.view.kind=full").to_toml())["model"] == plain
