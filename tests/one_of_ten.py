"""What one client of ten can do to a result, method by method: `python tests/one_of_ten.py [--rounds 6] [--markdown]`.

Ten clients, all in each round, honest but for one, whose replies are forged in a shape that is legal. `off` is how far
the final weights are from the honest run's, in units of how far the honest run has moved.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from federation import Federation, closed_data, tiny_net
from torch import Tensor

from thinwire import wire
from thinwire.compress.catalogue import code_of
from thinwire.compress.entropy.packing import to_tensor
from thinwire.core import Method
from thinwire.evaluate.loss import mean_loss
from thinwire.methods.cgfed import CGFed
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedcybgd import FedCyBGD
from thinwire.methods.fedex import FedEx
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedobd import FedOBD
from thinwire.methods.fedzo import FedZO
from thinwire.methods.feedsign import FeedSign, packed, unpacked
from thinwire.methods.ferret import Ferret
from thinwire.methods.flexlora import FlexLora
from thinwire.methods.flora import FLora
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.methods.hetlora import HetLora
from thinwire.methods.onebit import OneBit
from thinwire.methods.rolora import RoLora
from thinwire.methods.scaffold import Scaffold
from thinwire.methods.slora import SLora
from thinwire.model.net import Net
from thinwire.model.views import Lora
from thinwire.train.products import OnProducts, cut, places, rank_of
from thinwire.train.versions import coded
from thinwire.wire import Frame
from thinwire.wire.legal import LARGEST

SIZES = (12, 8, 16, 10, 9, 14, 11, 8, 13, 12)
ONE = 3  # the client that lies
FIRST: dict[str, Any] = {"steps": 4, "batch_size": 4}
ZEROTH: dict[str, Any] = {"lr": 2e-4, "eps": 1e-3, "steps": 8, "batch_size": 4}
METHODS: dict[str, Method] = {
    "fedkseed": FedKSeed(**ZEROTH, seeds=64),
    "fedavg": FedAvg(**FIRST, lr=3e-3),
    "fedit": FedAvg(**FIRST, lr=1e-2),
    "fedzo": FedZO(**ZEROTH),
    "gradualdiff": GradualDiff(**FIRST, lr=3e-3),
    "gradualdiff lowrank": GradualDiff(**FIRST, lr=3e-3, codec="lowrank", rank=4),
    "fedcybgd": FedCyBGD(**FIRST, lr=1e-2, blocks=2, common=0),
    "cgfed": CGFed(**FIRST, lr=1e-2, ratio=16),
    "onebit": OneBit(**FIRST, lr=1e-2),
    "ferret": Ferret(**FIRST, lr=1e-2, coordinates=256),
    "feedsign": FeedSign(lr=2e-3, eps=1e-3, steps=8, batch_size=4),
    "fedobd": FedOBD(**FIRST, lr=3e-3),
    "scaffold": Scaffold(**FIRST, lr=0.3),
    "rolora": RoLora(**FIRST, lr=1e-2),
    "flexlora": FlexLora(**FIRST, lr=1e-2),
    "hetlora": HetLora(**FIRST, lr=1e-2),
    "fedex": FedEx(**FIRST, lr=1e-2),
    "flora": FLora(**FIRST, lr=1e-2),
    "slora": SLora(**FIRST, lr=1e-2),
}
ON_FACTORS = {"fedit", "cgfed", "onebit", "rolora", "flexlora", "hetlora"}
ABOVE = {"fedex", "flora", "slora"}  # on factors, and what is below them changes too
Forge = Callable[["Federation", Any], Any]


def scaled(federation: Federation, up: Any, by: float) -> Any:
    """The reply with what it adds to the model times `by`."""
    if isinstance(federation.method, FedKSeed):
        return up_of_scalars(up, (up.scalars.double() * by).clamp(-6e4, 6e4))
    return changed(federation, up, lambda update: update * by)


def up_of_scalars(up: Any, scalars: Tensor) -> Any:
    """A reply of FedKSeed with these scalars in place of its own."""
    return dataclasses.replace(up, scalars=scalars.to(up.scalars.dtype))


def changed(federation: Federation, up: Any, hand: Callable[[Tensor], Tensor]) -> Any:
    """The reply with a hand on what it adds to the model, tensor by tensor, coded as an honest one is."""
    method, state = federation.method, federation.state
    if isinstance(method, CGFed):
        image = method._layout(state)
        update = hand(method._decoded(state, up, image))
        code = code_of("eden" if up.spare else method.codec, method.ratio, image, state.codec, method.feedback)
        try:
            return dataclasses.replace(up, code=to_tensor(code.encode(update, up.key)))
        except ValueError:  # the codec has no word for it, but the one for every update has
            code = code_of("eden", method.ratio, image, contract=method.feedback)
            return dataclasses.replace(up, code=to_tensor(code.encode(update, up.key)), spare=True)
    if isinstance(method, FedCyBGD):
        given = dict(method._answered(state, up))
        moved = {n: new(state.weights[n], hand(t.float() - state.weights[n].float())) for n, t in given.items()}
        return dataclasses.replace(up, changes={n: coded(moved[n], state.weights[n]) for n in moved})
    if isinstance(method, GradualDiff):
        given, changes = method._differences(state, up), {}
        for i, (name, old) in enumerate(state.weights.items()):
            update = hand(given[name])
            if method.codec == "lossless":
                changes[name] = coded(new(old, update), old)
            else:
                changes[name], _ = method._lossy(method.code(), old, update, up.key, i)
        return dataclasses.replace(up, changes=changes)
    if isinstance(method, Ferret):
        update = hand(up.coordinates.double() * up.unit)
        unit = float(update.abs().max())
        return dataclasses.replace(up, coordinates=(update / unit).half(), unit=unit)
    if isinstance(method, FeedSign):
        signs = hand(torch.from_numpy(unpacked(up.bits, up.silent, method.steps)).double()).sign()
        bits, silent = packed(signs.numpy().astype("int8"))
        return dataclasses.replace(up, bits=bits, silent=silent)
    if isinstance(method, FedOBD):
        changes = {n: hand(method._change(code, n, state.weights[n].shape)) for n, code in up.weights.items()}
        sent = {n: method._coded(change, torch.zeros_like(change)) for n, change in changes.items()}
        return dataclasses.replace(up, weights=sent)
    if isinstance(method, OneBit):
        code = method.code.code()
        update = hand(code.decode(bytes(up.change.tolist()), state.numbers.shape, 0))
        return dataclasses.replace(up, change=to_tensor(code.encode(update, 0)))
    known = getattr(state, "values", None) or getattr(state, "factors", None) or state.weights
    if isinstance(method, FLora):  # which begins anew
        known = {n: t if ".lora_A." in n else torch.zeros_like(t) for n, t in up.weights.items()}
    elif isinstance(method, OnProducts):
        known = cut(known, rank_of(up.weights))
    weights = {n: new(known[n], hand(t.float() - known[n].float())) for n, t in up.weights.items()}
    if isinstance(method, Scaffold):
        up = dataclasses.replace(up, controls={n: hand(t.float()).to(t.dtype) for n, t in up.controls.items()})
    return dataclasses.replace(up, weights=weights)


def new(old: Tensor, update: Tensor) -> Tensor:
    """A tensor after an update, in its own dtype."""
    return (old.float() + update).to(old.dtype)


def worst(federation: Federation, up: Any, size: float = 5.9e4) -> Any:
    """The largest that a reply may be."""
    if isinstance(federation.method, FedKSeed):
        return up_of_scalars(up, torch.full(up.scalars.shape, size, dtype=torch.float64))
    if isinstance(federation.method, FeedSign) and size > LARGEST:
        raise ValueError("a sign has no size")
    if isinstance(federation.method, OnProducts) and size < LARGEST:  # which is of a product
        sides = [up.weights[p.left].numel() * up.weights[p.right].numel() for p in places(up.weights).values()]
        size = 0.9 * math.sqrt(size / math.sqrt(max(sides)))
    return changed(federation, up, lambda update: torch.full_like(update, size))


def first_round(federation: Federation, up: Any) -> Any:
    """The same, in the first round alone."""
    return worst(federation, up) if federation.round == 1 else up


ATTACKS: dict[str, Forge] = {
    "sign flip": partial(scaled, by=-1.0),
    "x -10": partial(scaled, by=-10.0),
    "x 1e3": partial(scaled, by=1e3),
    "examples 1e6": lambda federation, up: dataclasses.replace(up, examples=10**6),
    "largest legal": worst,
    "largest, round 1": first_round,
    "weights 3e38": partial(worst, size=3e38),
}


def weights_of(federation: Federation) -> Tensor:
    """All weights that a state means, float64 [n]."""
    federation.method.materialise(federation.state, federation.net)
    return torch.cat([p.detach().double().flatten() for p in federation.net.model.parameters()])


def begun(
    method: Method, net: Net, folder: Path, rounds: int, forge: Forge | None = None, sizes: tuple[int, ...] = SIZES
) -> Federation:
    """A federation before its first round; `forge` makes the replies of client ONE."""

    def tamper(client: int, frame: Frame) -> Frame:
        if forge is None or client != ONE:
            return frame
        header = frame.header()
        up = forge(federation, wire.decode(method.Up, frame))
        return wire.encode(up, run=header.run, round=header.round, client=client, held=header.held)

    federation = Federation(method, net, folder, rounds=rounds, sizes=sizes, tamper=tamper)
    federation.caps = dict(enumerate(sizes))
    return federation


def nets(folder: Path) -> Callable[[str], Net]:
    """Method -> the net that it trains."""
    view = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))
    whole = tiny_net(folder)
    factors, above = (Net.open(str(folder), remember=True, view=view) for _ in range(2))
    return lambda name: factors if name in ON_FACTORS else above if name in ABOVE else whole


def table(folder: Path, rounds: int, names: Mapping[str, Method] = METHODS) -> list[dict[str, Any]]:
    """A row for each method and attack: off, loss, replies dropped, and the first reason."""
    net_of, rows = nets(folder / "model"), []
    for name, method in names.items():
        net = net_of(name)
        held = closed_data(net, 24, 5)

        def loss(net: Net = net, held: Any = held) -> float:
            return mean_loss(net.model, held, 8)[0]

        honest = begun(method, net, folder / name / "honest", rounds).run()
        end = weights_of(honest)
        rows.append({"method": name, "attack": "none", "off": 0.0, "loss": loss(), "dropped": 0, "reason": ""})
        start = Federation(method, net, folder / name / "start", sizes=SIZES)
        moved = float((end - weights_of(start)).norm())
        for attack, forge in ATTACKS.items():
            try:
                ended = begun(method, net, folder / name / attack, rounds, forge).run()
            except ValueError as error:  # the codec has no word for it, so it cannot be sent
                row = {"off": math.nan, "loss": math.nan, "dropped": rounds, "reason": str(error)}
                rows.append({"method": name, "attack": attack, **row})
                continue
            found = weights_of(ended)
            errors = [at.visits[ONE].error for at in ended.history if at.visits[ONE].error]
            off = float((found - end).norm()) / moved
            rows.append(
                {
                    "method": name,
                    "attack": attack,
                    "off": off if math.isfinite(off) else math.inf,
                    "loss": loss(),
                    "dropped": len(errors),
                    "reason": errors[0] if errors else "",
                }
            )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = table(Path(folder), args.rounds, {name: METHODS[name] for name in args.methods.split(",")})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    out = sys.stdout.write
    out(f"| method (honest loss) | {' | '.join(ATTACKS)} |\n| --- |{' --- |' * len(ATTACKS)}\n")
    for name in args.methods.split(","):
        mine = {row["attack"]: row for row in rows if row["method"] == name}
        cells = [_cell(mine[attack], args.rounds) for attack in ATTACKS]
        out(f"| {name} ({mine['none']['loss']:.3f}) | {' | '.join(cells)} |\n")


def _cell(row: Mapping[str, Any], rounds: int) -> str:
    if row["dropped"] >= rounds:
        return "cannot be sent" if math.isnan(row["off"]) else "dropped"
    some = f", dropped {row['dropped']}x" if row["dropped"] else ""
    return f"{row['off']:.2g}, loss {row['loss']:.3g}{some}"


if __name__ == "__main__":
    main()
