"""A run, assembled, and who follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from thinwire.aggregate.weights import Agreement
from thinwire.core import Method, Server
from thinwire.keys import Key
from thinwire.records import Record
from thinwire.runtime.audit import Signer
from thinwire.runtime.cohort import Segment
from thinwire.runtime.endpoint import Action
from thinwire.runtime.round import RoundFunction, Transport, run_round
from thinwire.wire.frame import MAX_FRAME

if TYPE_CHECKING:
    from thinwire.data.batch import Dataset
    from thinwire.model.net import Net
    from thinwire.privacy.protection import Protection


class Watch:
    """Follows a run as it goes on; this one does nothing."""

    def round_begins(self, round: int, rounds: int, cohort: Sequence[int]) -> None:
        """A round begins with these clients."""

    def client_done(self, client: int) -> None:
        """A client of the round has answered."""

    def round_ends(self, record: Record, left: float) -> None:
        """The line that rounds.jsonl gets, and an estimate of the seconds left."""

    def evaluated(self, record: Record) -> None:
        """A line that evals.jsonl gets."""

    def noticed(self, line: str) -> None:
        """What people must know of a run that goes on, such as records that are lost; the log has it too."""


class Spending(Protocol):
    """What a private run may spend."""

    @property
    def protected(self) -> Mapping[int, Protection]:
        """Client -> how it is."""

    @property
    def protection(self) -> Protection | None:
        """Of whole clients, in the server's mean."""

    def spent(self, round: int) -> float | None:
        """The epsilon after a round; None where each site counts its own."""

    def ends(self, round: int) -> str | None:
        """Why the run ends after a round, before its rounds are over."""

    def statement(self, round: int) -> Record:
        """What was promised by a run of so many rounds, for its summary."""


@dataclass
class Job:
    """A run, assembled: what it trains, on whom, how long, and where it keeps its records.

    `transport` leads to clients elsewhere, for whom `clients` is empty; without it they live in this process, and can
    do `actions` beside joining and training. `survey` has the clients score a state: the records that it returns go to
    evals.jsonl too; clients in this process are asked where `evaluate` is among their actions. `caps`: client -> the
    most examples that it may claim; of clients in this process their rows.

    `stop` is called after each evaluation with where the run stands (`round`, its `loss`, the `best` round and its
    `best_loss`, and how many evaluations it has `waited` for a better one); the reason that it returns ends it. `keep`:
    whose weights `model/` has at the end, those of the last round or of the best. The loss is that of the split `on`,
    by default of the first; rounds up to `warmup` are neither the best nor waited for. `carry` is for a net without
    weights, which nothing is scored on: at the end it writes what the state is worth into the folder.

    `members` is asked before each round, with its number, which clients belong to the run from then on; None: all. It
    may add to `names` and `caps`: a client's number stays its own.

    `leave` is asked before each round: whether the run is to end here, with a checkpoint from which it goes on.

    `weights`: who counts how much, None: as the method has it. `audit`: the run keeps a log that can be checked, signed
    where there is a `signer`. `replies`: those of the last round stay in the folder. `budget`: of a private run.
    `cross`: at the end each of them is scored by all clients.
    `late`: how many rounds later a reply may still count, of a method whose updates are changes; 0 or 1.
    """

    method: Method
    net: Net
    clients: Sequence[Dataset]
    names: Sequence[str]
    folder: Path
    run: int  # an id that frames carry
    key: Key
    rounds: int
    segments: Sequence[Segment]
    evaluate: Callable[[], list[Record]]  # scores the weights in the net
    eval_every: int = 0  # 0: before the first and after the last round only
    public: Dataset | None = None
    loss: Callable[[], float] | None = None  # on the public rows, of the weights in the net
    keep_versions: int = 8
    max_bytes: int = MAX_FRAME  # of a reply
    caps: Mapping[int, int] = field(default_factory=dict)
    memory_before_model: int = 0  # bytes resident after the imports
    watch: Watch = field(default_factory=Watch)
    card: Callable[[Record], str] | None = None  # the model's README.md, of a run with that summary
    transport: Transport | None = None
    actions: Mapping[str, Action] = field(default_factory=dict)
    survey: Callable[[Any, Server, dict[int, str]], list[Record]] | None = None
    round: RoundFunction = run_round
    seen: Callable[[int, int, Any], None] | None = None  # given each reply that counts: round, client, what it is
    stop: Callable[[Record], str | bool | None] | None = None
    members: Callable[[int], Sequence[int]] | None = None
    leave: Callable[[], bool] = lambda: False
    on: str | None = None
    warmup: int = 0
    keep: Literal["last", "best"] = "last"
    carry: Callable[[Any, Path], None] | None = None
    weights: Agreement | None = None
    audit: bool = False
    signer: Signer | None = None
    replies: bool = False
    cross: bool = False
    budget: Spending | None = None
    late: int = 0
