"""A hub that means ill, against one site's worker under the strictest policy: what gets through.

In one process, through `Worker.answer`, with tables and frames as a site's Flower process hands them on. Each attack
has a fork of its own, with a cap on its memory; an attack is good where the site refuses, or what it does is bounded.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import tomli_w
import xxhash
from preloaded import Process
from trials import Trial
from workshop import Verdict, Workshop

from thinwire import config, memory, wire
from thinwire.wire.frame import MAGIC

SESSION = "0123456789abcdef"
ROOM = 1 << 20
MEMORY = 6 << 30  # bytes that the fork of an attack may take beyond what it is given
LONG = 15.0  # seconds of the processor
# what a strict site allows: one method, one way to read its rows, little of everything
STRICTEST: dict[str, Any] = {
    "methods": ["fedkseed"],
    "kinds": ["Steps"],
    "max_bytes": 10_000,
    "max_bytes_in": 1 << 20,
    "evaluate": False,
    "code": [],
    "max_rounds": 10,
    "max_steps": 100,
    "max_runs": 3,
    "seconds": 10.0,
    "kept_runs": 2,
    "lengths": [32, 128],
    "model": False,
}
PROMPT, JINJA = "{input}: it was", "{% if '%s' in input %}{{ 1 // 0 }}{% endif %}{{ input }}"


@dataclass
class Hub:
    """One site with its folder, and a hub that asks it whatever it likes."""

    place: Path
    tree: dict[str, Any]
    worker: Any = None
    asked: int = 0

    @classmethod
    def make(cls, place: Path) -> Hub:
        """A site with rows, a model and the strictest policy; its worker."""
        from tiny import CHOICES, tiny_folder, tiny_rows, write_jsonl

        from thinwire.federation.policy import task_of
        from thinwire.federation.site import Site
        from thinwire.federation.worker import Worker

        place.mkdir(parents=True)
        tiny_folder(place / "model")
        rows = tiny_rows(8, 1, closed=True)
        rows[0] = replace(rows[0], fields={**rows[0].fields, "input": "Miller amber splendid"})
        write_jsonl(place / "rows.jsonl", rows)
        site = Site(
            "north",
            str(place / "rows.jsonl"),
            str(place / "site"),
            "",
            hold_out=False,
            model=str(place / "model"),
            policy=str(place / "policy.toml"),
        )
        method = {"name": "fedkseed", "seeds": 16, "steps": 2, "batch_size": 4}
        data = {"path": "the site's own", "prompt": PROMPT, "answer": " {output}", "max_length": 64}
        data["choices"] = list(CHOICES)
        tree = {"name": "hub", "threads": 1, "model": {"path": str(place / "model")}, "data": data, "method": method}
        own = {"templates": [task_of(config.parse(tree).data)], "choices": [list(CHOICES)]}
        (place / "policy.toml").write_text(tomli_w.dumps(STRICTEST | own))
        return cls(place, tree, Worker(site))

    def sent(self, session: Any = SESSION, run: Any = 7, **sections: dict[str, Any]) -> str:
        """What the hub sends the site of a run; sections of the run file with other fields."""
        tree = {**self.tree, **{name: {**self.tree[name], **fields} for name, fields in sections.items()}}
        toml = config.parse(tree).to_toml() if "method" not in sections else tomli_w.dumps(tree)
        return json.dumps({"run": run, "sites": ["north"], "session": session, "toml": toml})

    def fingerprints(self, **data: Any) -> dict[str, str]:
        """Those of the run; a hub has the model too."""
        from thinwire import assemble
        from thinwire.federation.fingerprint import fingerprints

        run = config.parse({**self.tree, "data": {**self.tree["data"], **data}})
        return fingerprints(run, assemble.net_of(run))

    def ask(self, action: str, frame: bytes, settings: str, **table: Any) -> tuple[dict[str, Any], bytes]:
        """The answer to one whole frame."""
        self.asked += 1
        given = {"transfer": f"{self.asked:016x}", "offset": 0, "total": len(frame), "room": ROOM, "counted": 0}
        return self.worker.answer({**given, "action": action, "settings": settings, **table}, frame)

    def join(self, settings: str, run: int = 7, **table: Any) -> str:
        """The error with which the site answers to being asked to join; empty where it is ready."""
        from thinwire.runtime.payloads import Hello

        frame = bytes(wire.encode(Hello(), run=run, round=0, client=0))
        return str(self.ask("join", frame, settings, **table)[0].get("error", ""))

    def train(
        self, settings: str, round: int = 1, steps: int | None = None, key: int = 5, **table: Any
    ) -> tuple[str, bytes]:
        """The error and the reply to a broadcast of FedKSeed."""
        from thinwire.core import Server
        from thinwire.keys import Key
        from thinwire.runtime.store import VersionStore

        run = config.parse(self.tree)
        server = Server(None, Key.root(key), round, 10, (0,), VersionStore(self.place / "hub"))  # type: ignore[arg-type]
        down = run.method.broadcast(run.method.init(server), server, 0, None)
        frame = bytes(wire.encode(down, run=7, round=round, client=0))
        answer, body = self.ask("train", frame, settings, **table)
        return str(answer.get("error", "")), body

    def outside(self) -> list[str]:
        """What lies beside what belongs to the site, and what the test has made."""
        known = {"model", "rows.jsonl", "policy.toml", "site", "hub"}
        inside = {"runs", "spool", "audit.jsonl"}
        strange = [path.name for path in self.place.iterdir() if path.name not in known]
        strange += [path.name for path in (self.place / "site").iterdir() if path.name not in inside and path.is_dir()]
        return strange + [path.name for path in self.place.parent.iterdir() if path != self.place]

    def size(self) -> tuple[int, int]:
        """Files in the site's folder, and their bytes."""
        files = [path for path in (self.place / "site").rglob("*") if path.is_file()]
        return len(files), sum(path.stat().st_size for path in files)

    def audited(self) -> int:
        """Lines of the site's log."""
        file = self.place / "site" / "audit.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0


def honest(hub: Hub) -> Verdict:
    """Without it a refusal of everything would look like a defence."""
    error = hub.join(hub.sent(), **hub.fingerprints())
    error = error or hub.train(hub.sent(), **hub.fingerprints())[0]
    return Verdict("an honest hub is answered", True) if not error else Verdict.bad("an honest hub is refused", error)


def escape(hub: Hub) -> Verdict:
    """Names that lead out of the site's folder."""
    about = hub.fingerprints()
    errors = []
    for session in ("/../../../escape", "../../escape", "/", "..", "a/b", "\0", 7, None, ["x"]):
        settings = hub.sent(session)
        errors.append(hub.join(settings, **about) or hub.train(settings, **about)[0])
    errors += [hub.join(hub.sent(run=run), **about) for run in (-5, 1 << 40, "../../x", 1.5, None)]
    errors += [hub.join(hub.sent(), transfer=name, **about) for name in ("../../../escape0", "", "A" * 16, "0" * 17)]
    if strange := hub.outside():
        return Verdict.bad("writes outside the site's folder", strange)
    return Verdict("refused", True) if all(errors) else Verdict.bad("an odd name is taken", errors)


def predicate(hub: Hub) -> Verdict:
    """Yes-or-no questions about rows, asked by templates."""
    answers, lines = [], []
    for word in ("Miller", "Nobody"):
        data = {"prompt": JINJA.replace("%s", word), "answer": "{{ output }}", "template": "jinja"}
        before = hub.audited()
        answer = hub.join(hub.sent(data=data), **hub.fingerprints(**data))
        answers.append(re.sub('"[0-9a-f]{16}"', "the template's hash", answer))  # which is of what was asked
        lines.append(hub.audited() - before)
    if answers[0] != answers[1]:
        return Verdict.bad("a question about a row is answered", answers)
    return Verdict("both answers are alike", True) if all(lines) else Verdict.bad("the log has no line of it", lines)


def fill(hub: Hub) -> Verdict:
    """Transfers that are never ended."""
    piece = b"x" * (STRICTEST["max_bytes_in"] // 2)
    for i in range(40):
        hub.worker.answer(
            {
                "transfer": f"{i:016x}",
                "offset": 0,
                "total": len(piece) + 1,
                "room": ROOM,
                "action": "join",
                "settings": "",
            },
            piece,
        )
    files, size = hub.size()
    if size > 2 * STRICTEST["max_bytes_in"]:
        return Verdict.bad("the disk fills", f"{files} files, {size} bytes")
    return Verdict("bounded", True)


def names(hub: Hub) -> Verdict:
    """Thousands of names, a byte each."""
    for i in range(3000):
        hub.worker.answer(
            {"transfer": f"{i:016x}", "offset": 0, "total": 9, "room": ROOM, "action": "join", "settings": ""}, b"x"
        )
    files, _ = hub.size()
    return Verdict("bounded", True) if files < 50 else Verdict.bad("a file for each name", files)


def again(hub: Hub) -> Verdict:
    """One round asked again and again, each time under other directions."""
    about = hub.fingerprints()
    replies = {
        body for key in range(12) if not (found := hub.train(hub.sent(), key=key, **about))[0] for body in [found[1]]
    }
    if len(replies) > 1:
        return Verdict.bad("each request gets another reply", len(replies))
    return Verdict("one reply a round", True) if replies else Verdict.bad("not even the first is answered")


def sessions(hub: Hub) -> Verdict:
    """New sessions without end, each with its folder."""
    about = hub.fingerprints()
    for i in range(12):
        hub.train(hub.sent(f"{i:016x}"), **about)
    runs = len(list((hub.place / "site" / "runs").glob("*")))
    return Verdict("bounded", True) if runs <= 4 else Verdict.bad("a folder for each session, for good", runs)


def steps(hub: Hub) -> Verdict:
    """More steps than anyone would take."""
    settings = hub.sent(method={"steps": 200_000_000})
    return bounded(lambda: [hub.join(settings, **hub.fingerprints()), hub.train(settings, **hub.fingerprints())[0]][-1])


def loops(hub: Hub) -> Verdict:
    """A template that does not end."""
    data = {"prompt": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ input }}"}
    data |= {"answer": "{{ output }}", "template": "jinja"}
    settings = hub.sent(data=data)
    return bounded(lambda: hub.join(settings))


def bombs(hub: Hub) -> Verdict:
    """Headers of nothing but empty lists, long ones and deep ones; settings that nest without end."""
    found = Verdict("refused", True)
    hub.join(hub.sent(), **hub.fingerprints())  # the model is loaded once, and that is nobody's attack
    for head in (b"\x90" * 900_000, b"\x91" * 900_000, b"\x80" * 900_000, b"\xdd\xff\xff\xff\xff" * 9):
        for packed in (head, msgpack.packb(["Hello", 7, 0, 0, None, []])[:-1] + b"\xdd\x00\x0d\xbb\xa0" + head):
            body = MAGIC + len(packed).to_bytes(4, "little") + packed
            frame = body + xxhash.xxh3_64_digest(body)[::-1]
            found = bounded(lambda frame=frame: hub.ask("join", frame, hub.sent())[0].get("error", ""), 2.0, 1 << 28)
            if not found.good:
                return found
    for settings in ("[" * 200_000, '{"toml": "a=' + "[" * 100_000 + '"}', "{}", "null", '{"toml": 3}', "\0"):
        found = bounded(lambda settings=settings: hub.join(settings), 5.0, 1 << 28)
        if not found.good:
            return found
    return found


def models(hub: Hub) -> Verdict:
    """A site without a model of its own is given paths of its disk."""
    hub.worker.site = replace(hub.worker.site, model=None)
    errors = {hub.join(hub.sent(model={"path": path})) for path in ("/etc", "/nowhere/at/all", "/etc/passwd")}
    errors = {
        error.replace("/nowhere/at/all", "P").replace("/etc/passwd", "P").replace("/etc", "P") for error in errors
    }
    return (
        Verdict("the answers are alike", True)
        if len(errors) == 1
        else Verdict.bad("answers show what is there", errors)
    )


def tables(hub: Hub) -> Verdict:
    """Questions whose parts are missing, of other types, negative or huge."""
    from thinwire.runtime.payloads import Hello

    good = {"transfer": SESSION, "offset": 0, "total": 9, "room": ROOM, "action": "join", "counted": 0}
    frame = bytes(wire.encode(Hello(), run=7, round=0, client=0))
    odd = (None, -1, 1 << 62, -(1 << 62), 1.5, "x", "", b"x", [], {}, True)
    for name in [*good, "settings"]:
        for value in odd:
            table = {**good, "total": len(frame), "settings": hub.sent(), name: value}
            for given in (table, {key: value for key, value in table.items() if key != name}):
                answer, body = hub.worker.answer(given, frame)
                if not isinstance(answer, dict) or len(body) > STRICTEST["max_bytes"]:
                    return Verdict.bad("an odd question is answered at length", (name, value))
    if strange := hub.outside():
        return Verdict.bad("writes outside the site's folder", strange)
    return honest(hub) if not honest(hub).good else Verdict("refused", True)


def forbidden(hub: Hub) -> Verdict:
    """What the policy does not allow: another method, evaluation, code."""
    about = hub.fingerprints()
    errors = [hub.join(hub.sent(method={"name": "fedavg", "steps": 2}), **about)]
    errors.append(hub.join(hub.sent(method={"path": "os:system"}), **about))
    stale = bytes(wire.encode(wire.Stale(None), run=7, client=0))
    errors.append(hub.ask("evaluate", stale, hub.sent(), **about)[0].get("error", ""))
    return Verdict("refused", True) if all(errors) else Verdict.bad("what the policy forbids is done", errors)


def bounded(ask: Callable[[], object], seconds: float = LONG, room: int = 1 << 30) -> Verdict:
    """Whether an answer, which must be a refusal, costs no more than so much of the processor and memory."""
    memory.reset()
    before, began = memory.resident(), time.process_time()
    error = ask()
    took, grown = time.process_time() - began, memory.peak() - before
    if took > seconds or grown > room:
        return Verdict.bad("costs too much", f"{took:.1f} s, {grown / 1e6:.0f} MB: {error}")
    return Verdict("refused", True) if error else Verdict.bad("is done", f"{took:.1f} s, {grown / 1e6:.0f} MB")


ATTACKS: dict[str, Callable[[Hub], Verdict]] = {
    "an honest hub": honest,
    "names that lead out of the folder": escape,
    "questions about rows by template": predicate,
    "transfers that fill the disk": fill,
    "thousands of names": names,
    "one round, again and again": again,
    "sessions without end": sessions,
    "200 million steps": steps,
    "a template that does not end": loops,
    "headers and settings that nest": bombs,
    "paths of the site's disk as models": models,
    "questions with odd parts": tables,
    "what the policy forbids": forbidden,
}


def attacks() -> list[Trial]:
    """One trial each."""
    return [Trial(f"hostile hub: {name}", f"hub {name}", partial(attacked, attack)) for name, attack in ATTACKS.items()]


def attacked(attack: Callable[[Hub], Verdict], shop: Workshop) -> Verdict:
    """The attack in a fork."""
    place = shop.place()

    def job() -> int:
        status = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        cap = int(status.split()[1]) * 1024 + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
        limit = round(3 * LONG)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        verdict = attack(Hub.make(place / "hub"))
        sys.stdout.write("\n" + json.dumps([verdict.outcome, verdict.good, str(verdict.more)]))
        return 0

    ended = Process(job, place).end()
    shutil.rmtree(place, ignore_errors=True)
    if ended.status != 0:
        return Verdict.bad("hangs" if ended.status is None or ended.status < 0 else "the worker dies", ended.err)
    return Verdict(*json.loads(ended.out.splitlines()[-1]))
