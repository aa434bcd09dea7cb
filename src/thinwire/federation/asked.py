"""What a server puts to a site, checked in one place before anything else looks at it.

No value from outside becomes part of a path unless it has passed here: a transfer, a session and a run are numbers in
hex, and sites are names. What a run file names besides (its method, its model, how rows are read) is for the site's
policy to allow.
"""

from __future__ import annotations

import tomllib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thinwire.errors import first_wrong
from thinwire.federation.channel import Table
from thinwire.federation.keys import NAME

Number = Annotated[int, Field(ge=0, lt=1 << 32)]
Size = Annotated[int, Field(ge=0, lt=1 << 40)]
Hex = Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]
Word = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Site = Annotated[str, Field(pattern=f"^{NAME}$")]


class Refused(Exception):
    """The site does not answer; the message, which the server receives, is the reason."""


class Question(BaseModel):
    """A piece of a frame, or the wish for a piece of a reply (`total` is 0); the hashes are what sites compare."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    action: Literal["join", "train", "evaluate", "keys", "shares", "unmask"]
    transfer: Word
    offset: Size
    total: Size
    room: int = Field(ge=1, le=1 << 30)  # of the largest piece that may go back
    counted: Number
    settings: str = Field(max_length=1 << 20)
    base: Hex | None = None
    tokenizer: Hex | None = None
    prompt: Hex | None = None
    format: Hex | None = None
    site: Site | None = None  # whose client the frame is for

    @classmethod
    def of(cls, table: Table) -> Question:
        """The question in a message; Refused for one that is none."""
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            raise Refused(f"not a question: {first_wrong(error)}"[:200]) from None

    def hashes(self) -> dict[str, str]:
        """The fingerprints that the server sent."""
        found = {"base": self.base, "tokenizer": self.tokenizer, "prompt": self.prompt, "format": self.format}
        return {name: value for name, value in found.items() if value is not None}


class RunSettings(BaseModel):
    """What the sites receive of a run: its number, its folder's session, its sites, and its file."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    run: Number
    session: Word
    sites: tuple[Site, ...] = Field(max_length=100_000)
    toml: str

    @classmethod
    def of(cls, settings: str) -> tuple[RunSettings, dict[str, Any]]:
        """What the text holds, and the tree of its run file; Refused for one that is none."""
        try:
            found = cls.model_validate_json(settings)
            return found, tomllib.loads(found.toml)
        except ValidationError as error:
            raise Refused(f"not a run: {first_wrong(error)}"[:200]) from None
        except (ValueError, RecursionError) as error:
            raise Refused(f"not a run: {type(error).__name__} in its file") from None

    @property
    def folder(self) -> str:
        """The name of the run's folder at a site."""
        return f"{self.run:08x}-{self.session}"
