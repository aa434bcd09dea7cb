"""thinwire init: a commented run file for the user's own data."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import click
import typer

from thinwire.commands.terminal import echo, one_line

if TYPE_CHECKING:
    from thinwire.data.guess_columns import Proposal

Kind = TypeVar("Kind", bound=StrEnum)
CLIENTS = 4  # where the data does not name them

FILE = """\
# A run of thinwire. Show the data:  thinwire data {file}
# Train:                             thinwire run {file}
# Any field can also be set on the command line, as key=value: rounds=5, method.lr=1e-4, data.clients=8.
{name}
seed = 0
rounds = 3

[model]
path = {model}# or a Hugging Face folder, a name on the hub, a .gguf file
dtype = "float32"                  # or bfloat16, float16
device = "cpu"                     # or cuda

{view}[data]
{data}
# A row that is longer loses the end of its answer. "cut" cuts prompts too, at their beginning; "drop" leaves rows out.
too_long = "answer"
heldout = 0.1                      # the share of each client's rows that is scored, not trained on; or a file
# pack = true                      # short examples share a row of max_length tokens: a step sees more of them

[method]                           # thinwire methods lists them all, with their fields
{method}
[cohort]
kind = "all"                       # all clients in every round; or kind = "uniform" with n = 4 of them

[eval]
every = 1                          # rounds
rows = 100                         # held-out rows that are scored
"""


LORA = """\
[model.lora]                       # small factors are trained in place of all parameters; without this table, all are
rank = 8
alpha = 16.0

"""
TIED = """\
[model.view]                       # few numbers are trained, which LoRA factors of all layers follow
kind = "tied"
numbers = 115200                   # a bit each: 14.4 kB; 32768: 4.1 kB

"""
ENCODERS = 'targets = ["query", "key", "value"]   # as they are called in BERT and its kin'
FEDIT = """\
name = "fedavg"                    # what is trained travels whole: a few MB a client and round with [model.lora]
lr = 5e-4                          # without [model.lora], rather 2e-5
steps = 12                         # of a client in a round
batch_size = 8
"""
OTHERS = """\
# name = "onebit"                  # 15 kB for a client and round, and in our runs about what LoRA factors learn: with
# lr = 4.5e-3                      # [model.view] kind = "tied" in place of [model.lora]; docs/onebit.md has a file
# name = "fedkseed"                # all parameters for about 1 kB a client and round; learns far more slowly. Leave
#                                  # [model.lora] out, and lr, steps and batch_size to their defaults at first
"""
ONEBIT = """\
name = "onebit"                    # each number is sent as one bit, what that loses is sent later
lr = 4.5e-3
steps = 20                         # of a client in a round
batch_size = 8
"""
FEDKSEED = """\
name = "fedkseed"                  # a scalar a step: learns far more slowly than gradients do, and sends least
"""
GRADUALDIFF = """\
name = "gradualdiff"               # the differences of all weights, coded without loss
lr = 2e-5
steps = 12                         # of a client in a round
batch_size = 8
"""
FEDAVG = FEDIT.replace(" with [model.lora]", "").replace("a few MB", "gigabytes").replace("5e-4 ", "2e-5 ")

# (link, memory) -> the view and the method that suit them, and why
CHOICES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("kilobytes", "inference"): ("", FEDKSEED, "fedkseed: scalars travel, and a client needs the memory of inference"),
    ("kilobytes", "lora"): (TIED, ONEBIT, "onebit: one bit a number travels, and it learns about what LoRA does"),
    ("kilobytes", "training"): (TIED, ONEBIT, "onebit: one bit a number travels; nothing learns more for these bytes"),
    ("megabytes", "inference"): ("", FEDKSEED, "fedkseed: of the methods without gradients the one that sends least"),
    ("megabytes", "lora"): (LORA, FEDIT, "fedavg on LoRA factors (FedIT)"),
    ("megabytes", "training"): ("", GRADUALDIFF, "gradualdiff: all weights are trained, their differences travel"),
    ("gigabytes", "inference"): ("", FEDKSEED, "fedkseed: of the methods without gradients the one that sends least"),
    ("gigabytes", "lora"): (LORA, FEDIT, "fedavg on LoRA factors (FedIT)"),
    ("gigabytes", "training"): ("", FEDAVG, "fedavg: all weights are trained, and travel"),
}


class Link(StrEnum):
    """What a client may send in a round."""

    kilobytes = "kilobytes"
    megabytes = "megabytes"
    gigabytes = "gigabytes"


class Memory(StrEnum):
    """What a client has room for: the weights, factors beside them, or gradients and moments of all of them."""

    inference = "inference"
    lora = "lora"
    training = "training"


class Answers(StrEnum):
    """A few that are known, or any text."""

    closed = "closed"
    open = "open"


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE.toml]", help="The run file to write.")] = Path("run.toml"),
    data: Annotated[
        str | None, typer.Option(help="Your data: a .jsonl, .csv, .tsv or .parquet file, or a folder of them.")
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Ask for link, memory and answers, and choose the method.")
    ] = False,
    link: Annotated[Link | None, typer.Option(help="What a client may send in a round.")] = None,
    memory: Annotated[Memory | None, typer.Option(help="What a client has room for.")] = None,
    answers: Annotated[Answers | None, typer.Option(help="Whether answers are a closed set.")] = None,
) -> None:
    """Write a commented run file for your data; it looks at the columns and proposes prompt and answer."""
    with one_line():
        from thinwire.config import ConfigError

        if file.suffix != ".toml":
            raise ConfigError(f"{file}: a run file ends in .toml")
        if not file.parent.is_dir():
            raise ConfigError(f"{file}: {file.parent} is not a folder")
        lines, notes, pairs = (*_placeholder(), False) if data is None else _own(data)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "run"
        if ask:
            link = link or _asked("What may a client send in a round?", Link, Link.kilobytes)
            memory = memory or _asked("What has a client room for?", Memory, Memory.lora)
            answers = answers or _asked("Are answers a closed set, or open text?", Answers, Answers.open)
        view, method = LORA, FEDIT + OTHERS
        if link or memory or answers:
            view, method, why = CHOICES[link or "kilobytes", memory or "lora"]
            notes.append(why)
            if answers == Answers.open and method is FEDKSEED:
                notes.append(
                    "open answers: without gradients hardly anything was learnt of them here (docs/results.md)"
                )
        if pairs:
            view = view and view.rstrip() + f"\n{ENCODERS}\n\n"
        model = f"{_quoted('minilm' if pairs else 'smollm2-135m-instruct'):<28}"
        named = _line("name", name)
        text = FILE.format(file=file, name=named, model=model, data="\n".join(lines), view=view, method=method)
        try:
            with open(file, "x", encoding="utf-8") as out:
                out.write(text)
        except FileExistsError:
            raise ConfigError(f"{file}: exists already; choose another name") from None
        echo(f"wrote {file}")
        for line in notes:
            echo(f"  {line}")
        echo(f"look at it, then: thinwire data {file}")


def _asked(question: str, known: type[Kind], default: Kind) -> Kind:
    choice = typer.prompt(question, default=default.value, type=click.Choice([kind.value for kind in known]))
    return known(choice)


def _placeholder() -> tuple[list[str], list[str]]:
    lines = [
        _line("path", "rows.jsonl", "your file: .jsonl, .csv, .tsv or .parquet; or a folder, one file a client"),
        _line("partition", "iid", "dealt at random; or size, dirichlet, column, task; files for a folder"),
        f"clients = {CLIENTS}",
        "# A row is {instruction, input, output}, {prompt, completion} or {messages}; of others, write:",
        '# prompt = "question: {question}\\nanswer:"',
        '# answer = " {answer}"',
        _line("template", "chat", "the tokenizer's own; or plain, alpaca, completion"),
        _line("max_length", 512, "tokens, prompt and answer together"),
    ]
    return lines, ["data.path is a placeholder; thinwire init --data FILE looks at your columns"]


def _own(data: str) -> tuple[list[str], list[str], bool]:
    """The lines of [data], notes on them, and whether the rows are pairs of texts."""
    from thinwire.data import source
    from thinwire.data.guess_columns import propose

    folder = source.is_folder_of_files(data)
    clients = source.read_clients(data) if folder else {"": source.read(data)}
    rows = [row for held in clients.values() for row in held]
    found = propose(rows)
    lines = [_line("path", data)]
    notes = [f"{len(rows):,} rows, with the columns {', '.join(found.columns)}"]
    if folder:
        lines.append(_line("partition", "files", "a client a file"))
        notes.append(f"clients: the {len(clients)} files of {data}: {', '.join(clients)}")
    elif found.client is not None:
        lines.append(_line("partition", "column", "a client for each value of the column"))
        lines.append(_line("column", found.client))
        notes.append(f"clients: the values of {found.client}")
    else:
        count = max(1, min(CLIENTS, len(rows) // 2))
        lines.append(_line("partition", "iid", "dealt at random; or size, dirichlet, column, task"))
        lines.append(_line("clients", count))
        notes.append(f"clients: {count}, dealt at random, as no column seems to name them")
    shown, how = _template(found)
    tokens = "tokens of a text" if found.pairs else "tokens, prompt and answer together"
    lines += [*shown, _line("max_length", found.max_length, tokens)]
    return lines, [*notes, *how], found.pairs


def _template(found: Proposal) -> tuple[list[str], list[str]]:
    if found.pairs:
        lines = [_line("loss", "contrastive", "an anchor's own positive against all of a batch"), "scale = 20.0"]
        return lines, ["loss: contrastive, on the embeddings of an encoder: the rows have an anchor and its positive"]
    if found.prompt is None or found.answer is None:
        lines, notes = [_line("template", found.template)], [f"template: {found.template}"]
        if found.preferences:
            lines += [_line("loss", "dpo", "by how much the chosen answer gains on the rejected one"), "beta = 0.1"]
            notes.append("loss: dpo, as the rows have answers that were chosen and answers that were rejected")
        return lines, notes
    lines = ["# {column} stands for what is in the column; the loss is on the answer alone."]
    lines += [_line("prompt", found.prompt), _line("answer", found.answer)]
    notes = [f"prompt: {_quoted(found.prompt)}", f"answer: {_quoted(found.answer)}"]
    if found.choices is not None:
        lines.append(
            "# The answers are a closed set: they are scored against each other. Leave this out for free text."
        )
        lines.append(_line("choices", list(found.choices)))
        notes.append(f"choices: {', '.join(found.choices)}")
    return lines, notes


def _line(key: str, value: Any, comment: str = "") -> str:
    import tomli_w

    text = tomli_w.dumps({key: value}, multiline_strings=False)
    text = f"{key} = [{', '.join(map(_quoted, value))}]" if isinstance(value, list) else text.strip()
    return f"{text:<34} # {comment}" if comment else text


def _quoted(text: str) -> str:
    import tomli_w

    return tomli_w.dumps({"v": text}).strip().removeprefix("v = ")
