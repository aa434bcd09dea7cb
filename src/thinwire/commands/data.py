"""thinwire data: who holds what, how long it is, and what the model will see of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.commands.terminal import Overrides, echo, echo_json, one_line, settle

if TYPE_CHECKING:
    from rich.console import Console

    from thinwire.assemble import Rows
    from thinwire.config import Run
    from thinwire.data.batch import Dataset, Example
    from thinwire.data.rows import Row
    from thinwire.data.statistics import Description

EXAMPLES = 3
LISTED = 30  # clients that the table lists
COLUMNS = 5  # labels that the table lists
FEW = 20  # answers that are labels, without the run file's saying so
LONG = 1500  # characters of a prompt or answer that are shown


def data(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file.")],
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the partition into this .svg, .png or .pdf file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show a run's clients: their rows, lengths, labels, what is cut, and examples as the model reads them."""
    with one_line():
        settle()
        from thinwire import assemble, config
        from thinwire.core import Method
        from thinwire.data import partition_plot
        from thinwire.data.statistics import describe, filled, remarks, shortened, skew

        if plot is not None:
            partition_plot.check(plot)
        settings = config.load(file, overrides or [])
        settings, rows = assemble.prepared(settings)
        # the tokenizer and the config are all that is needed, whatever is trained
        model = settings.model.model_copy(update={"lora": None, "view": config.Full()})
        plain = settings.model_copy(update={"model": model, "method": Method()})
        net = assemble.net_of(plain, hollow=True)
        clients = assemble.clients_data(settings, rows, net)
        classes = assemble.classes_of(settings, net.folder)
        splits = {
            name: assemble.dataset(settings.data, held, net.tokenizer, classes) for name, held in rows.splits.items()
        }
        for each in (*clients, *splits.values()):
            assemble.check_context(net.positions, settings.model.path, each.examples)
            assemble.check_tokens(net, settings.model.path, each)
        if settings.data.choices is not None:
            assemble.check_answers(settings.data, rows)

        column, labels = _labels(settings, rows, classes is not None)
        held_out = [describe(name, each, labels.get(name, ())) for name, each in splits.items()]
        held = [describe(n, d, labels.get(n, ())) for n, d in zip(rows.clients, clients, strict=True)]
        notes = remarks([*clients, *splits.values()])
        found = {
            "clients": [asdict(each) for each in held],
            "splits": [asdict(each) for each in held_out],
            "max_length": settings.data.max_length,
            "label": column,
            "skew": skew([each.labels for each in held]) if column is not None else None,
            "packed": [dict(zip(("rows", "filled"), filled(each), strict=True)) for each in clients if each.pack],
            "notes": notes,
            "examples": _examples(list(rows.clients), clients, net.tokenizer),
        }
        if plot is not None:
            title = f"{settings.name}: the rows of each client" + (f", by {column}" if column else "")
            partition_plot.draw(held, title, settings.data.max_length, plot)
        if as_json:
            echo_json(found, ascii=False)
            for note in notes:
                echo(f"thinwire: {note}", err=True)
            return
        line = shortened(list(rows.clients), clients, settings.data.max_length)
        _print(settings, found, held, line, held_out)
        if plot is not None:
            echo(f"the picture is in {plot}")


def _labels(run: Run, rows: Rows, classifies: bool) -> tuple[str | None, dict[str, list[str]]]:
    """What the labels are called, and each client's and split's; None where the rows have none.

    The closed set of answers; else the column that the partition goes by; else the answers, where they are few.
    """
    from thinwire import assemble
    from thinwire.data import templates
    from thinwire.data.errors import DataError

    template, everyone = assemble.template_of(run.data, classifies), {**rows.clients, **rows.splits}
    by = run.data.column
    if run.data.choices is None and run.data.partition in ("dirichlet", "task"):
        return by, {name: [row.text(by) for row in held] for name, held in everyone.items()}

    def answers(held: list[Row]) -> list[str]:
        return [templates.answer_value(row, template) for row in assemble.in_words(run.data, held)]

    try:
        labels = {name: answers(held) for name, held in everyone.items()}
        first = next(iter(rows.clients.values()))[0]
        column = templates.answer_column(first, template)
    except DataError:  # an answer made of several columns is no label
        return None, {}
    every = [label for name in rows.clients for label in labels[name]]
    if run.data.choices is None and not (len(set(every)) <= FEW and 4 * len(set(every)) <= len(every)):
        return None, {}
    return column, labels


def _examples(names: list[str], clients: list[Dataset], tokenizer: Any) -> list[dict[str, Any]]:
    """A few examples from as many clients as there are for them, as text: what is read, and what is trained."""
    picked = [(n % len(clients), n // len(clients)) for n in range(EXAMPLES * len(clients))]
    found: list[dict[str, Any]] = []
    for client, i in picked:
        if i < len(clients[client]) and len(found) < EXAMPLES:
            example = clients[client].examples[i]
            found.append(
                {
                    "client": names[client],
                    "place": example.place,
                    "tokens": len(example),
                    "trained_tokens": len(example.answer),
                    "masked": tokenizer.decode(example.prompt, clean_up_tokenization_spaces=False),
                    # a classifier's answer has no tokens: it is a class
                    "trained": _behind(tokenizer, example, example.answer) or example.references[0],
                    "choices": list(clients[client].choices),
                    **({} if not example.rejected else {"rejected": _behind(tokenizer, example, example.rejected)}),
                }
            )
    return found


def _behind(tokenizer: Any, example: Example, answer: tuple[int, ...]) -> str:
    """An answer as text, decoded behind the prompt: some decoders cut the space at the beginning of a text."""
    read, whole, alone = (
        str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        for tokens in (example.prompt, example.prompt + answer, answer)
    )
    return whole[len(read) :] if whole.startswith(read) else alone


def _print(
    run: Run, found: dict[str, Any], clients: list[Description], line: str | None, splits: list[Description]
) -> None:
    from rich.table import Column, Table

    from thinwire.commands.screen import Screen

    console = Screen()
    total = sum(client.rows for client in clients)
    held = "".join(f", {split.rows:,} in {split.name}" for split in splits)
    console.print(
        f"{run.name}: {total:,} rows with {len(clients):,} clients{held}; at most {found['max_length']} tokens"
    )
    lost = [name for name in ("cut", "dropped") if any(getattr(each, name) for each in (*clients, *splits))]
    heads = ("rows", *lost, "tokens", "95 %", "max", "answer")
    labels = sum((Counter(client.labels) for client in clients), Counter[str]())
    shown = sorted(labels, key=lambda label: -labels[label])
    shown = shown if len(shown) <= COLUMNS else shown[: COLUMNS - 1]
    more = ["others"] if len(shown) < len(labels) else []
    table = Table("client", *(Column(head, justify="right") for head in (*heads, *map(_short, shown), *more)))
    for each in [*clients[:LISTED], *splits]:
        tokens = each.tokens
        counts = [str(each.labels.get(label, 0)) for label in shown] if each.labels else [""] * len(shown)
        if more:
            counts.append(str(sum(n for label, n in each.labels.items() if label not in shown)) if each.labels else "")
        gone = [f"{getattr(each, name):,}" for name in lost]
        cells = (
            f"{each.rows:,}",
            *gone,
            f"{tokens.median:g}",
            f"{tokens.p95:.0f}",
            str(tokens.max),
            f"{tokens.answer:g}",
        )
        last = each is clients[:LISTED][-1]
        table.add_row(each.name, *cells, *counts, end_section=last)
    console.print(table)
    if len(clients) > LISTED:
        console.print(f"{len(clients) - LISTED:,} clients more are not listed; --json has all")
    console.print(
        "tokens: median of an example's longest text; answer: median of its positive"
        if run.data.loss == "contrastive"
        else "tokens: median an example; answer: median of the answer alone, which is what is trained on",
        soft_wrap=True,
    )
    console.print(line or f"no row is longer than {found['max_length']} tokens: none is cut", soft_wrap=True)
    for note in found["notes"]:
        console.print(note, soft_wrap=True)
    if found["skew"] is not None:
        what = f"label skew ({found['label']}): {found['skew']:.2f}"
        console.print(f"{what} (0: all clients alike, 1: each has one label only)", soft_wrap=True)
    if found["packed"]:
        rows = sum(each["rows"] for each in found["packed"])
        share = sum(each["rows"] * each["filled"] for each in found["packed"]) / rows
        console.print(f"packed into {rows:,} rows of {found['max_length']} tokens, {share:.0%} filled")
    for number, example in enumerate(found["examples"], 1):
        _print_example(console, number, example, run.data.loss == "contrastive")


def _print_example(console: Console, number: int, example: dict[str, Any], paired: bool) -> None:
    console.print()
    head = f"example {number}, {example['client']}, {example['place']}: {example['tokens']} tokens"
    kind = "the answer is scored against " + ", ".join(example["choices"]) if example["choices"] else ""
    if "rejected" in example:
        kind = "it was preferred to < what was rejected"
    kind = f"; {kind}" if kind else ""
    marks = f"| read, not trained on  > trained on{kind}"
    if paired:
        marks = "| anchor  > what belongs to it" + "  < what does not" * ("rejected" in example)
    console.print(f"{head}  {marks}", soft_wrap=True)
    for mark, part, style in (("|", "masked", "dim"), (">", "trained", "bold green"), ("<", "rejected", "red")):
        for text in _middle(example[part]).split("\n") if part in example else ():
            console.print(f"  {mark} {text}", style=style, soft_wrap=True)


def _middle(text: str) -> str:
    if len(text) <= LONG:
        return text
    left = len(text) - LONG
    return f"{text[: LONG // 2]}\n[{left:,} characters are not shown]\n{text[-LONG // 2 :]}"


def _short(label: str) -> str:
    label = " ".join(label.split())
    return label if len(label) <= 12 else label[:9] + "..."
