"""`thinwire chat`: try a run's model in the terminal, a line at a time."""

from __future__ import annotations

import string
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.terminal import echo, one_line, settle

if TYPE_CHECKING:
    from thinwire.config import Data
    from thinwire.data.load import Row
    from thinwire.data.templates import Template
    from thinwire.model.flat import Net


def chat(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a Hugging Face folder.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    device: Annotated[str, typer.Option(help="As torch calls it, such as cuda:0.")] = "cpu",
) -> None:
    """Talk to the model of a run: each line is a question, an empty end of input leaves. Also reads from a pipe."""
    with one_line():
        settle()
        from thinwire import config
        from thinwire.model.find import resolve
        from thinwire.model.flat import Net
        from thinwire.model.task import labels_of, task_of

        data = config.load(path / "run.toml").data if (path / "run.toml").exists() else None
        if data is not None and not (path / "model").is_dir():
            raise config.ConfigError(f"{path}: the run has not ended, so there is no model in it yet")
        folder = resolve(str(path / "model" if data is not None else path))
        classes = labels_of(folder) if task_of(folder) == "classification" else None
        if classes is None and task_of(folder) == "classification":
            raise config.ConfigError(f"{path}: the encoder has no head that names classes, so it answers nothing")
        net = Net.open(str(folder), device=device, classes=classes)
        if classes is not None:
            answer = _namer(net, classes)
        elif data is not None and data.choices is not None and data.template != "jinja":
            answer = _chooser(net, data, data.choices)
        else:
            answer = _talker(net, data, max_new_tokens, temperature)
        for line in _lines():
            answer(line)


def _lines() -> Iterator[str]:
    """The lines of the standard input that are not blank, asked for where a person types them."""
    shown = sys.stdin.isatty() and sys.stdout.isatty()
    if shown:
        import readline  # noqa: F401 - its import makes input() one that edits

        echo("Ctrl-D leaves.")
    while True:
        try:
            line = input("> ") if shown else sys.stdin.readline()
        except EOFError:
            echo()
            return
        if not shown and not line:
            return
        if line.strip():
            yield line.strip()


def _columns(text: str) -> list[str]:
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(text) if name))


def _row(template: Template, line: str, answer: str) -> Row:
    """The line in the first column that the run's prompts show; what else they show is left empty."""
    from thinwire.data.load import Row

    first, *rest = _columns(template.prompt) or ["input"]
    return Row({**dict.fromkeys(rest, ""), **dict.fromkeys(_columns(template.answer), answer), first: line}, "input", 1)


def _chooser(net: Net, data: Data, choices: Sequence[str]) -> Callable[[str], None]:
    """What prints which of a closed set of answers scores highest, as an evaluation has it, and its share."""
    import torch

    from thinwire import build
    from thinwire.data.load import Row
    from thinwire.data.templates import Template
    from thinwire.data.tokenise import tokenise
    from thinwire.train.objective import scores

    template = build.template_of(data)

    def answer(line: str) -> None:
        if isinstance(template, Template):
            row = _row(template, line, choices[0])
        else:
            row = Row({"instruction": line, "input": "", "output": choices[0]}, "input", 1)
        held = tokenise([row], template, net.tokenizer, max_length=data.max_length, choices=choices, too_long="cut")
        batch, _ = next(held.in_order(1))
        with torch.inference_mode():
            shares = scores(net.model, batch)[0].softmax(0)
        best = int(shares.argmax())
        echo(f"{choices[best]} ({float(shares[best]):.3f})")

    return answer


def _talker(net: Net, data: Data | None, longest: int, temperature: float) -> Callable[[str], None]:
    """What prints the model's answer to a line as it is made; with a chat template it remembers the talk."""
    from transformers import TextStreamer

    from thinwire import build
    from thinwire.data.templates import Template, render

    tokenizer: Any = net.tokenizer
    template = build.template_of(data) if data is not None else None
    messages: list[dict[str, str]] = []

    def shown(line: str) -> str:
        if isinstance(template, Template):
            return render(_row(template, line, "-"), template, tokenizer).prompt
        if tokenizer.chat_template:
            messages.append({"role": "user", "content": line})
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return line

    def answer(line: str) -> None:
        text = shown(line)
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=not messages).to(net.device)
        room = getattr(net.model.config, "max_position_embeddings", None)
        length = tokens["input_ids"].shape[1]
        if room is not None and length >= room:
            messages.clear()
            echo(f"thinwire: {length} tokens do not fit into the model's {room}; forgot the talk so far", err=True)
            return
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        made = net.model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            streamer=streamer,
            max_new_tokens=longest if room is None else min(longest, room - length),
            do_sample=temperature > 0,
            use_cache=True,
            **({"temperature": temperature} if temperature > 0 else {}),
        )
        if messages:
            said = tokenizer.decode(made[0, length:], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": said.strip()})

    return answer


def _namer(net: Net, classes: tuple[str, ...]) -> Callable[[str], None]:
    """What prints the class of a line, and how sure the model is."""
    import torch

    def answer(line: str) -> None:
        tokens = net.tokenizer(line, return_tensors="pt", truncation=True).to(net.device)
        with torch.inference_mode():
            shares = net.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits.softmax(1)
        best = int(shares.argmax())
        echo(f"{classes[best]} ({float(shares[0, best]):.3f})")

    return answer
