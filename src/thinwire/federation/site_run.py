"""A run as a site sees it: its model and rows, and what it does with a frame."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinwire import assemble, config, files, memory
from thinwire.assemble.privacy import Budget, budget_of
from thinwire.config import method_name
from thinwire.data import partition
from thinwire.data.rows import Row
from thinwire.data.source import read_file
from thinwire.evaluate.clients import Evaluation
from thinwire.federation.asked import Refused, RunSettings
from thinwire.federation.fingerprint import fingerprints
from thinwire.federation.spent import Replies, Spent, drop_old
from thinwire.federation.vouching import Vouching
from thinwire.keys import Key
from thinwire.records import read_json
from thinwire.runtime.endpoint import ACTIONS, KEYED, Endpoint
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import ClientMemory, VersionStore, files_by_round
from thinwire.train.parallel import ranks
from thinwire.wire import Frame, Header, Illegal, Together, alone

if TYPE_CHECKING:
    from torch import Tensor

    from thinwire.data.batch import Dataset
    from thinwire.federation.policy import Policy
    from thinwire.federation.site import Site

KEPT = 2  # rounds whose memory stays, as the server's checkpoints do


def run_settings(run: config.Run, sites: tuple[str, ...], session: str) -> str:
    """What the sites receive of a run: its file without the server's paths, its id, its sites, and its session."""
    data: dict[str, Any] = {
        "path": "the site's own",
        "partition": "iid",
        "heldout_tasks": None,
        "public": None,
        "values": None,
        "selection": None,
    }
    if isinstance(run.data.heldout, str):
        data["heldout"] = 0
    cross = run.federation is not None and run.federation.cross  # which a site may refuse
    stripped = run.model_copy(
        update={
            "data": run.data.model_copy(update=data),
            "federation": config.Federation(evaluate=True, cross=True) if cross else None,
            "environment": {},
            "threads": run.threads,
        }
    )
    return json.dumps(
        {"run": assemble.identity(run), "sites": list(sites), "session": session, "toml": stripped.to_toml()}
    )


@dataclass(frozen=True)
class Holding:
    """`newest`: the last round that was answered; `held`: (round, the version then held), ascending."""

    newest: int
    held: tuple[tuple[int, str | None], ...]


class Kept:
    """What a site's client keeps between rounds: its memory, and which version it held after which round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def newest(self) -> int:
        """The last round that the site has answered; 0 before any."""
        return self._read().newest

    def of(self, client: int, round: int) -> ClientMemory:
        """The memory before a round."""
        return ClientMemory(self.folder / "memory", round)

    def commit(self, memory: MutableMapping[str, Tensor], client: int) -> None:
        """Have the memory on the disk."""
        assert isinstance(memory, ClientMemory)
        memory.commit()

    def held(self, client: int, round: int) -> str | None:
        """The version that the client held before a round."""
        before = [version for number, version in self._read().held if number < round]
        return before[-1] if before else None

    def hold(self, round: int, version: str | None) -> None:
        """The site has answered in that round, and the client then holds the version."""
        before = [entry for entry in self._read().held if entry[0] < round]
        self._write(round, [*before, (round, version)])

    def rewind(self, round: int) -> None:
        """Forget what came after that round."""
        for number, file in files_by_round(self.folder / "memory"):
            if number > round:
                file.unlink()
        self._write(self.newest, [entry for entry in self._read().held if entry[0] <= round])

    def prune(self, oldest: int) -> None:
        """See ClientMemory.prune."""
        ClientMemory.prune(self.folder / "memory", oldest)

    def _read(self) -> Holding:
        file = self.folder / "held.json"
        return read_json(Holding, file) if file.exists() else Holding(0, ())

    def _write(self, newest: int, held: list[tuple[int, str | None]]) -> None:
        files.write(self.folder / "held.json", json.dumps({"newest": newest, "held": held[-KEPT - 1 :]}))


class Visits:
    """The client halves of one run at one site, in three steps: nothing is read before it has been allowed.

    Made of what the server sent alone; `load` takes the start model, `read` the site's rows.
    """

    def __init__(self, site: Site, policy: Policy, settings: str, folder: Path, spent: Spent) -> None:
        self.site, self.policy, self.spent = site, policy, spent
        found, tree = RunSettings.of(settings)
        self.asked = hashlib.sha256(settings.encode()).hexdigest()
        method, model = tree.get("method"), tree.setdefault("model", {})
        if not isinstance(method, dict) or not isinstance(model, dict):
            raise Refused("not a run: its file has no method")
        self.path: str | None = method.get("path")
        if self.path is not None and self.path not in policy.code:
            raise Refused(f"this site's policy does not allow the class {self.path!s:.100}")  # before it is imported
        model.update({k: v for k, v in {"path": site.model, "device": site.device}.items() if v is not None})
        if site.threads is not None:
            tree["threads"] = site.threads
        try:
            self.settings = run = config.parse(tree, "the server's run file")
        except config.ConfigError as error:
            raise Refused(f"{error}"[:200]) from None
        if site.model is None and not (site.allow_model or policy.model):
            raise Refused("this site names no start model, and does not take the server's word for one")
        self.run, self.sites, self.name, self.ran = found.run, found.sites, found.folder, method_name(run.method)
        self.folder, self.spool = folder / "runs" / found.folder, folder / "spool"
        self.key = Key.root(run.seed)
        self.replies, self.kept = Replies(self.folder / "replies"), Kept(self.folder)
        self.joined: int | None = None  # which client this site is, where it has joined the run since it began
        self.fingerprints: dict[str, str] = {}
        self.data: Dataset | None = None
        self.budget: Budget | None = None
        self.together: Together = alone
        try:
            self.masked = assemble.masked_clients(
                run, lambda client, *asked: spent.unmask(self.name, *asked), Vouching.of(site, self.sites)
            )
        except config.ConfigError as error:
            raise Refused(f"{error}"[:200]) from None

    @property
    def id(self) -> int:
        """The client that this site is; Refused where the run has none of its name."""
        if self.joined is not None:
            return self.joined
        if self.site.name not in self.sites:
            raise Refused(f"{self.site.name} is not one of the run's sites: {', '.join(self.sites)}"[:200])
        return self.sites.index(self.site.name)

    def seat(self, name: str | None, client: int) -> None:
        """Take the seat of a site that the run's file does not name: it has joined since, as the server says.

        A client's number is one site's, and stays it: what is private to it, and what its batches are drawn by.
        """
        if self.site.name in self.sites or name is None or self.joined is not None:
            return
        if name != self.site.name or client < len(self.sites):
            raise Refused(f"client {client} of the run, {name}, is not {self.site.name}")
        self.joined = client

    def expect(self, header: Header, action: str, again: bool) -> None:
        """Illegal for a frame of another run, for another site, or of a round that this site will not answer.

        `again`: this very request was answered before, and gets that answer once more.
        """
        if header.run != self.run:
            raise Illegal(f"a frame of run {header.run} where {self.run} is under way")
        if header.client != self.id:
            raise Illegal(f"a frame for client {header.client} was given to client {self.id}")
        if not 0 <= header.round < 1 << 32:
            raise Illegal(f"a frame of round {header.round}")
        if action == "join" or again:
            return
        if action in KEYED and not self.masked:
            raise Illegal("a frame of keys in a run without privacy.secure")
        floor = self.kept.newest if action == "train" or action in KEYED else 0
        self.spent.admit(
            self.name, action, header.round, self.policy.max_rounds, floor, bool(self.masked) and action != "evaluate"
        )

    def load(self) -> None:
        """Take the start model, and its fingerprints with it."""
        if not self.fingerprints:
            assemble.use_threads(self.settings)
            self.net = assemble.net_of(self.settings, hollow=self.settings.method.hollow)
            self.fingerprints = fingerprints(self.settings, self.net)

    def allow(self) -> None:
        """Count a run file for which a model and rows are about to be read; Refused beyond the policy's bound."""
        if self.data is None:
            self.spent.asks(self.name, self.asked[:16], self.policy.max_runs)

    def read(self) -> None:
        """Take the site's rows as the run file has it; whatever that raises is the site's own to know."""
        if self.data is not None:
            return
        run, site = self.settings, self.site
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)
        drop_old(self.folder.parent, self.policy.kept_runs, self.name)
        rows = read_file(site.data)
        scored: list[Row] | None = read_file(site.heldout) if site.heldout is not None else None
        if scored is None and site.hold_out and run.data.heldout and not isinstance(run.data.heldout, str):
            rows, scored = partition.holdout(rows, run.data.heldout, self.key.fold("heldout", site.name))
        data = assemble.client_data(run, rows, self.net)
        (some,) = assemble.scored_data(run, [scored or rows], self.net)
        for each in (data, some):
            assemble.check_context(self.net.positions, run.model.path, each.examples)
            assemble.check_tokens(self.net, run.model.path, each)
        versions = VersionStore(self.folder / "versions")
        self.budget = budget_of(run, {self.id: len(data)}, len(self.sites))
        protected = {} if self.budget is None else self.budget.protected
        parts = (self.net, versions, {self.id: data}, self.kept, self.kept.held)
        if ranks()[1] > 1 and any(protection.level == "record" for protection in protected.values()):
            raise Refused("each of this site's processes would draw noise of its own: it takes part with one alone")
        seats = Seats(self.key, run.rounds, *parts, protected=protected, together=self.together)
        found = Evaluation({self.id: some}, bool(scored), run.eval, self.policy.evaluate == "mean")
        self.endpoint = Endpoint(run.method, seats, {**ACTIONS, "evaluate": found, **self.masked}, spool=self.spool)
        self.data = data
        memory.trim()  # loading has left as much again as the model

    def answer(self, action: str, frame: Frame, counted: int) -> Frame:
        """The client's reply. What training changes is on the disk then: its memory, and the version that it holds.

        Both are taken as they were after round `counted`, the last whose reply the server has counted.
        """
        if action != "train":
            return self.endpoint.answer(action, frame)
        if self.budget is not None and self.budget.beyond(self.id, self.spent.of(self.name, action)[0] + 1):
            raise Refused("another answer would spend more than the run's privacy.epsilon")
        round = frame.header().round
        self.kept.rewind(min(counted, round - 1))
        answer = self.endpoint.answer(action, frame)
        self.kept.hold(round, answer.header().held)
        self.kept.prune(min(counted, round - KEPT))
        return answer
