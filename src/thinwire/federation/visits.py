"""A run as a site sees it: its model and rows, and what it does with a frame."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinwire import build, config, memory, wire
from thinwire.core import Client, serve
from thinwire.data import partition
from thinwire.data.load import Row
from thinwire.data.source import read_file
from thinwire.evaluate.evaluate import Split, evaluate
from thinwire.federation.fingerprint import fingerprints
from thinwire.federation.payloads import Ready, Scores
from thinwire.keys import Key
from thinwire.runtime.store import ClientMemory, VersionStore, files_by_round
from thinwire.wire import Frame, Header, Illegal

if TYPE_CHECKING:
    from thinwire.federation.worker import Site

KEPT = 2  # rounds whose memory stays, as the server's checkpoints do


def told(run: config.Run, sites: tuple[str, ...], session: str) -> str:
    """What the sites are told of a run: its file without the server's paths, its id, its sites, and its session."""
    data = {"path": "the site's own", "partition": "iid", "heldout_tasks": None, "public": None, "values": None}
    if isinstance(run.data.heldout, str):
        data["heldout"] = 0
    stripped = run.model_copy(
        update={"data": run.data.model_copy(update=data), "federation": None, "environment": {}, "threads": run.threads}
    )
    return json.dumps(
        {"run": build.identity(run), "sites": list(sites), "session": session, "toml": stripped.to_toml()}
    )


class Visits:
    """The client halves of one run at one site. DataError, ModelError, ConfigError: it cannot be assembled here."""

    def __init__(self, site: Site, told: dict[str, Any], folder: Path) -> None:
        tree = tomllib.loads(told["toml"])
        model = tree.setdefault("model", {})
        model.update({k: v for k, v in {"path": site.model, "device": site.device}.items() if v is not None})
        if site.threads is not None:
            tree["threads"] = site.threads
        self.path: str | None = tree["method"].get("path")
        self.settings = run = config.parse(tree, "the server's run file")
        self.run, self.sites, self.name = int(told["run"]), tuple(told["sites"]), site.name
        if site.name not in self.sites:
            raise Illegal(f"{site.name} is not one of the run's sites: {', '.join(self.sites)}")
        self.id = self.sites.index(site.name)
        self.key = Key.root(run.seed)
        self.folder = folder / "runs" / f"{self.run:08x}-{str(told['session'])[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        build.use_threads(run)
        self.net = build.net_of(run, hollow=run.method.hollow)
        self.fingerprints = fingerprints(run, self.net)
        rows = read_file(site.data)
        scored: list[Row] | None = read_file(site.heldout) if site.heldout is not None else None
        if scored is None and site.hold_out and run.data.heldout and not isinstance(run.data.heldout, str):
            rows, scored = partition.holdout(rows, run.data.heldout, self.key.fold("heldout", site.name))
        self.data = build.client_data(run, rows, self.net.tokenizer)
        self.heldout = bool(scored)
        some = build.dataset(run.data, scored or rows, self.net.tokenizer, build.classes_of(run))
        self.scored = Split("sites", replace(some, examples=some.examples[: run.eval.rows]), run.eval.generate)
        self.versions = VersionStore(self.folder / "versions")
        memory.trim()  # loading has left as much again as the model
        self.actions: dict[str, Callable[[Frame, Path, int], Frame]] = {
            "join": self.join,
            "train": self.train,
            "evaluate": self.evaluate,
        }

    def expect(self, header: Header, action: str) -> None:
        """Illegal for a frame of another run, for another site, or of a round that this site has gone beyond."""
        if action not in self.actions:
            raise Illegal(f"a frame for {action!r:.40}")
        if header.run != self.run:
            raise Illegal(f"a frame of run {header.run} where {self.run} is under way")
        if header.client != self.id:
            raise Illegal(f"a frame for client {header.client} was given to client {self.id}")
        newest = self._kept()["newest"]
        if action == "train" and header.round < newest:
            raise Illegal(
                f"a frame of round {header.round} after one of round {newest}: it is replayed, or the server has gone "
                f"back; if it has, remove {self.folder.name} at this site"
            )

    def join(self, frame: Frame, spool: Path, counted: int) -> Frame:
        """The site can take part: its fingerprints have been compared."""
        header = wire.peek(frame)
        return wire.encode(Ready(), run=header.run, round=header.round, client=self.id)

    def train(self, frame: Frame, spool: Path, counted: int) -> Frame:
        """The client half's reply; the client's memory and the version that it holds then are on the disk.

        Both are taken as they were after round `counted`, the last whose reply the server has counted.
        """
        round = wire.peek(frame).round
        self._rewind(min(counted, round - 1))
        client = self._client(round)
        answer = serve(self.settings.method, frame, client, spool)
        assert isinstance(client.memory, ClientMemory)
        client.memory.commit()
        self._hold(round, client.held)
        ClientMemory.prune(self.folder / "memory", min(counted, round - KEPT))
        return answer

    def evaluate(self, frame: Frame, spool: Path, counted: int) -> Frame:
        """How the weights that the frame means score on this site's rows; leaves no trace."""
        header = wire.peek(frame)
        method = self.settings.method
        method.receive(wire.decode(method.Down, frame), self._client(header.round + 1))
        found = evaluate(self.net, self.scored, self.settings.eval.batch_size, self.settings.eval.max_new_tokens)
        scores = Scores(found.rows, found.loss, found.accuracy, found.rouge_l, self.heldout)
        return wire.encode(scores, run=header.run, round=header.round, client=self.id)

    def _client(self, round: int) -> Client:
        key = self.key.fold("client", self.id, "round", round)
        before = [version for number, version in self._kept()["held"] if number < round]
        memory = ClientMemory(self.folder / "memory", round)
        return Client(self.id, self.net, self.data, key, memory, self.versions, before[-1] if before else None)

    def _kept(self) -> dict[str, Any]:
        """`newest`: the last round that the site has answered; `held`: [round, the version then held], ascending."""
        file = self.folder / "held.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"newest": 0, "held": []}
        return found

    def _keep(self, newest: int, held: list[Any]) -> None:
        partial = self.folder / "held.json.part"
        partial.write_text(json.dumps({"newest": newest, "held": held[-KEPT - 1 :]}))
        partial.replace(self.folder / "held.json")

    def _hold(self, round: int, held: str | None) -> None:
        before = [entry for entry in self._kept()["held"] if entry[0] < round]
        self._keep(round, [*before, [round, held]])

    def _rewind(self, round: int) -> None:
        """Forget what came after that round."""
        for number, file in files_by_round(self.folder / "memory"):
            if number > round:
                file.unlink()
        known = self._kept()
        self._keep(known["newest"], [entry for entry in known["held"] if entry[0] <= round])
