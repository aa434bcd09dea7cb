"""The methods: one file each, one line in the union, discriminated by `name`."""

from typing import Annotated

from pydantic import Field

from thinwire.methods.cgfed import CGFed
from thinwire.methods.fedavg import FedAvg
from thinwire.methods.fedcybgd import FedCyBGD
from thinwire.methods.fedkseed import FedKSeed
from thinwire.methods.fedzo import FedZO
from thinwire.methods.gradualdiff import GradualDiff

AnyMethod = Annotated[CGFed | FedAvg | FedCyBGD | FedKSeed | FedZO | GradualDiff, Field(discriminator="name")]
METHODS = {cls.model_fields["name"].default: cls for cls in (CGFed, FedAvg, FedCyBGD, FedKSeed, FedZO, GradualDiff)}
