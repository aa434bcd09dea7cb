"""The methods: one file each, one line in the table, found by `name`. None is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thinwire.core import Method

PLACES = {
    "cgfed": "thinwire.methods.cgfed:CGFed",
    "fedavg": "thinwire.methods.fedavg:FedAvg",
    "fedcybgd": "thinwire.methods.fedcybgd:FedCyBGD",
    "feddm": "thinwire.methods.feddm:FedDM",
    "fedelmy": "thinwire.methods.fedelmy:FedELMY",
    "fedex": "thinwire.methods.fedex:FedEx",
    "fedkseed": "thinwire.methods.fedkseed:FedKSeed",
    "fedobd": "thinwire.methods.fedobd:FedOBD",
    "fedzo": "thinwire.methods.fedzo:FedZO",
    "feedsign": "thinwire.methods.feedsign:FeedSign",
    "ferret": "thinwire.methods.ferret:Ferret",
    "flexlora": "thinwire.methods.flexlora:FlexLora",
    "flora": "thinwire.methods.flora:FLora",
    "gradualdiff": "thinwire.methods.gradualdiff:GradualDiff",
    "hetlora": "thinwire.methods.hetlora:HetLora",
    "onebit": "thinwire.methods.onebit:OneBit",
    "rolora": "thinwire.methods.rolora:RoLora",
    "scaffold": "thinwire.methods.scaffold:Scaffold",
    "slora": "thinwire.methods.slora:SLora",
    "tgap": "thinwire.methods.tgap:Tgap",
}


class Methods(Mapping[str, "type[Method]"]):
    """Name -> class of a table of places; what a class needs, torch above all, is imported when it is asked for."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> type[Method]:
        module, _, cls = self._places[name].partition(":")
        found: type[Method] = getattr(import_module(module), cls)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


METHODS = Methods(PLACES)
