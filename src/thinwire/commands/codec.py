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

    Snapshots = list[list[Tensor]]  # of each round, of each client


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
    scaling: str,
) -> dict[str, Any]:
    import tempfile
    from dataclasses import asdict

    import torch

    from thinwire import build
    from thinwire.compress.catalogue import code_of, side_of
    from thinwire.compress.learned import autoencoder, codec_file, components
    from thinwire.compress.learned.fidelity import cosine, fidelity
    from thinwire.config import ConfigError
    from thinwire.keys import Key
    from thinwire.methods.tgap import Tgap
    from thinwire.train.factors import OnFactors

    build.use_threads(settings)
    rows = build.rows_of(settings.data, Key.root(settings.seed))
    if settings.rounds < 2 or len(rows.clients) < 3:
        raise ConfigError(
            "rounds, data.clients: a codec needs two rounds and three clients, some of them to judge it on"
        )
    net = build.net_of(settings, remember=True)
    image = method.image(net, side_of(method.codec))
    with tempfile.TemporaryDirectory() as scratch:
        shared = {name: getattr(method, name) for name in OnFactors.model_fields if name != "name"}
        tgap = Tgap(**shared, federated=not local)
        rounds, counted = _gather(settings, tgap, net, image, rows, Path(scratch), snapshots)
    # The last fifth of the clients and the last quarter of the rounds are held out together, and judged on.
    clients, late = max(1, round(0.8 * len(rows.clients))), max(1, int(0.75 * len(rounds)))
    seen = [x for updates in rounds[:late] for x in updates[:clients]]
    judged = [updates[clients:] if len(updates[clients:]) > 1 else updates[-2:] for updates in rounds[late:]]
    if not seen or not judged or any(len(updates) < 2 for updates in judged):
        raise ConfigError("rounds: too few clients answered to fit a codec and to judge it")
    curve: list[float] = []
    if method.codec == "learned":
        tables = components.fit(image, seen)
    else:
        largest = max(float(x.abs().max()) for x in seen)
        scale = torch.tensor([0.95 / largest if scaling == "largest" and largest else 1.0])
        model = autoencoder.AutoEncoder.drawn(Key.root(settings.seed).fold("codec").word())
        curve = autoencoder.fit(model, [x * scale for x in seen], iterations)
        tables = autoencoder.tables_of(model, seen, scale)
    codec_file.write(target, codec_file.Artefact(method.codec, codec_file.fingerprint(net.model, image), tables))
    found = fidelity(code_of(method.codec, method.ratio, image, tables), judged)
    eden = fidelity(code_of("eden", method.ratio, image), judged)
    mean = torch.stack(seen).mean(0)
    others = [cosine(mean, x) for updates in judged for x in updates]
    report = {
        "codec": str(target),
        "fingerprint": codec_file.fingerprint(net.model, image),
        "codec_bytes": sum(t.numel() * t.element_size() for t in tables.values()),
        "snapshots": len(seen),
        "gathered_bytes_up": counted[0],
        "gathered_bytes_down": counted[1],
        **{f"heldout_{name}": value for name, value in asdict(found).items()},
        "eden_cosine": eden.cosine,
        "eden_mean": eden.mean,
        "zero_cosine": 0.0,
        "zero_error": 1.0,
        "train_mean_cosine": sum(others) / len(others),
    }
    if curve:
        marks = sorted({0, *(len(curve) * i // 8 for i in range(8)), len(curve) - 1})
        report["loss_curve"] = ", ".join(f"{i + 1}: {curve[i]:.3g}" for i in marks)
    return report


def _gather(
    settings: Run, tgap: Any, net: Any, image: Image, rows: Any, scratch: Path, kept: Path | None
) -> tuple[Snapshots, tuple[int, int]]:
    """The updates of all clients in all rounds, and the bytes that they took up and down."""
    from safetensors.torch import save_file

    from thinwire import build, wire
    from thinwire.keys import Key
    from thinwire.runtime.endpoint import ACTIONS, Endpoint
    from thinwire.runtime.inprocess import InProcess
    from thinwire.runtime.round import Reply, Round, run_round
    from thinwire.runtime.seats import Seats
    from thinwire.runtime.store import ClientMemories, VersionStore

    key = Key.root(settings.seed).fold("tgap")
    data = [build.client_data(settings, held, net.tokenizer) for held in rows.clients.values()]
    versions, memories = VersionStore(scratch / "versions"), ClientMemories(scratch / "clients")
    cohort, rounds, held = tuple(range(len(data))), [], dict[int, str]()
    up = down = 0

    seats = Seats(key, settings.rounds, net, versions, data, memories, lambda client, _: held.get(client))

    class Tee:
        """The transport, with what the server is told written down."""

        def __init__(self, inner: InProcess) -> None:
            self.inner = inner

        def exchange(self, frames: Any) -> Any:
            reply: Reply
            for reply in self.inner.exchange(frames):
                if reply.frame is not None:
                    seen[reply.client] = dict(wire.decode(tgap.Up, reply.frame).update)
                yield reply

    state = tgap.init(seats.server(0, cohort))
    for round in range(1, settings.rounds + 1):
        seen: dict[int, dict[str, Tensor]] = {}
        transport = Tee(InProcess(Endpoint(tgap, seats, ACTIONS)))
        at = Round(0, seats.server(round, cohort), transport, held)
        state, _ = run_round(tgap, state, at)
        up, down = up + at.ledger.bytes_up, down + at.ledger.bytes_down
        rounds.append([image.stack(x) for id, x in sorted(seen.items()) if at.visits[id].error is None])
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            named = {f"{id}/{name}": tensor for id, told in seen.items() for name, tensor in told.items()}
            save_file(named, kept / f"round-{round:04d}.safetensors")
        echo(f"round {round} of {settings.rounds}: {len(seen)} updates", err=True)
    return rounds, (up, down)
