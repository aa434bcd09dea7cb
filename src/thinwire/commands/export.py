"""thinwire export, thinwire merge: what a run has trained, carried away whole or thin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.commands.terminal import echo, one_line, settle

if TYPE_CHECKING:
    from thinwire.assemble.adapters import Adapter
    from thinwire.config import Run
    from thinwire.model.net import Net


def export(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; the run need not have ended.")],
    out: Annotated[Path, typer.Option(help="The file or, without --thin, the folder to write.")],
    thin: Annotated[bool, typer.Option("--thin", help="The trained numbers alone, for who has the base.")] = False,
    bits: Annotated[int | None, typer.Option(help="With --thin: of a number, 8, 4, 2 or 1, at a loss.")] = None,
    gguf: Annotated[str | None, typer.Option(metavar="q8_0|f16|f32", help="A folder for llama.cpp and Ollama.")] = None,
) -> None:
    """Write what a run has trained so far: a Hugging Face folder, or with --thin a file of some kilobytes.

    With --gguf the folder has a GGUF file, which is read again and compared with the model, and Ollama's Modelfile.
    """
    with one_line():
        settle()
        from thinwire import assemble, config
        from thinwire.assemble import thin as thin_file
        from thinwire.model import numbers
        from thinwire.units import size

        if bits is not None and (not thin or bits not in (8, 4, 2, 1)):
            raise config.ConfigError(f"--bits: {bits} is not 8, 4, 2 or 1" if thin else "--bits: goes with --thin")
        if gguf is not None and (thin or gguf not in ("q8_0", "f16", "f32")):
            why = "does not go with --thin" if thin else f"{gguf} is not q8_0, f16 or f32"
            raise config.ConfigError(f"--gguf: {why}")
        if not (path / "run.toml").exists():
            raise config.ConfigError(f"{path}: no run is there")
        run = config.load(path / "run.toml")
        state = _state(path, run)
        net = assemble.net_of(_with_classes(path, run))
        run.method.materialise(state, net)
        if gguf is not None:
            _write_gguf(net, run, out, gguf)
            return
        if not thin:
            net.save(out)
            echo(f"{out}: a Hugging Face folder")
            return
        own = getattr(state, "numbers", None)
        change = numbers.change(net) if own is None else own
        classes = assemble.classes_of(run, net.folder)
        found = thin_file.of(net, change, run, classes, bits, getattr(state, "stages", None))
        written = thin_file.write(out, found)
        echo(f"{out}: {size(written)}, {change.numel():,} numbers on {run.model.path}")


def _write_gguf(net: Net, run: Run, out: Path, kind: str) -> None:
    """The GGUF file and its Modelfile, in a folder that appears whole or not at all."""
    import re

    from thinwire.assemble.modelfile import modelfile
    from thinwire.config import ConfigError
    from thinwire.model import gguf_file
    from thinwire.model.folder import whole_folder
    from thinwire.units import size

    gguf_file.check_writable(net)
    if out.exists() and not (out.is_dir() and all(f.suffix == ".gguf" or f.name == "Modelfile" for f in out.iterdir())):
        raise ConfigError(f"--out: will not replace {out}: it is not what an export with --gguf has written")
    file = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', run.name).strip('-.') or 'model'}-{kind}.gguf"
    with whole_folder(out, replace=True) as folder:
        found = gguf_file.write(net, folder / file, kind, run.name)
        text, left = modelfile(file, run.data, net.tokenizer)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    written = size((out / file).stat().st_size)
    echo(f"{out / file}: {written}; read again, the next token is the model's {found.same} of {found.of} times")
    echo(f"{out / 'Modelfile'}: ollama create {run.name} -f {out / 'Modelfile'}")
    for what in left:
        echo(f"  not translated: {what}")


def merge(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="A thin file; or several runs, thin files, adapters."),
    ],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write.")],
    base: Annotated[str | None, typer.Option(help="The base model, where it is not what the file calls it.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of each of several, such as 2,1; by default all alike.")] = None,
) -> None:
    """Make a thin file and its base one model; where factors or a prompt were trained, `adapter` is one for peft.

    Several runs, thin files or folders of peft's with LoRA factors: the model with the mean of their products.
    """
    with one_line():
        settle()
        from thinwire.assemble import adapters
        from thinwire.assemble import thin as thin_file

        shares = _weights(weights, len(paths))
        if len(paths) == 1 and not paths[0].is_dir():
            net, _ = thin_file.opened(paths[0], base)
            net.save(out)
            echo(f"{out}: a Hugging Face folder")
            return
        rank = adapters.merge([_adapter(path, base) for path in paths], shares, out)
        echo(f"{out}: a Hugging Face folder; {out / 'adapter'}: its factors, of rank {rank}, for peft")


def _weights(text: str | None, count: int) -> list[float]:
    from thinwire.config import ConfigError

    if text is None:
        return [1.0] * count
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(0 < weight < float("inf") for weight in found):
        raise ConfigError(f"--weights: {text} is not {count} numbers above 0 with commas between them")
    return found


def _adapter(path: Path, base: str | None) -> Adapter:
    """What stands beside the layers of a base: of a run's folder, a thin file, a folder of peft's."""
    from thinwire import assemble, config
    from thinwire.assemble import adapters
    from thinwire.assemble import thin as thin_file
    from thinwire.model.folder import ADAPTER

    if (path / "run.toml").exists():
        run = config.load(path / "run.toml")
        state, net = _state(path, run), assemble.net_of(_with_classes(path, run))
        run.method.materialise(state, net)
        return adapters.of_net(path, net)
    if (path / ADAPTER).exists():
        return adapters.read(path, base)
    if path.is_dir():
        raise config.ConfigError(f"{path}: neither a run's folder nor one with an {ADAPTER}")
    return adapters.of_net(path, thin_file.opened(path, base)[0])


def _state(path: Path, run: Run) -> Any:
    """Of the run's last round, or of its best where that is what it keeps."""
    from thinwire import config
    from thinwire.runtime import checkpoint

    folder, method = path / "state", run.method
    found = checkpoint.read(folder, method.State)
    if found is None:
        raise config.ConfigError(f"{path}: no round of the run has ended, so there is nothing to carry away")
    best = found.progress.best
    return found.state if run.eval.keep == "last" or best is None else checkpoint.kept(folder, best, method.State)


def _with_classes(path: Path, run: Run) -> Run:
    """A run whose classes its rows named, with those: the model that it left has them."""
    left = path / "model" / "config.json"
    if run.data.choices is not None or not left.is_file():
        return run
    about = json.loads(left.read_text(encoding="utf-8"))
    if not any(str(name).endswith("ForSequenceClassification") for name in about.get("architectures") or ()):
        return run
    classes = tuple(label for _, label in sorted((int(i), str(label)) for i, label in about["id2label"].items()))
    return run.model_copy(update={"data": run.data.model_copy(update={"choices": classes})})
