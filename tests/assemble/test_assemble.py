"""From a run file to its parts: who holds which rows, what is held out, and what is wrong with the data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT, CHOICES, tiny_folder, tiny_rows, tiny_tokenizer, write_jsonl
from transformers import MambaConfig, MambaForCausalLM

from thinwire import assemble, config
from thinwire.config import ConfigError, Data
from thinwire.data.errors import DataError
from thinwire.data.rows import Row
from thinwire.keys import Key
from thinwire.model.errors import ModelError
from thinwire.model.net import Net
from thinwire.model.resolve import resolve
from thinwire.runtime.course import Job, Watch

KEY = Key.root(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl (40 rows), silos/ (three clients of 6, 8 and 1 rows) and held.jsonl (5 rows)."""
    folder = tmp_path_factory.mktemp("build")
    write_jsonl(folder / "rows.jsonl", tiny_rows(40, closed=True))
    write_jsonl(folder / "held.jsonl", tiny_rows(5, 9, closed=True))
    (folder / "silos").mkdir()
    for name, rows in (("b", 6), ("a", 8), ("c", 1)):
        write_jsonl(folder / "silos" / f"{name}.jsonl", tiny_rows(rows, len(name), closed=True))
    return folder


@pytest.fixture(scope="module")
def net(place: Path) -> Net:
    return Net.open(str(tiny_folder(place / "model")))


def data_of(place: Path, path: str = "rows.jsonl", **fields: Any) -> Data:
    """The [data] table of those rows."""
    return Data(path=str(place / path), **fields)


def sizes(rows: assemble.Rows) -> list[int]:
    """How many rows each client holds."""
    return [len(held) for held in rows.clients.values()]


def texts(rows: assemble.Rows) -> dict[str, list[int]]:
    """The lines that each client holds."""
    return {name: [row.line for row in held] for name, held in rows.clients.items()}


def test_every_row_is_with_one_client_or_held_out(place: Path) -> None:
    rows = assemble.rows_of(data_of(place, clients=3, heldout=8), KEY)
    assert sizes(rows) == [11, 11, 10]
    assert len(rows.splits["heldout"]) == 8
    lines = [row.line for held in (*rows.clients.values(), rows.splits["heldout"]) for row in held]
    assert sorted(lines) == list(range(1, 41))
    assert assemble.rows_of(data_of(place, clients=3, heldout=8), KEY) == rows
    assert assemble.rows_of(data_of(place, clients=3, heldout=8), Key.root(1)) != rows


def test_the_held_out_rows_do_not_depend_on_the_partition(place: Path) -> None:
    held = [
        assemble.rows_of(data_of(place, clients=clients, partition=partition), KEY).splits["heldout"]
        for clients, partition in ((2, "iid"), (4, "iid"), (2, "dirichlet"))
    ]
    assert held[0] == held[1] == held[2]
    assert len(held[0]) == 4


def test_files_are_clients(place: Path) -> None:
    rows = assemble.rows_of(data_of(place, "silos", partition="files", heldout=0.5), KEY)
    assert list(rows.clients) == ["a", "b", "c"]
    assert sizes(rows) == [4, 3, 1]  # a client of one row keeps it
    assert len(rows.splits["heldout"]) == 7


def test_columns_are_clients(place: Path) -> None:
    rows = assemble.rows_of(data_of(place, partition="column", column="task", heldout=0), KEY)
    assert sorted(rows.clients) == ["north", "south"]
    assert rows.splits == {}


def test_of_a_column_the_named_values_alone_are_clients(place: Path) -> None:
    whole = assemble.rows_of(data_of(place, partition="column", column="task", heldout=0.1), KEY)
    rows = assemble.rows_of(data_of(place, partition="column", column="task", values=("south",), heldout=0.1), KEY)
    assert rows.clients == {"south": whole.clients["south"]}
    assert {row.fields["task"] for row in rows.splits["heldout"]} == {"south"}


def test_files_of_their_own_are_held_out_whole(place: Path) -> None:
    held = str(place / "held.jsonl")
    rows = assemble.rows_of(data_of(place, clients=4, heldout=held, heldout_tasks=held), KEY)
    assert sizes(rows) == [10] * 4
    assert {name: len(split) for name, split in rows.splits.items()} == {"heldout": 5, "heldout_tasks": 5}


def test_fewer_rows_are_drawn_at_random(place: Path) -> None:
    rows = assemble.rows_of(data_of(place, clients=2, rows=10, heldout=2), KEY)
    assert sizes(rows) == [4, 4]
    assert max(line for lines in texts(rows).values() for line in lines) > 10
    assert sizes(assemble.rows_of(data_of(place, clients=2, rows=1000, heldout=0), KEY)) == [20, 20]


def test_shuffled_answers_leave_prompts_counts_and_held_out_rows(place: Path) -> None:
    plain = assemble.rows_of(data_of(place, clients=2), KEY)
    mixed = assemble.rows_of(data_of(place, clients=2, shuffle_answers=True), KEY)
    assert mixed.splits == plain.splits
    assert texts(mixed) == texts(plain)

    def column(rows: assemble.Rows, name: str) -> list[Any]:
        return [row.fields[name] for held in rows.clients.values() for row in held]

    assert column(mixed, "input") == column(plain, "input")
    assert column(mixed, "output") != column(plain, "output")
    assert sorted(column(mixed, "output")) == sorted(column(plain, "output"))


@pytest.mark.parametrize(
    ("path", "fields", "line"),
    [
        ("none.jsonl", {}, "{place}/none.jsonl: cannot be read (No such file or directory)"),
        (
            "silos",
            {},
            "{place}/silos: is a folder, not a .jsonl, .csv, .tsv or .parquet file; a folder goes with data.",
        ),
        ("rows.jsonl", {"partition": "files"}, "data.partition: 'files' needs data.path to be a folder"),
        ("rows.jsonl", {"heldout": "no.jsonl"}, "no.jsonl: cannot be read"),
        ("rows.jsonl", {"heldout_tasks": "no.jsonl"}, "no.jsonl: cannot be read"),
        ("rows.jsonl", {"heldout": 40}, "{place}/rows.jsonl: holding out 40 of 40 rows leaves none to train on"),
        ("rows.jsonl", {"clients": 37}, "{place}/rows.jsonl: 37 clients are more than the 36 rows"),
        ("rows.jsonl", {"partition": "column", "column": "site"}, "{place}/rows.jsonl:1: field 'site' is missing"),
        (
            "rows.jsonl",
            {"partition": "column", "column": "task", "values": ["south", "east"]},
            "data.values: 'east' is not in column 'task' of {place}/rows.jsonl",
        ),
        ("lonely", {"partition": "files"}, "data.heldout: 0.1 of each client's rows holds out none at all"),
        ("hollow", {"partition": "files"}, "{place}/hollow/a.jsonl: the file holds no row"),
        ("torn.jsonl", {}, "{place}/torn.jsonl:2: the line is not JSON ("),
    ],
)
def test_what_is_wrong_with_the_data_is_one_line(place: Path, path: str, fields: dict[str, Any], line: str) -> None:
    for folder, text in (("lonely", '{"output": "x"}\n'), ("hollow", "\n")):
        (place / folder).mkdir(exist_ok=True)
        (place / folder / "a.jsonl").write_text(text)
    (place / "torn.jsonl").write_text('{"output": "x"}\n{"output": \n')
    with pytest.raises((DataError, ConfigError)) as caught:
        assemble.rows_of(data_of(place, path, **fields), KEY)
    assert str(caught.value).startswith(line.format(place=place))
    assert "\n" not in str(caught.value)


def test_a_template_that_cannot_be_read_names_its_fields(place: Path) -> None:
    rows = assemble.rows_of(data_of(place), KEY).splits["heldout"]
    for prompt, answer in (("{input", "{output}"), ("{input.x}", "{output}"), ("{input}", "none")):
        with pytest.raises(ConfigError, match=r"^data\.prompt, data\.answer: the "):
            assemble.dataset(data_of(place, prompt=prompt, answer=answer), rows, tiny_tokenizer())


def test_a_closed_set_can_be_trained_on_as_text(place: Path, net: Net, tmp_path: Path) -> None:
    table = {"name": "fedkseed", "seeds": 8}
    closed = {"prompt": "{input}: it was", "answer": " {output}", "choices": list(CHOICES), "clients": 2}
    for loss, trained in (("choice", 2), ("answer", None)):
        tree = {"method": table, "data": {"path": str(place / "rows.jsonl"), "loss": loss, **closed}}
        run = config.parse(tree | {"model": {"path": str(place / "model")}, "eval": {"rows": 3, "show_rows": True}})
        rows = assemble.rows_of(run.data, KEY)
        job = assemble.job(run, rows, net, tmp_path, 0, Watch())
        assert [data.candidates and len(data.candidates) for data in job.clients] == [trained, trained]
        (record,) = job.evaluate()  # the scores are of the closed set in both
        assert (record["split"], record["rows"], len(record["samples"])) == ("heldout", 3, 3)
        assert record["accuracy"] is not None
        assert {sample["answer"] for sample in record["samples"]} <= set(CHOICES)
        silent = run.model_copy(update={"eval": run.eval.model_copy(update={"show_rows": False})})
        (record,) = assemble.job(silent, rows, net, tmp_path, 0, Watch()).evaluate()
        assert record["samples"] == []  # a row stands in records only where the run file asks for it
        assert list(job.names) == ["client-0", "client-1"]


def test_the_server_holds_its_own_rows_alone(place: Path, net: Net, tmp_path: Path) -> None:
    tree = {"method": {"name": "fedavg"}, "data": {"path": str(place / "rows.jsonl"), "clients": 2}}
    for public, count in ((None, None), (str(place / "held.jsonl"), 5)):
        tree["data"] |= {"public": public} if public else {}
        run = config.parse(tree)
        job = assemble.job(run, assemble.rows_of(run.data, KEY), net, tmp_path, 0, Watch())
        assert (job.public and len(job.public)) == count
        assert sum(map(len, job.clients)) == 36


def test_splits_are_the_same_few_rows_every_time(place: Path, net: Net) -> None:
    tree = {"method": {"name": "fedavg"}, "data": {"path": str(place / "rows.jsonl"), "heldout": 20}}
    run = config.parse(tree | {"eval": {"rows": 6}})
    rows = assemble.rows_of(run.data, KEY)
    first, again = (assemble.splits_of(run, rows, net)[0].data.examples for _ in range(2))
    assert first == again
    assert len(first) == 6
    other = assemble.splits_of(run.model_copy(update={"seed": 1}), rows, net)[0].data.examples
    assert other != first


def test_label_words_replace_the_answers_and_an_unknown_label_is_named(tmp_path: Path) -> None:
    data = config.Data.model_validate(
        {"path": "x", "prompt": "{input}:", "answer": " {output}", "choices": ["up", "down"],
         "words": {"great": "up", "terrible": "down"}}
    )  # fmt: skip
    rows = tiny_rows(6, closed=True)
    found = assemble.dataset(data, rows, tiny_tokenizer())
    assert [found.choices[e.choice] for e in found.examples] == [
        {"great": "up", "terrible": "down"}[row.fields["output"]] for row in rows
    ]
    bad = Row({**rows[0].fields, "output": "fine"}, "x.jsonl", 9)
    with pytest.raises(DataError, match=r"x.jsonl:9: the answer 'fine' is not among data.words: great, terrible"):
        assemble.dataset(data, [bad], tiny_tokenizer())


def test_clients_by_size_and_by_task(place: Path) -> None:
    rows = assemble.rows_of(data_of(place, clients=4, partition="size", alpha=0.5, minimum=2, heldout=0), KEY)
    assert sum(sizes(rows)) == 40
    assert min(sizes(rows)) >= 2
    rows = assemble.rows_of(data_of(place, clients=2, partition="task", column="task", heldout=0), KEY)
    assert [{row.fields["task"] for row in held} for held in rows.clients.values()] in (
        [{"north"}, {"south"}],
        [{"south"}, {"north"}],
    )


def test_words_and_shuffled_answers_are_of_the_answers_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,verdict\n" + "".join(f"t{i},{'yn'[i % 2]}\n" for i in range(12)))
    fields = {"prompt": "{text}:", "answer": " {verdict}", "words": {"y": "yes", "n": "no"}, "clients": 1, "heldout": 0}
    data = Data(path=str(tmp_path / "rows.csv"), shuffle_answers=True, **fields)
    (mixed,) = assemble.rows_of(data, KEY).clients.values()
    verdicts = [row.fields["verdict"] for row in mixed]
    assert verdicts != list("yn" * 6)
    assert sorted(verdicts) == ["n"] * 6 + ["y"] * 6
    found = assemble.dataset(data, mixed, tiny_tokenizer())
    assert [e.references for e in found.examples] == [({"y": "yes", "n": "no"}[v],) for v in verdicts]


def test_words_and_shuffled_answers_of_messages(tmp_path: Path) -> None:
    talks = [[("user", f"t{i}"), ("assistant", "yn"[i % 2])] for i in range(12)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "template": "chat",
        "words": {"y": "yes", "n": "no"},
        "choices": ("yes", "no"),
        "clients": 1,
        "heldout": 0,
    }
    data = Data(path=str(tmp_path / "rows.jsonl"), shuffle_answers=True, **fields)
    (mixed,) = assemble.rows_of(data, KEY).clients.values()
    contents = [row.fields["messages"][1]["content"] for row in mixed]
    assert contents != list("yn" * 6)
    assert sorted(contents) == ["n"] * 6 + ["y"] * 6
    found = assemble.dataset(data, mixed, tiny_tokenizer())
    assert [e.references for e in found.examples] == [({"y": "yes", "n": "no"}[v],) for v in contents]
    assert found.candidates == (tuple(b"yes"), tuple(b"no"))


def test_a_jinja_template_of_the_run_file(place: Path) -> None:
    rows = assemble.rows_of(data_of(place), KEY).splits["heldout"]
    jinja = {"template": "jinja", "prompt": "{{ input | upper }}:", "answer": " {{ output }}"}
    found = assemble.dataset(data_of(place, **jinja), rows, tiny_tokenizer())
    assert [e.text for e in found.examples] == [f"{row.fields['input'].upper()}:" for row in rows]
    with pytest.raises(ConfigError, match=r"^data\.prompt, data\.answer: the Jinja template .* cannot be read"):
        assemble.dataset(data_of(place, **{**jinja, "prompt": "{{ input"}), rows, tiny_tokenizer())


def job_of(place: Path, net: Net, folder: Path, **data: Any) -> Job:
    """The job of a run on rows.jsonl, or what else `data` says."""
    tree = {"path": str(place / "rows.jsonl"), "prompt": "{input}: it was", "answer": " {output}", "clients": 2} | data
    run = config.parse({"method": {"name": "fedavg"}, "data": tree, "model": {"path": str(net.folder)}})
    return assemble.job(run, assemble.rows_of(run.data, KEY), net, folder, 0, Watch())


def test_packed_batches_are_made_of_the_same_rows(place: Path, net: Net, tmp_path: Path) -> None:
    packed, plain = (job_of(place, net, tmp_path, pack=pack, max_length=128).clients[0] for pack in (True, False))
    assert packed.examples == plain.examples
    assert (packed.pack, plain.pack) == (128, 0)
    assert next(packed.batches(KEY, 2)).examples > 4


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"choices": ["great", "terrible", "fine"]}, "data.choices: no client's row has the answer 'fine'"),
        ({"max_length": 20}, "{place}/rows.jsonl:"),
        ({"max_length": 8, "too_long": "drop"}, "client 'client-0' is empty: {place}/rows.jsonl: none of 18 rows fits"),
        ({"max_length": 2048, "prompt": "{input}" * 60}, "{place}/rows.jsonl:"),
    ],
)
def test_what_a_run_cannot_use_is_one_line(
    place: Path, net: Net, tmp_path: Path, data: dict[str, Any], line: str
) -> None:
    with pytest.raises(DataError) as caught:
        job_of(place, net, tmp_path, **data)
    assert str(caught.value).startswith(line.format(place=place))
    if "prompt" in data:
        assert f"and the context of {net.folder} is 1024; set data.max_length to 1024 or less" in str(caught.value)
    elif data.get("max_length") == 20:
        assert "tokens, which leaves no room for the answer within data.max_length 20" in str(caught.value)


def test_a_class_that_only_held_out_rows_have_is_named(place: Path, net: Net, tmp_path: Path) -> None:
    held = tmp_path / "held.csv"
    held.write_text("input,output\nfine,great\nso so,middling\n")
    with pytest.raises(DataError) as caught:
        job_of(place, net, tmp_path, heldout=str(held), choices=["great", "terrible", "middling"])
    problem = f"data.choices: no client's row has the answer 'middling'; {held}:3 holds it out"
    assert str(caught.value) == problem


def test_a_model_without_positions_cannot_have_packed_rows(
    place: Path, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net.model, "forward", lambda input_ids: None)
    problem = rf"^data\.pack: {re.escape(str(net.folder))} does not keep the examples of a row apart; leave it out$"
    with pytest.raises(ConfigError, match=problem):
        job_of(place, net, tmp_path, pack=True)


def test_public_prompts_are_answered_beside_the_first_split(place: Path, net: Net) -> None:
    tree = {
        "data": {"path": str(place / "rows.jsonl"), "clients": 2, "prompt": "{input}: it was", "answer": " {output}"},
        "method": {"name": "fedavg"},
        "eval": {"prompts": ["Good {day}", "And you?"], "rows": 2, "max_new_tokens": 2},
    }
    run = config.parse(tree)
    rows = assemble.rows_of(run.data, KEY)
    (record,) = assemble.scorer(run, net, assemble.splits_of(run, rows, net))()
    assert [given["prompt"] for given in record["public"]] == ["Good {day}", "And you?"]
    assert all(isinstance(given["answer"], str) for given in record["public"])
    tree["data"]["template"] = "chat"
    del tree["data"]["prompt"], tree["data"]["answer"]
    asked = assemble.prompts_of(config.parse(tree), net.tokenizer)
    assert asked is not None
    assert asked.examples[1].text == "<user>And you?\n<assistant>"
    tree["eval"] = {}
    assert assemble.prompts_of(config.parse(tree), net.tokenizer) is None


def test_a_token_without_a_row_in_the_embedding_is_named(place: Path, tmp_path: Path) -> None:
    """Tokens that were added and rows that were not: in a prompt, an answer, a choice; unused ones do no harm."""
    folder = tiny_folder(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>", "<most>"])
    tokenizer.save_pretrained(folder)
    net = Net.open(str(folder))
    data = data_of(place, prompt="{input}", answer="{output}", max_length=64)
    plain = assemble.dataset(data, tiny_rows(3, closed=True), net.tokenizer)
    assemble.check_tokens(net, "m", plain)
    for fields in ({"input": "a <most>", "output": "b"}, {"input": "a", "output": "<most>"}):
        used = assemble.dataset(data, [Row(fields, "rows.jsonl", 7)], net.tokenizer)
        with pytest.raises(DataError, match=r"rows.jsonl:7: the token '<most>' has the number 260, .* has 259 rows"):
            assemble.check_tokens(net, "m", used)
    chosen = data.model_copy(update={"choices": ("b", "<more>")})
    used = assemble.dataset(chosen, [Row({"input": "a", "output": "b"}, "rows.jsonl", 1)], net.tokenizer)
    with pytest.raises(DataError, match=r"data.choices: the token '<more>' has the number 259"):
        assemble.check_tokens(net, "m", used)
    assemble.check_tokens(Net.open(str(folder), hollow=True), "m", plain)
    # with what the model is asked where it is served, although training reads what stands before an answer
    net.tokenizer.chat_template = CHAT.replace("%}<assistant>{%", "%}<most>{%")
    talk = assemble.dataset(data_of(place, template="chat", max_length=64), tiny_rows(1, closed=True), net.tokenizer)
    with pytest.raises(DataError, match=r"generation prompt: the token '<most>' has the number 260"):
        assemble.check_tokens(net, "m", talk)


def test_a_run_looks_for_its_model_once_for_its_rows_and_once_for_its_net(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it has of clients, splits and public rows: each look at a hub name would ask the hub."""
    found: list[str] = []

    def counting(path: str) -> Path:
        found.append(path)
        return resolve(path)

    for module in ("assemble.model", "model.load"):
        monkeypatch.setattr(f"thinwire.{module}.resolve", counting)
    rows = str(place / "rows.jsonl")
    tree = {"model": {"path": str(tiny_folder(tmp_path / "model"))}, "method": {"name": "fedavg"}}
    tree["data"] = {"path": rows, "clients": 5, "public": rows, "heldout": 0.2}
    run, held = assemble.prepared(config.parse(tree, "here"))
    assert found == [run.model.path]
    assemble.begin(run, held).job(tmp_path / "run", Watch())
    assert found == [run.model.path] * 2


def test_a_method_that_a_model_cannot_have_is_refused_as_the_model_is_opened(place: Path, tmp_path: Path) -> None:
    settings = MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2)
    MambaForCausalLM(settings).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tree = {"model": {"path": str(tmp_path)}, "data": {"path": str(place / "rows.jsonl")}}
    for name in ("fedkseed", "fedzo"):
        with pytest.raises(ModelError, match=rf"method: {name} perturbs"):
            assemble.net_of(config.parse(tree | {"method": {"name": name}}, "here"))
    assert assemble.net_of(config.parse(tree | {"method": {"name": "fedavg"}}, "here")).names


def test_ranks_of_clients_that_are_not_there_are_refused_before_a_model_is_opened(place: Path) -> None:
    data = {"path": str(place / "rows.jsonl"), "clients": 3}
    method = {"name": "flora", "ranks": {"2": 2, "3": 2}}
    tree = {"model": {"path": str(place / "model")}, "data": data, "method": method}
    with pytest.raises(ConfigError, match=r"^method\.ranks: no client 3: there are 3 clients, 0 to 2$"):
        assemble.prepared(config.parse(tree))
