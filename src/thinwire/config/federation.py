"""The run file's table [federation]: sites, how long they are waited for, and who counts how much."""

from __future__ import annotations

import re

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from thinwire.aggregate.weights import Agreement
from thinwire.config.section import Section


class Federation(Section):
    """A run on other machines: `sites`, by name, are its clients, in this order; each holds its own rows.

    A reply that takes longer than `deadline` seconds counts as absent for the round; a round with fewer replies than
    `quorum` ends the run, which can go on later. A site that is not connected is waited for at most `patience` seconds.
    Frames beyond `chunk_bytes` travel in pieces. With `evaluate` each site scores the weights on its held-out rows
    too; in one process each client does, on its own rows.
    With `join` a site that is registered at the hub while the run goes on takes part from the next round on.
    `max_examples`: that a site may claim, and so count in a mean, where it was not registered with a number of its own.
    Without `model` the server has no weights in memory, where the method can do without: it scores nothing itself, and
    the run ends with model.thin, which a machine that can hold the model makes one of. `weights`: who counts how much,
    also in one process; without, as the method has it. With `audit` the run's folder has audit.jsonl, a log that
    `thinwire audit` checks. With `keep_replies` those of the last round stay, for `thinwire contributions`.
    With `cross` cross.json has at the end how what each client alone has learnt in the last round scores at each.
    `late`: 1 has a reply that comes after the deadline count in the next round, as `weights.stale` says; 0 drops it.
    """

    sites: tuple[str, ...] = ()
    deadline: PositiveFloat = 3600.0
    quorum: PositiveInt = 1
    patience: NonNegativeFloat = 120.0
    chunk_bytes: int = Field(3 << 24, ge=1 << 10, le=1 << 30)
    evaluate: bool = False
    join: bool = False
    max_examples: PositiveInt | None = None
    model: bool = True
    weights: Agreement | None = None
    audit: bool = True
    keep_replies: bool = False
    cross: bool = False
    late: int = Field(0, ge=0, le=1)

    @model_validator(mode="after")
    def _compared(self) -> Federation:
        if self.cross and not self.evaluate:
            raise ValueError("cross goes together with evaluate = true: by it the sites score what others have learnt")
        return self

    @field_validator("sites")
    @classmethod
    def _sites(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
                raise ValueError(f"{name!r} is not a name: letters, digits, dots, dashes; 64 at most")
        if len(set(value)) < len(value):
            raise ValueError("a name is there twice")
        return value
