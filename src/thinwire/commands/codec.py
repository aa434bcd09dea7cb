"""thinwire fit-codec: CG-FedLLM's first stage, from a run file to a codec that this run's second stage takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from thinwire.commands.terminal import Overrides, echo, echo_json, one_line, settle

if TYPE_CHECKING:
    from torch import Tensor

    from thinwire.compress.learned.lora_image import Image
    from thinwire.config import Run


def fit_codec(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="A run file of the method cgfed.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The codec's file; method.artefact by default.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Without federation: each client goes on by itself.")] = False,
    snapshots: Annotated[Path | None, typer.Option(help="A folder for the gathered updates, a file a round.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Of the training of resnet.")] = 3000,
    scaling: Annotated[Literal["none", "largest"], typer.Option(help="Of resnet's images, before its Tanh.")] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Gather the clients' updates on the spared share of their rows, and fit the codec of a run file on them.

    The updates travel as they are: nothing protects them, and their bytes are counted.
    """
    with one_line():
        settle()
        from thinwire import config
        from thinwire.methods.cgfed import CGFed

        settings = config.load(file, overrides or [])
        method = settings.method
        if not isinstance(method, CGFed):
            raise config.ConfigError(f"method.name: fit-codec is for cgfed, not {config.method_name(method)}")
        if method.codec not in ("resnet", "learned") or method.artefact is None:
            raise config.ConfigError('method.codec: fit-codec is for "resnet" and "learned", with method.artefact')
        if not method.spared:
            raise config.ConfigError("method.spared: 0 leaves no rows to fit a codec on")
        target = out if out is not None else Path(method.artefact)
        if not target.parent.is_dir():
            raise config.ConfigError(f"{target}: there is no folder {target.parent}")
        report = _fit(settings, method, target, local, snapshots, iterations, scaling)
        if as_json:
            echo_json(report)
        else:
            for name, value in report.items():
                echo(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")


def _fit(
    settings: Run,
    method: Any,
    target: Path,
    local: bool,
    snapshots: Path | None,
    iterations: int,
    scaling: Any,
) -> dict[str, Any]:
    import tempfile

    from thinwire import assemble
    from thinwire.compress.catalogue import side_of
    from thinwire.compress.learned import codec_file
    from thinwire.compress.learned.fit import TooFew, fit
    from thinwire.config import ConfigError
    from thinwire.keys import Key
    from thinwire.methods.tgap import Tgap
    from thinwire.train.factors import OnFactors

    key = Key.root(settings.seed)
    settings, rows = assemble.prepared(settings)
    if settings.rounds < 2 or len(rows.clients) < 3:
        raise ConfigError(
            "rounds, data.clients: a codec needs two rounds and three clients, some of them to judge it on"
        )
    net = assemble.begin(settings, rows).net
    image = method.image(net, side_of(method.codec))
    shared = {name: getattr(method, name) for name in OnFactors.model_fields if name != "name"}
    stage = settings.model_copy(update={"method": Tgap(**shared, federated=not local)})
    with tempfile.TemporaryDirectory() as scratch:
        rounds, counted = _gather(stage, rows, net, image, Path(scratch), snapshots)
    given = {"ratio": method.ratio, "draw": key.fold("codec").word(), "iterations": iterations, "scaling": scaling}
    try:
        tables, found = fit(method.codec, image, rounds, len(rows.clients), **given)
    except TooFew as error:
        raise ConfigError(f"rounds: {error}") from None
    fingerprint = codec_file.fingerprint(net.model, image)
    codec_file.write(target, codec_file.Artefact(method.codec, fingerprint, tables))
    return {"codec": str(target), "fingerprint": fingerprint, **counted, **found}


def _gather(
    run: Run, rows: Any, net: Any, image: Image, folder: Path, kept: Path | None
) -> tuple[list[list[Tensor]], dict[str, int]]:
    """Of each round the clients' updates, stacked, and bytes both ways. `kept`: a folder for them as they are."""
    from safetensors.torch import save_file

    from thinwire import assemble
    from thinwire.keys import Key
    from thinwire.runtime.cohort import All
    from thinwire.runtime.course import Course
    from thinwire.runtime.job import Job

    rounds: list[list[Tensor]] = []
    updates: dict[int, dict[str, Tensor]] = {}
    names, key = list(rows.clients), Key.root(run.seed).fold("tgap")
    data = assemble.clients_data(run, rows, net)
    job = Job(run.method, net, data, names, folder, 0, key, run.rounds, [All()], evaluate=list)
    job.seen = lambda _, client, up: updates.update({client: dict(up.update)})
    course = Course(job)
    course.begin()
    for number in range(1, run.rounds + 1):
        course.round()
        rounds.append([image.stack(update) for _, update in sorted(updates.items())])
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            named = {f"{id}/{name}": tensor for id, update in updates.items() for name, tensor in update.items()}
            save_file(named, kept / f"round-{number:04d}.safetensors")
        echo(f"round {number} of {run.rounds}: {len(updates)} updates", err=True)
        updates.clear()
    now = course.progress
    counted = {"gathered_bytes_up": now.bytes_up, "gathered_bytes_down": now.bytes_down}
    return rounds, counted
