"""The rows of the conformance matrix: methods, set so that the loss falls on the tiny model, and what was measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from federation import tiny_net

from thinwire.aggregate.air import Air
from thinwire.aggregate.robust import Clipped, Median, Trimmed, Vote
from thinwire.aggregate.server_step import Momentum
from thinwire.compress.coding import Coding
from thinwire.config.schema import Model
from thinwire.core import Method
from thinwire.methods.cgfed import CGFed
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedcybgd import FedCyBGD
from thinwire.methods.feddm import FedDM
from thinwire.methods.fedelmy import FedELMY
from thinwire.methods.fedex import FedEx
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedobd import FedOBD
from thinwire.methods.fedzo import FedZO
from thinwire.methods.feedsign import FeedSign
from thinwire.methods.ferret import Ferret
from thinwire.methods.flexlora import FlexLora
from thinwire.methods.flora import FLora
from thinwire.methods.gradualdiff import GradualDiff
from thinwire.methods.hetlora import HetLora
from thinwire.methods.onebit import OneBit
from thinwire.methods.rolora import RoLora
from thinwire.methods.scaffold import Scaffold
from thinwire.methods.slora import SLora
from thinwire.methods.tgap import Tgap
from thinwire.model.net import Net


class Row(NamedTuple):
    """A method, the bytes of its frames to and from client 0 in round 1, and how far ten rounds lower client 0's loss.

    Bytes that depend on the weights are held to 10 %, the loss to half of its fall.
    """

    method: Method
    down: Any
    up: Any
    fall: float


about = partial(pytest.approx, rel=0.1)
SEEDS: dict[str, Any] = {"seeds": 64, "lr": 2e-4, "eps": 1e-3, "steps": 8, "batch_size": 4}
ROWS = {
    "fedavg": Row(FedAvg(lr=3e-3, steps=4, batch_size=4), 108_395, 108_397, 12.45),
    "fedavg-sgd": Row(
        FedAvg(lr=0.5, steps=4, batch_size=4, optimiser="sgd", weighting="uniform"), 108_395, 108_397, 13.06
    ),
    "fedavg-median": Row(FedAvg(lr=3e-3, steps=4, batch_size=4, aggregation=Median()), 108_395, 108_397, 12.63),
    "fedavg-air": Row(FedAvg(lr=3e-3, steps=4, batch_size=4, aggregation=Air(snr=20, jam=-30)), 108_395, 108_397, 12.8),
    "fedavg-core": Row(FedAvg(lr=1e-2, steps=4, batch_size=4), 1_300, 1_302, 1.53),
    "fedit": Row(FedAvg(lr=1e-2, steps=4, batch_size=4), 4_096, 4_098, 2.84),
    "fedit-trimmed": Row(FedAvg(lr=1e-2, steps=4, batch_size=4, aggregation=Trimmed()), 4_096, 4_098, 3.03),
    "fedit-kept": Row(FedAvg(lr=1e-2, steps=4, batch_size=4, moments="kept", schedule="linear"), 4_096, 4_098, 1.00),
    "fedavg-keep": Row(FedAvg(lr=1e-2, steps=4, batch_size=4), 2_324, 2_326, 2.84),
    "ffa": Row(FedAvg(lr=1e-2, steps=4, batch_size=4), 1_812, 1_814, 0.83),
    "rolora": Row(RoLora(lr=1e-2, steps=4, batch_size=4), 4_130, 1_847, 1.11),
    "fedex": Row(FedEx(lr=1e-2, steps=4, batch_size=4), 4_132, 4_131, 2.86),
    "flora": Row(FLora(lr=1e-2, steps=4, batch_size=4), 75, 4_131, 1.12),
    "flora-ranks": Row(FLora(lr=1e-2, steps=4, batch_size=4, ranks={1: 2, 2: 1}), 75, 4_131, 0.89),
    "flexlora": Row(FlexLora(lr=1e-2, steps=4, batch_size=4, ranks={1: 2, 2: 3}), 4_099, 4_098, 2.28),
    "hetlora": Row(HetLora(lr=1e-2, steps=4, batch_size=4, ranks={1: 2, 2: 3}, keep=0.7), 4_097, 4_098, 1.37),
    "slora": Row(SLora(lr=1e-2, steps=4, batch_size=4), 4_104, 4_098, 2.53),
    "fedkseed": Row(FedKSeed(**SEEDS), 97, 100, 4.07),
    "fedkseed-median": Row(FedKSeed(**SEEDS, shared=True, aggregation=Clipped(then=Median())), 97, 100, 3.96),
    "fedkseed-lora": Row(FedKSeed(**(SEEDS | {"lr": 3e-3})), 97, 100, 0.55),
    "fedkseed-pro": Row(FedKSeed(**SEEDS, pro=True), 116, 100, 3.69),
    "fedkseed-tied": Row(FedKSeed(**(SEEDS | {"lr": 3e-3})), 97, 100, 0.60),
    "fedkseed-paper": Row(FedKSeed(**SEEDS, wire="paper"), 336, 117, 4.09),
    "fedkseed-paper-pro": Row(FedKSeed(**SEEDS, wire="paper", pro=True), 594, 117, 3.16),
    "fedkseed-gaussian": Row(FedKSeed(**SEEDS, law="gaussian", together=True), 97, 100, 4.35),
    "fedkseed-lowrank": Row(FedKSeed(**SEEDS, law="lowrank", rank=2, queries=2, scalars="float32"), 97, 148, 5.11),
    "fedkseed-shared": Row(FedKSeed(**SEEDS, shared=True, weighting="uniform"), 97, 100, 4.46),
    "fedkseed-baffle": Row(FedKSeed(**(SEEDS | {"steps": 1, "queries": 8}), shared=True, sides=1), 97, 100, 0.65),
    "fedkseed-tied-law": Row(FedKSeed(**SEEDS, law="tied"), 97, 100, 3.84),
    "gradualdiff": Row(GradualDiff(lr=3e-3, steps=4, batch_size=4), about(90_196), about(88_173), 12.50),
    "gradualdiff-shared": Row(
        GradualDiff(lr=3e-3, steps=4, batch_size=4, start="shared", rounding="nearest", server="momentum"),
        about(1_104),
        about(88_173),
        13.04,
    ),
    "gradualdiff-lora": Row(GradualDiff(lr=1e-2, steps=4, batch_size=4), about(2_505), about(3_639), 2.84),
    "gradualdiff-bf16": Row(GradualDiff(lr=3e-3, steps=4, batch_size=4), about(36_760), about(34_394), 12.73),
    "gradualdiff-residue": Row(
        GradualDiff(lr=3e-3, steps=4, batch_size=4, rounding="residue", server="adam", server_lr=3e-3),
        about(36_760),
        about(34_377),
        11.89,
    ),
    "gradualdiff-int4": Row(
        GradualDiff(lr=3e-3, steps=4, batch_size=4, codec="blocks", bits=4), about(90_196), about(14_837), 13.06
    ),
    "gradualdiff-lowrank": Row(
        GradualDiff(lr=3e-3, steps=4, batch_size=4, codec="lowrank", rank=4), about(36_760), about(3_917), 12.70
    ),
    "gradualdiff-eden": Row(
        GradualDiff(lr=3e-3, steps=4, batch_size=4, codec="eden", bits=1), about(90_196), about(4_465), 12.71
    ),
    "gradualdiff-topk": Row(
        GradualDiff(lr=3e-3, steps=4, batch_size=4, codec="topk", share=0.05, gate=True, server="yogi", server_lr=3e-3),
        about(36_760),
        about(2_642),
        3.70,
    ),
    "fedcybgd": Row(
        FedCyBGD(lr=1e-2, steps=4, batch_size=4, blocks=2, common=0, drop=0.5, prune=0.5, spared=(0, 0)),
        about(38_418),
        about(32_252),
        4.49,
    ),
    "fedcybgd-parallel": Row(
        FedCyBGD(
            lr=1e-2,
            steps=4,
            batch_size=4,
            blocks=2,
            extra=("embeddings",),
            variant="parallel",
            damping=0.5,
            around="4bit",
            coded=False,
            rounding="nearest",
            order="random",
        ),
        about(76_392),
        about(70_768),
        13.00,
    ),
    "fedcybgd-full": Row(FedCyBGD(lr=3e-3, steps=4, batch_size=4, variant="full"), about(90_213), about(88_126), 12.45),
    "cgfed": Row(CGFed(lr=1e-2, steps=4, batch_size=4, ratio=16), about(45_402), about(318), 2.44),
    "cgfed-eden": Row(CGFed(lr=1e-2, steps=4, batch_size=4, codec="eden", ratio=32), about(4_102), about(188), 2.80),
    "cgfed-coded": Row(
        CGFed(lr=1e-2, steps=4, batch_size=4, codec="powersgd", ratio=16, feedback=True, gate=0.2, downlink="coded"),
        about(4_134),
        about(289),
        1.00,
    ),
    "cgfed-state": Row(
        CGFed(lr=1e-2, steps=4, batch_size=4, codec="none", encode="state", spared=0.3),
        about(4_102),
        about(3_650),
        2.83,
    ),
    "onebit": Row(OneBit(lr=1e-2, steps=4, batch_size=4, schedule="constant"), 83, 141, 0.81),
    "onebit-vote": Row(OneBit(lr=1e-2, steps=4, batch_size=4, schedule="constant", aggregation=Vote()), 83, 141, 0.84),
    "onebit-core": Row(OneBit(lr=1e-2, steps=4, batch_size=4, schedule="constant"), 83, 110, 1.28),
    "onebit-lora": Row(
        OneBit(lr=1e-2, steps=4, batch_size=4, code=Coding(name="blocks", bits=2), moments="fresh", warmup=2),
        83,
        315,
        0.83,
    ),
    "onebit-keep": Row(OneBit(lr=1e-2, steps=4, batch_size=4, schedule="constant"), 83, 142, 2.42),
    "onebit-weights": Row(
        OneBit(lr=3e-3, steps=4, batch_size=4, code_down=Coding(name="ternary", density=0.3)), 83, 141, 10.72
    ),
    "onebit-part": Row(
        OneBit(lr=1e-2, steps=4, batch_size=4, code=Coding(part=0.5), schedule="constant"), 83, 110, 0.71
    ),
    "onebit-plain": Row(OneBit(lr=1e-2, steps=4, batch_size=4, code=Coding(name="none")), 83, 2_078, 0.78),
    "fedobd": Row(FedOBD(lr=3e-3, steps=4, batch_size=4, dropout=0.4), 1_016, about(8_427), 12.48),
    "fedobd-senders": Row(
        FedOBD(lr=3e-3, steps=5, batch_size=4, unsent="senders", down="weights", stage_one=2, server_step=Momentum()),
        about(31_106),
        about(18_168),
        11.48,
    ),
    "fedobd-plain": Row(FedOBD(lr=1e-2, steps=4, batch_size=4, codec="none"), 4_094, 2_067, 1.89),
    "scaffold": Row(Scaffold(lr=0.5, steps=4, batch_size=4), 216_749, 216_755, 13.0),
    "scaffold-lora": Row(Scaffold(lr=1.0, steps=4, batch_size=4, warmup=2, weighting="examples"), 8_151, 8_157, 0.75),
    "feddm": Row(
        FedDM(lr=3e-3, rows=2, length=6, steps=4, batch_size=4, server_steps=8, rho=1.0, rows_lr=0.1),
        108_389,
        1_681,
        11.22,
    ),
    "fedelmy": Row(FedELMY(lr=3e-3, steps=2, batch_size=4, pool=3), 108_395, 108_397, 12.61),
    "fedelmy-lora": Row(FedELMY(lr=1e-2, steps=2, batch_size=4, pool=3, received=False, beta=0.5), 4_096, 4_098, 0.79),
    "tgap": Row(Tgap(lr=1e-2, steps=4, batch_size=4), 4_096, 4_099, 2.84),
    "feedsign": Row(FeedSign(lr=2e-3, eps=1e-3, steps=4, batch_size=4), 43, 44, 1.26),
    "ferret": Row(Ferret(lr=1e-2, steps=4, batch_size=4, coordinates=256), 107, 604, 5.69),
    "ferret-lowrank": Row(
        Ferret(lr=1e-2, steps=4, batch_size=4, seeds=16, coordinates=4096, law="lowrank"), 104, 732, 3.47
    ),
    "fedzo": Row(FedZO(**(SEEDS | {"seeds": 1 << 32})), 108_411, 108_397, 4.86),
}


VIEWS = {  # rows that run on another net than the whole model in float32
    **dict.fromkeys(
        ["cgfed", "cgfed-coded", "cgfed-eden", "cgfed-state", "fedit", "fedit-kept", "fedit-trimmed"], "lora"
    ),
    **dict.fromkeys(
        ["fedkseed-lora", "fedobd-plain", "gradualdiff-lora", "onebit-lora", "scaffold-lora", "tgap"], "lora"
    ),
    "fedelmy-lora": "lora",
    **dict.fromkeys(["gradualdiff-bf16", "gradualdiff-lowrank", "gradualdiff-residue", "gradualdiff-topk"], "bfloat16"),
    **dict.fromkeys(["fedkseed-tied", "onebit", "onebit-part", "onebit-plain", "onebit-vote"], "tied factors"),
    "onebit-weights": "tied weights",
    **dict.fromkeys(["fedavg-core", "onebit-core"], "core"),
    **dict.fromkeys(["fedavg-keep", "onebit-keep"], "lora keep"),
    "ffa": "lora of B",
    **dict.fromkeys(["flexlora", "hetlora", "rolora"], "lora"),
    **dict.fromkeys(["fedex", "flora", "flora-ranks", "slora"], "lora on weights that change"),
}
TARGETS = ["q_proj", "v_proj"]
MODELS: dict[str, dict[str, Any]] = {  # as a run file's [model] has them, but for the path
    "whole": {},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"view": {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": TARGETS}},
    "core": {"view": {"kind": "core", "rank": 8, "alpha": 8.0, "targets": TARGETS}},
    "lora keep": {"view": {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": TARGETS, "keep": ["*.B"]}},
    "lora of B": {"view": {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": TARGETS, "freeze_a": True}},
    "lora on weights that change": {"view": {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": TARGETS}},
    "tied factors": {"view": {"kind": "tied", "numbers": 500, "targets": TARGETS}},
    "tied weights": {"dtype": "bfloat16", "view": {"kind": "tied", "numbers": 500, "over": "weights"}},
}
Nets = dict[str, Net]


def opened(folder: Path) -> Nets:
    """The tiny model whole, in bfloat16, and under each view."""
    tiny_net(folder)
    models = {name: Model.model_validate(settings) for name, settings in MODELS.items()}
    return {name: Net.open(str(folder), m.dtype, remember=True, view=m.view) for name, m in models.items()}


def model_of(row: str) -> str:
    """The name of the model that a row runs on."""
    return VIEWS.get(row, "whole")


def net_for(row: str, nets: Nets) -> Net:
    """The one that a row runs on."""
    return nets[model_of(row)]
