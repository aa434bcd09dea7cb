"""The run file's table [privacy]: whose part in the model is bounded, by how much, and who sees replies."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from thinwire.config.section import Section
from thinwire.errors import ConfigError
from thinwire.privacy.secure import Secure


class Privacy(Section):
    """Differential privacy: who sees all that a run releases learns of one unit at most what epsilon and delta say.

    `level`: the unit is a `record`, a row of a client's, and each client adds noise itself, so that the server need not
    be trusted; or a whole `client`, and the server, which is trusted, adds noise to the mean. `clip` bounds a unit's
    part: of a record its gradient, in zeroth order its derivatives along a step's directions; of a client its update.
    `noise` times that is the noise's deviation on the sum; left out, it is the least with which all rounds stay within
    `epsilon`. With a noise of its own the run ends before the round that would go beyond. A round of fewer than
    `minimum` clients is refused.

    With `secure` replies are added up under masks, and the server sees their sum alone; that may be all there is.
    """

    level: Literal["record", "client"] | None = None
    epsilon: PositiveFloat | None = None
    delta: float = Field(1e-5, gt=0, lt=1)
    clip: PositiveFloat = 1.0
    noise: PositiveFloat | None = None
    minimum: PositiveInt = 1
    secure: Secure | None = None

    @model_validator(mode="after")
    def _noise(self) -> Privacy:
        lacking = [name for name in ("level", "epsilon") if getattr(self, name) is None]
        if lacking and (len(lacking) == 1 or self.secure is None):
            raise ConfigError(f"privacy.{lacking[0]}: missing")
        if self.noise is not None and self.noise < 1e-2:
            raise ConfigError(f"privacy.noise: {self.noise:g} is below 0.01, which hides nothing")
        return self

    @property
    def most(self) -> float:
        """The epsilon of a run that has one."""
        assert self.epsilon is not None
        return self.epsilon
