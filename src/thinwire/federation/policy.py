"""What a server may ask of a site and what may leave it: a file of the site's own."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from thinwire.config import ConfigError, Data, Run, method_name
from thinwire.data.templates import NAMED
from thinwire.errors import first_wrong
from thinwire.methods import METHODS
from thinwire.wire import Frame, Illegal

EMPTY = ("Ready", "Stale", "Keys", "Shares")  # kinds that reveal nothing of a site's rows
SHAPED = tuple(name for name in NAMED if name != "text")  # by default no text that is not meant as an answer
LEAST = Annotated[int, Field(ge=2)]


class Asked(BaseModel):
    """The least privacy that a site asks for: noise that it adds itself (`record`), or at either end (`client`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon_at_most: PositiveFloat
    delta_at_most: PositiveFloat = 1e-3
    level: Literal["record", "client"] = "record"

    def admit(self, run: Run) -> None:
        """Illegal for a run that does not give it."""
        given, asks = run.privacy, f"this site's policy asks for privacy of a {self.level}"
        level = None if given is None else given.level
        if level is None or (level == "client" and self.level == "record"):
            raise Illegal(f"{asks}, and the run has " + ("none" if level is None else "that of a client alone"))
        for name, most in (("epsilon", self.epsilon_at_most), ("delta", self.delta_at_most)):
            if (value := getattr(given, name)) > most:
                raise Illegal(f"{asks} with {name} {most:g} at most, and the run has {value:g}")


class Policy(BaseModel):
    """`methods`: names, as `thinwire methods` lists them. `kinds`: of payloads that may leave, None: any of a method's.

    `max_bytes`: of a frame that leaves, `max_bytes_in`: of one that arrives. `evaluate`: whether scores may leave,
    mean: for the server's records only within a mean of several sites.
    `cross`: whether the other sites may be sent what this one alone has learnt, to score it.
    `masked`: a reply leaves under masks alone, in runs with [privacy.secure].
    `code`: classes of methods that are not thinwire's own, as method.path names them.

    How rows are read: `templates`, names and `task_of` other ones; `choices`, sets of answers; `lengths`, the least and
    the largest max_length; `drop`, whether rows may be left out for their length. `model`: whether the server may name
    the start model of a site that names none.

    How much: `max_rounds` answers of a kind in a run, `max_runs` run files in all, `max_steps` and `max_batch` of a
    visit, whose time is `seconds` at most. `kept_runs`: folders of runs that stay here. `privacy`: what runs must give.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = tuple(sorted(METHODS))
    kinds: tuple[str, ...] | None = None
    max_bytes: PositiveInt = 1 << 38
    max_bytes_in: PositiveInt = 1 << 38
    evaluate: bool | Literal["mean"] = True
    cross: bool = False
    masked: bool = False
    code: tuple[str, ...] = ()
    templates: tuple[str, ...] | Literal["any"] = SHAPED
    choices: tuple[tuple[str, ...], ...] | Literal["any"] = ()
    lengths: tuple[LEAST, LEAST] = (32, 1 << 15)
    drop: bool = False
    model: bool = False
    max_rounds: PositiveInt = 10_000
    max_runs: PositiveInt = 1000
    max_steps: PositiveInt = 10_000
    max_batch: PositiveInt = 1024
    seconds: PositiveFloat = 86_400.0
    kept_runs: PositiveInt = 8
    privacy: Asked | None = None

    @classmethod
    def load(cls, path: Path | None) -> Policy:
        """The policy in a TOML file, the default one without a file; ConfigError names the file and the field."""
        if path is None:
            return cls()
        try:
            policy = cls.model_validate_json(json.dumps(tomllib.loads(path.read_text(encoding="utf-8"))), strict=True)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except ValidationError as error:
            raise ConfigError(f"{path}: {first_wrong(error)}") from None
        except (ValueError, TypeError, RecursionError) as error:  # a date is no value of any field
            raise ConfigError(f"{path}: not TOML: {error}") from None
        if unknown := set(policy.methods) - set(METHODS):
            raise ConfigError(f"{path}: methods: {min(unknown)!r} is not a method; known: {', '.join(sorted(METHODS))}")
        return policy

    def admit(self, action: str, run: Run, path: str | None, frame: Frame) -> None:
        """Illegal if a frame of this run may not be worked on here; looks at no row, no model and no path."""
        name, data = method_name(run.method), run.data
        if path is not None and path not in self.code:
            raise Illegal(f"this site's policy does not allow the class {path}")
        if path is None and name not in self.methods:
            raise Illegal(f"this site's policy does not allow the method {name}")
        if self.masked and (run.privacy is None or run.privacy.secure is None):
            raise Illegal("this site's policy allows runs with [privacy.secure] alone: replies leave under masks")
        if run.federation is not None and run.federation.cross and not self.cross:
            raise Illegal(
                "this site's policy does not allow federation.cross, which shows others what it alone has learnt"
            )
        if action == "evaluate" and not self.evaluate:
            raise Illegal("this site's policy does not allow evaluation")
        if len(frame) > self.max_bytes_in:
            raise Illegal(f"this site's policy does not allow a frame of {len(frame)} bytes to come in")
        if self.templates != "any" and (task := task_of(data)) not in self.templates:
            raise Illegal(f'this site\'s policy does not allow the template; to allow it, add "{task}" to templates')
        if self.choices != "any" and data.choices is not None and data.choices not in self.choices:
            asked = json.dumps(data.choices)
            raise Illegal(f"this site's policy does not allow these choices; to allow them, add {asked} to choices")
        if not self.lengths[0] <= data.max_length <= self.lengths[1]:
            raise Illegal(f"this site's policy does not allow data.max_length = {data.max_length}")
        if data.too_long == "drop" and not self.drop:
            raise Illegal('this site\'s policy does not allow data.too_long = "drop"')
        if self.privacy is not None:
            self.privacy.admit(run)
        self._admit_work(run, path)

    def _admit_work(self, run: Run, path: str | None) -> None:
        fields = {name: value for name, value in dict(run.method).items() if type(value) is int and name != "seeds"}
        steps = fields.pop("steps", 1) * fields.pop("queries", 1)
        if steps > self.max_steps:
            raise Illegal(f"this site's policy does not allow {steps} steps a visit")
        batches = {f"method.{name}": fields.pop(name) for name in ("batch_size",) if name in fields}
        for name, value in {**batches, "eval.batch_size": run.eval.batch_size}.items():
            if value > self.max_batch:
                raise Illegal(f"this site's policy does not allow {name} = {value}")
        bounds = {f"method.{name}": value for name, value in fields.items()} if path is None else {}
        bounds["eval.max_new_tokens"] = run.eval.max_new_tokens
        bounds[f"model.{'lora' if run.model.lora else 'view'}.rank"] = (run.model.view.factors or (0,))[0]
        for name, value in bounds.items():  # what else sizes something: none is near this where a run is meant to end
            if value > 1 << 15:
                raise Illegal(f"this site does not take {name} = {value}")

    def release(self, frame: Frame) -> None:
        """Illegal if a frame may not leave."""
        kind = frame.header().kind
        if self.kinds is not None and kind not in {*self.kinds, *EMPTY}:
            raise Illegal(f"this site's policy does not allow a payload of kind {kind} to leave")
        if len(frame) > self.max_bytes:
            raise Illegal(f"this site's policy does not allow a frame of {len(frame)} bytes to leave")


def task_of(data: Data) -> str:
    """How rows are shown, as a policy lists it: a template's name, or 16 hex digits for what a run file writes out."""
    if data.prompt is None and data.words is None:
        return data.template
    words = None if data.words is None else sorted(data.words.items())
    rejected = [] if data.rejected is None else [data.rejected]
    shown = json.dumps([data.template, data.prompt, data.answer, words, *rejected])
    return hashlib.sha256(shown.encode()).hexdigest()[:16]
