"""What the tables of a run file have in common: they are frozen, and refuse unknown fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
