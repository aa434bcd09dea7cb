"""How a method's numbers are coded, as a table of a run file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from thinwire.compress.catalogue import TensorCode, tensor_code


class Coding(BaseModel):
    """A code by its `name`, and what is its own of the other fields. `none`: the numbers themselves, without a debt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["none", "sign", "ternary", "blocks", "eden", "topk", "sketch"] = "sign"
    bits: float = 4  # of a value: blocks, eden, topk
    density: float = Field(0.05, gt=0, le=1)  # of ternary: the share that is sent as a sign, the others as 0
    share: float = Field(0.03, gt=0, le=1)  # of topk: the share that is sent
    ratio: float = Field(1.0, gt=0, le=1)  # of sketch: its numbers to those coded
    block: PositiveInt | None = None  # numbers that share a scale; sign 1024, blocks 128, ternary and topk more
    part: float = Field(1.0, gt=0, le=1)  # of the coordinates, each round another, the same for all
    carry: float = Field(1.0, ge=0, le=1)  # of what the code has lost, the share that is added to what comes next

    @model_validator(mode="after")
    def _known(self) -> Coding:
        self.code()  # raises ValueError for what it does not have
        return self

    @property
    def plain(self) -> bool:
        """Whether nothing is coded."""
        return self.name == "none"

    @property
    def one_bit(self) -> bool:
        """Whether a number is coded as its sign, under a scale."""
        return self.name == "sign" or (self.name == "blocks" and self.bits == 1)

    def code(self) -> TensorCode:
        """The codec, such as error feedback takes."""
        return tensor_code(
            self.name,
            self.bits,
            share=self.share,
            density=self.density,
            ratio=self.ratio,
            block=self.block,
            part=self.part,
            contract=True,
        )


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AnyCoding: TypeAlias = Annotated[Coding, BeforeValidator(_named)]
"""Of a run file: a table, or the name alone."""
