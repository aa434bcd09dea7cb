"""Flower's Grid within one process: the real transport on one side, the sites' real workers on the other."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from silos import Silos

from thinwire import assemble, config
from thinwire.assemble.privacy import budget_of
from thinwire.federation.envelope import pack, unpack
from thinwire.federation.fingerprint import fingerprints
from thinwire.federation.flower import Flower
from thinwire.federation.local import OPEN
from thinwire.federation.site import Site
from thinwire.federation.site_run import run_settings
from thinwire.federation.transport import Pieces
from thinwire.federation.worker import Worker
from thinwire.model.net import Net
from thinwire.runtime.course import Job, Watch

# Flower lets nobody make a message outside its own tasks.
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
FIRST = 100  # the number of the first client's node


class OneProcess(Grid):
    """Delivers each message when its reply is asked for; `tamper` changes a reply on its way, None: loses it."""

    def __init__(self, workers: list[Worker], settings: str) -> None:
        self.workers, self.settings = workers, settings
        self.tamper: Callable[[int, Message], Message | None] = lambda client, reply: reply
        self.waiting: dict[str, Message] = {}
        self.bodies: list[int] = []  # bytes of each piece that passed
        self.most = 0  # messages to one client that were on their way at a time
        self.numbers = itertools.count(1)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{next(self.numbers)}"
            self.waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        self.most = max(self.most, *Counter(other.metadata.dst_node_id for other in self.waiting.values()).values())
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for id in message_ids:
            if id not in self.waiting:
                continue
            message = self.waiting.pop(id)
            client = message.metadata.dst_node_id - FIRST
            piece, about = unpack(message.content)
            answer, body = self.workers[client].answer({**about, "settings": self.settings}, piece)
            self.bodies += [len(piece), len(body)]
            reply = Message(pack(body, **{"transfer": about["transfer"], **answer}), reply_to=message)
            changed = self.tamper(client, reply)
            if changed is not None:
                replies.append(changed)
        return replies

    def run(self) -> Any: ...

    def set_run(self, run: Any) -> None: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_node_ids(self) -> list[int]:
        return [FIRST + client for client in range(len(self.workers))]

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Any: ...


def federate(
    silos: Silos,
    run: config.Run,
    folder: Path,
    net: Net | None = None,
    policy: Path | None = None,
    keys: Path | None = None,
    **options: Any,
) -> tuple[Job, OneProcess, Pieces]:
    """A run's job on the transport, its grid, and the transport; `options` are the transport's.

    `keys`: a folder in which NAME/NAME.key is a site's, and NAME/peers the others' public ones.
    """
    clients = silos.rows(run).clients
    silos.begin(run, folder)
    workers = []
    if policy is None:
        policy = folder / "policy.toml"
        policy.write_text(OPEN)
    for name in clients:
        place, data = folder / "at" / name, silos.folder / "data" / f"{name}.jsonl"
        site = Site(name, str(data), str(place), "", hold_out=False, policy=str(policy), allow_model=True)
        if keys is not None:
            site = replace(site, key=str(keys / name / f"{name}.key"), peers=str(keys / name / "peers"))
        workers.append(Worker(site))
    grid = OneProcess(workers, run_settings(run, tuple(clients), "0123456789abcdef"))
    net = net or assemble.net_of(run, remember=True)
    spool = folder / "spool"
    about = fingerprints(run, net)
    nodes = {client: FIRST + client for client in range(len(clients))}
    transport = Pieces(Flower(grid), lambda: nodes, spool, about, **{"patience": 0.0, **options})
    rows = assemble.Rows({}, silos.rows(run).splits)
    job = assemble.job(run, rows, net, folder, 0, Watch())
    job.names, job.transport = list(clients), transport
    job.budget = budget_of(run, {}, len(clients))
    job.keep_versions = 8 + run.method.versions_each * len(clients)
    return job, grid, transport


def entries(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a site's log."""
    return [json.loads(line) for line in (folder / "at" / name / "audit.jsonl").read_text().splitlines()]
