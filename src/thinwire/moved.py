"""Where modules were before they had rooms: for one release the old names are found, each with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PLACES = {
    "apart": "compare.measure",
    "build": "assemble",
    "card": "assemble.card",
    "compress.artefact": "compress.learned.codec_file",
    "compress.autoencoder": "compress.learned.autoencoder",
    "compress.coarse": "compress.exact.coarse",
    "compress.codes": "compress.entropy.packing",
    "compress.components": "compress.learned.components",
    "compress.counted": "compress.entropy.static",
    "compress.factors": "compress.codecs.factors",
    "compress.fidelity": "compress.learned.fidelity",
    "compress.forecast": "compress.exact.ulp_forecast",
    "compress.image": "compress.learned.lora_image",
    "compress.importance": "model.importance",
    "compress.integers": "compress.entropy.integers",
    "compress.lowrank": "compress.codecs.powersgd",
    "compress.qsgd": "compress.codecs.qsgd",
    "compress.quantise": "compress.codecs.blocks",
    "compress.rans": "compress.entropy.rans",
    "compress.rotate": "compress.codecs.eden",
    "compress.rounding": "compress.exact.rounding",
    "compress.shrink": "model.shrink",
    "compress.sparsify": "compress.codecs.topk",
    "compress.symbols": "compress.entropy.adaptive",
    "compress.tokens": "compress.exact.ulp_tokens",
    "compress.trellis": "compress.entropy.trellis",
    "compress.ulp": "compress.exact.ulp",
    "data.description": "data.statistics",
    "data.hub": "data.huggingface",
    "data.load": "data.rows",
    "data.packaged": "data.bundled",
    "data.picture": "data.partition_plot",
    "data.proposal": "data.guess_columns",
    "data.table": "data.tabular",
    "estimate.estimate": "estimate.costs",
    "evaluate.evaluate": "evaluate.splits",
    "federation.hub": "federation.superlink",
    "federation.loop": "federation.server_app",
    "federation.payloads": "runtime.payloads",
    "federation.question": "federation.asked",
    "federation.survey": "federation.questions",
    "federation.visits": "federation.site_run",
    "model.adapters": "model.views.lora",
    "model.find": "model.resolve",
    "model.flat": "model.net",
    "model.head": "model.classifier",
    "model.hollow": "model.meta",
    "model.settle": "model.tokens_and_generation",
    "model.task": "model.classifier",
    "perturb.anywhere": "perturb.torch_kernels",
    "perturb.cpu": "perturb.gaussian_cpu",
    "perturb.gpu": "perturb.triton_kernels",
    "perturb.lowrank": "perturb.table_replay",
    "perturb.products": "perturb.matmul_replay",
    "perturb.signs": "perturb.sign_cpu",
    "perturb.table": "perturb.normal_table",
    "perturb.threads": "threads",
    "perturb.zeroth": "perturb.spsa",
    "runtime.envelope": "federation.envelope",
    "runtime.flower": "federation.transport",
    "runtime.loop": "runtime.course",
    "show": "commands.show",
    "standings": "compare.table",
    "terminal": "commands.terminal",
    "train.schedule": "train.local",
}


class Moved(MetaPathFinder, Loader):
    """An import of an old name gives the module that is there now."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}  # old name -> the spec of the module that is there now

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.removeprefix("thinwire.") in PLACES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = "thinwire." + PLACES[spec.name.removeprefix("thinwire.")]
        warnings.warn(f"{spec.name} is {now} now, and goes with the next release", DeprecationWarning, stacklevel=6)
        found = import_module(now)
        self._specs[spec.name] = found.__spec__
        return found

    def exec_module(self, module: ModuleType) -> None:
        given = module.__spec__
        if given is not None:  # the machinery has just put the old name's in its place
            module.__spec__ = self._specs.pop(given.name, given)


def install() -> None:
    """Have Python look here for what it does not find elsewhere."""
    sys.meta_path.append(Moved())
