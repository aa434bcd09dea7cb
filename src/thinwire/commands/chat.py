"""`thinwire chat`: try a run's model in the terminal, a line at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.commands.terminal import echo, one_line, settle
from thinwire.data.shown import printable

if TYPE_CHECKING:
    from thinwire.config import Data
    from thinwire.data.batch import Dataset
    from thinwire.data.rows import Row
    from thinwire.model.net import Net


def chat(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="A run's folder, a Hugging Face folder, thin files of one base.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    device: Annotated[str, typer.Option(help="As torch calls it, such as cuda:0.")] = "cpu",
    base: Annotated[str | None, typer.Option(help="The model that thin files are of, where it is elsewhere.")] = None,
) -> None:
    """Talk to the model of a run: each line is a question, an empty end of input leaves. Also reads from a pipe.

    Of thin files the first answers; `/use NAME` goes on with another, `/use base` with the model that they are of.
    """
    with one_line():
        settle()
        from thinwire import config
        from thinwire.model.classifier import labels_of, task_of
        from thinwire.model.net import Net
        from thinwire.model.resolve import resolve
        from thinwire.model.views import Full, saved_in

        path = paths[0]
        if path.is_file() or len(paths) > 1:
            _switch(paths, base, device, max_new_tokens, temperature)
            return
        data = config.load(path / "run.toml").data if (path / "run.toml").exists() else None
        _check_answers(data)
        if data is not None and not (path / "model").is_dir():
            raise config.ConfigError(f"{path}: the run has not ended, so there is no model in it yet")
        folder = resolve(str(path / "model" if data is not None else path))
        classes = labels_of(folder) if task_of(folder) == "classification" else None
        if classes is None and task_of(folder) == "classification":
            raise config.ConfigError(f"{path}: the encoder has no head that names classes, so it answers nothing")
        net = Net.open(folder, device=device, classes=classes, view=saved_in(folder) or Full())
        answer = _answerer(net, data, classes, max_new_tokens, temperature)
        for line in _lines():
            answer(line)


def _switch(paths: Sequence[Path], base: str | None, device: str, max_new_tokens: int, temperature: float) -> None:
    """Talk to thin files over one base model. A switch begins a new talk; what is no answer goes to stderr."""
    from thinwire.assemble import thin

    shelf = thin.Shelf(paths, base, device)

    def using(name: str) -> Callable[[str], None]:
        net, found = shelf.use(name)
        return _answerer(net, shelf.data, found.classes, max_new_tokens, temperature)

    now = shelf.names[0]
    answer = using(now)
    known = [*shelf.names, thin.BASE]
    if len(paths) > 1:
        _list(shelf.paths, now)
    for line in _lines("Ctrl-D leaves. /use NAME answers with another file, /use base without any."):
        word, _, name = line.partition(" ")
        if word != "/use":
            answer(line)
        elif not name.strip():
            _list(shelf.paths, now)
        elif name.strip() not in known:
            echo(f"thinwire: no file is called {name.strip()}; there are: {', '.join(known)}", err=True)
        else:
            now = name.strip()
            answer = using(now)
            echo(f"thinwire: {now} answers", err=True)


def _list(paths: Mapping[str, Path], now: str) -> None:
    """The names that `/use` knows, that of who answers marked."""
    known: dict[str, object] = {**paths, "base": "no file: the model alone"}
    for name, about in known.items():
        echo(f"{'*' if name == now else ' '} {name}: {about}", err=True)


def _check_answers(data: Data | None) -> None:
    """ConfigError for a model that only embeds."""
    if data is not None and data.loss == "contrastive":
        from thinwire.errors import ConfigError

        raise ConfigError('data.loss: "contrastive" trains embeddings, and they answer nothing')


def _answerer(
    net: Net, data: Data | None, classes: Sequence[str] | None, max_new_tokens: int, temperature: float
) -> Callable[[str], None]:
    """What answers a line: with one of a closed set, or in the model's own words; ConfigError where nothing does."""
    _check_answers(data)
    choices = classes or (data.choices if data is not None else None)
    if choices is not None:
        return _chooser(net, data, choices, classes is not None)
    return _talker(net, data, max_new_tokens, temperature)


def _lines(hint: str = "Ctrl-D leaves.") -> Iterator[str]:
    """The lines of the standard input that are not blank, asked for where a person types them."""
    shown = sys.stdin.isatty() and sys.stdout.isatty()
    if shown:
        import readline  # noqa: F401 - its import makes input() one that edits

        typer.echo(hint)
    while True:
        try:
            line = input("> ") if shown else sys.stdin.readline()
        except EOFError:
            typer.echo()
            return
        if not shown and not line:
            return
        if line.strip():
            yield line.strip()


def _chooser(net: Net, data: Data | None, choices: Sequence[str], classifies: bool) -> Callable[[str], None]:
    """What prints which of a closed set of answers scores highest, as an evaluation has it, and its share."""
    import torch

    from thinwire import assemble
    from thinwire.assemble.asked import row_of
    from thinwire.data.classes import WHOLE, classify
    from thinwire.data.tokenise import tokenise
    from thinwire.train.objective import scores

    template = assemble.template_of(data, classifies) if data is not None else WHOLE
    longest = net.tokenizer.model_max_length if data is None else data.max_length

    def read(row: Row) -> Dataset:
        if classifies:
            return classify([row], template, net.tokenizer, max_length=longest, classes=choices)
        return tokenise([row], template, net.tokenizer, max_length=longest, choices=choices, too_long="cut")

    def answer(line: str) -> None:
        batch, _ = next(read(row_of(template, line, choices[0])).in_order(1))
        with torch.inference_mode():
            shares = scores(net.model, batch)[0].softmax(0)
        best = int(shares.argmax())
        echo(f"{choices[best]} ({float(shares[best]):.3f})")

    return answer


def _talker(net: Net, data: Data | None, longest: int, temperature: float) -> Callable[[str], None]:
    """What prints the model's answer to a line as it is made; with a chat template it remembers the talk.

    It is given the tokens that a row with that line as its question has in training, and answers as an evaluation does.
    """
    import torch

    from thinwire import assemble
    from thinwire.assemble.asked import row_of
    from thinwire.data.templates import NAMED, Chat
    from thinwire.data.tokenise import tokenise
    from thinwire.evaluate.text import answer_of, decoding

    tokenizer: Any = net.tokenizer
    model: Any = net.model
    template = NAMED["chat" if tokenizer.chat_template else "completion"]
    if data is not None:
        template = assemble.template_of(data)
    if template == NAMED["text"]:  # the model goes on with the line
        template = NAMED["completion"]
    talk: list[dict[str, str]] = []

    def answer(line: str) -> None:
        row = row_of(template, line, "-", talk)
        held = tokenise([row], template, tokenizer, max_length=sys.maxsize, eos=False)
        assemble.check_tokens(net, "the model", held)
        prompt = torch.tensor([held.examples[0].prompt], device=net.device)
        room = net.positions
        length = prompt.shape[1]
        if room is not None and length >= room:
            talk.clear()
            echo(f"thinwire: {length} tokens do not fit into the model's {room}; forgot the talk so far", err=True)
            return
        with decoding(net.model, tokenizer, held, temperature) as (ends, texts):
            made = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=None if texts else _streamer(tokenizer, ends),
                max_new_tokens=longest if room is None else min(longest, room - length),
            )
        text = answer_of(tokenizer, made[0, length:].tolist(), ends, texts)
        if texts:  # an end that is a text is known when it is there
            echo(text)
        if isinstance(template, Chat):
            talk.extend(({"role": "user", "content": line}, {"role": "assistant", "content": text}))

    return answer


def _streamer(tokenizer: Any, ends: set[int]) -> Any:
    """What prints tokens as they are made, but for those that end an answer."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or int(value) not in ends:
                super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(printable(text), nl=stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
