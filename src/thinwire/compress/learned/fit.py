"""A codec from the updates of clients in rounds: what it is learnt on, and what it is judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from thinwire.compress.catalogue import code_of
from thinwire.compress.learned import autoencoder, codebooks
from thinwire.compress.learned.fidelity import cosine, fidelity
from thinwire.compress.learned.lora_image import Image


class TooFew(ValueError):
    """There are not updates enough both to learn a codec and to judge it."""


Scaling = Literal["none", "largest"]  # of resnet's images, before its Tanh


def fit(
    kind: Literal["resnet", "learned"],
    image: Image,
    rounds: Sequence[Sequence[Tensor]],
    clients: int,
    *,
    ratio: int,
    draw: int,
    iterations: int,
    scaling: Scaling = "none",
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The tables of a codec, and how it fares on updates that it was not learnt on, beside EDEN and the mean.

    `rounds`: of each round the stacked updates of the `clients` that answered; the last fifth of the clients and the
    last quarter of the rounds are held out together, and judged on. `draw`: the key of resnet's first weights.
    TooFew: there are none for one of them.
    """
    few, late = max(1, round(0.8 * clients)), max(1, int(0.75 * len(rounds)))
    seen = [x for updates in rounds[:late] for x in updates[:few]]
    judged = [updates[few:] if len(updates[few:]) > 1 else updates[-2:] for updates in rounds[late:]]
    if not seen or not judged or any(len(updates) < 2 for updates in judged):
        raise TooFew("too few clients answered to fit a codec and to judge it")
    curve: list[float] = []
    if kind == "learned":
        tables = codebooks.fit(image, seen)
    else:
        largest = max(float(x.abs().max()) for x in seen)
        scale = torch.tensor([0.95 / largest if scaling == "largest" and largest else 1.0])
        model = autoencoder.AutoEncoder.drawn(draw)
        curve = autoencoder.fit(model, [x * scale for x in seen], iterations)
        tables = autoencoder.tables_of(model, seen, scale)
    found = fidelity(code_of(kind, ratio, image, tables), judged)
    eden = fidelity(code_of("eden", ratio, image), judged)
    mean = torch.stack(seen).mean(0)
    others = [cosine(mean, x) for updates in judged for x in updates]
    report = {
        "codec_bytes": sum(t.numel() * t.element_size() for t in tables.values()),
        "snapshots": len(seen),
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
    return tables, report
