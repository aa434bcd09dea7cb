"""thinwire export, thinwire merge: what a run has trained, carried away whole or thin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.commands.terminal import echo, one_line, settle

if TYPE_CHECKING:
    from thinwire.config import Run


def export(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; the run need not have ended.")],
    out: Annotated[Path, typer.Option(help="The file or, without --thin, the folder to write.")],
    thin: Annotated[bool, typer.Option("--thin", help="The trained numbers alone, for who has the base.")] = False,
    bits: Annotated[int | None, typer.Option(help="With --thin: of a number, 8, 4, 2 or 1, at a loss.")] = None,
) -> None:
    """Write what a run has trained so far: a Hugging Face folder, or with --thin a file of some kilobytes."""
    with one_line():
        settle()
        from thinwire import assemble, config
        from thinwire.assemble import thin as thin_file
        from thinwire.model import numbers
        from thinwire.units import size

        if bits is not None and (not thin or bits not in (8, 4, 2, 1)):
            raise config.ConfigError(f"--bits: {bits} is not 8, 4, 2 or 1" if thin else "--bits: goes with --thin")
        if not (path / "run.toml").exists():
            raise config.ConfigError(f"{path}: no run is there")
        run = config.load(path / "run.toml")
        state = _state(path, run)
        net = assemble.net_of(run)
        run.method.materialise(state, net)
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


def merge(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What `thinwire export --thin` wrote.")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write.")],
    base: Annotated[str | None, typer.Option(help="The base model, where it is not what the file calls it.")] = None,
) -> None:
    """Make a thin file and its base one model; where factors or a prompt were trained, `adapter` is one for peft."""
    with one_line():
        settle()
        from thinwire.assemble import thin as thin_file

        net, _ = thin_file.opened(path, base)
        net.save(out)
        echo(f"{out}: a Hugging Face folder")


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
