"""A run's folder, claimed for one run file: what is there already is refused, or is that very run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from thinwire import __version__
from thinwire.commands.terminal import echo

if TYPE_CHECKING:
    from thinwire.config import Run


GoOn = Annotated[
    bool, typer.Option("--go-on", help="Begin the run, or go on with it where it has begun: what a supervisor starts.")
]


@contextmanager
def claimed(folder: Path, settings: Run, resume: bool, alone: bool = True) -> Iterator[bool]:
    """Hold a run's folder, or where not `alone` share it; yields whether the run is complete, and is shown then."""
    from thinwire.commands.show import print_summary
    from thinwire.runtime.folder import ended, locked

    check_place(folder, resume)
    with locked(folder) if alone else nullcontext():
        claim(folder, settings, resume)
        if complete := ended(folder):
            echo(f"{folder}: this run is complete")
            print_summary(folder)
        yield complete


def check_place(folder: Path, resume: bool) -> None:
    """Refuse what is no folder, and no run to resume, before a lock makes one."""
    from thinwire import config

    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise config.ConfigError(f"--out: {there} is not a folder")
    if resume and not folder.exists():
        raise config.ConfigError(f"{folder}: there is no run to resume")


def claim(folder: Path, settings: Run, resume: bool) -> None:
    """Refuse a folder that holds anything but, under --resume, this very run."""
    from thinwire import config
    from thinwire.runtime.folder import FILE

    if not (folder / "run.toml").exists():
        if folder.exists() and {path.name for path in folder.iterdir()} - {FILE, "run.toml.part"}:
            raise config.ConfigError(f"{folder}: not empty, and not a run; choose another --out")
        if resume:
            raise config.ConfigError(f"{folder}: there is no run to resume")
        return
    if not resume:
        raise config.ConfigError(f"{folder}: already holds a run; choose another --out, or go on with --resume")
    other = config.load(folder / "run.toml")
    if (difference := settings.first_difference(other)) is not None:
        raise config.ConfigError(f"{folder}: holds another run: {difference}")


def record(folder: Path, settings: Run, fingerprints: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write run.toml; ConfigError where a run goes on that began with other rows or another start model."""
    from thinwire import config, files

    file = folder / "run.toml"
    if file.exists():
        began = config.load(file).environment
        for name, what in (("rows", "the clients' rows"), ("weights", "the start model's weights")):
            if name in began and began[name] != fingerprints.get(name, began[name]):
                raise config.ConfigError(
                    f"{folder}: {what} are not those that the run began with; put them back, or begin anew with "
                    "another --out"
                )
    environment = {**_environment(), **fingerprints}
    folder.mkdir(parents=True, exist_ok=True)
    files.write(file, settings.model_copy(update={"environment": environment}).to_toml())


def _environment() -> dict[str, str]:
    import platform

    import numpy
    import torch
    import transformers

    return {
        "thinwire": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
