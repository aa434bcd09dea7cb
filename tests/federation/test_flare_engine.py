"""NVIDIA FLARE as the engine: what a call's end means, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from silos import Silos, visits

pytest.importorskip("nvflare", reason="comes with: pip install 'thinwire[nvflare]'")

from flare import Proxy, federate
from nvflare.collab.api.exceptions import CollabCallError, RunAborted

from thinwire.errors import ConfigError
from thinwire.federation.engine import Aborted
from thinwire.federation.flare import engine, kits
from thinwire.federation.flare.engine import Flare
from thinwire.runtime import course

THIN: dict[str, Any] = {"name": "fedkseed", "seeds": 16, "lr": 1e-3, "steps": 2, "batch_size": 4}
ABOUT = {"transfer": "ab"}


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Silos:
    return Silos.make(tmp_path_factory.mktemp("silos"))


def one(answer: Any = None, aborted: bool = False) -> tuple[Flare, str]:
    """An engine with one site, which a message was sent to; `answer`: in the place of the site's, or what is raised."""
    proxy = Proxy("north", None)

    def tamper(found: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return found if answer is None else answer

    proxy.tamper = tamper
    at = Flare([proxy], lambda: False)
    id = at.push(1, b"some", dict(ABOUT), 7.0, 3)
    assert proxy.timeouts == [7.0]
    at.calls[id][-1].exception()  # waits for its end
    at.aborted = lambda: aborted
    return at, id


def test_an_answer_is_given_once() -> None:
    at, id = one()
    answer = at.pull(id)
    assert answer is not None
    assert (answer.node, answer.about, answer.piece, answer.error) == (1, ABOUT, b"", None)
    assert at.pull(id) is None


def test_a_call_that_is_out_of_time_or_that_the_site_fails_has_that_answer() -> None:
    for wrong, shown in (
        (CollabCallError("north", "visit", TimeoutError("timed out after 7 seconds")), "TimeoutError: timed out after"),
        (CollabCallError("north", "visit", "no such thing", "KeyError", "Traceback ..."), "KeyError: no such thing"),
    ):
        at, id = one(wrong)
        answer = at.pull(id)
        assert answer is not None
        assert shown in str(answer.error)


def test_a_call_that_does_not_reach_its_site_is_the_end_of_the_job() -> None:
    for wrong in (CollabCallError("north", "visit", "remote call returned rc='comm_error'"), RunAborted("aborted")):
        at, id = one(wrong)
        with pytest.raises(Aborted):
            at.pull(id)


def test_a_job_that_flare_ends_is_not_waited_for() -> None:
    at, id = one(aborted=True)
    for ask in (at.pause, lambda: at.pull(id)):
        with pytest.raises(Aborted):
            ask()


def test_a_site_that_is_silent_is_knocked_at_and_one_that_does_not_answer_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker may be at work for an hour: what must answer is its process."""
    monkeypatch.setattr(engine, "SILENT", 0.0)
    proxy, there, done, knocks = Proxy("north", None), threading.Event(), threading.Event(), []

    def tamper(answer: Any) -> Any:
        if answer is not None:
            done.wait(60)
        else:
            knocks.append(time.monotonic())
            if not there.is_set():
                raise CollabCallError("north", "knock", TimeoutError("timed out after 60 seconds"))
        return answer

    proxy.tamper = tamper
    there.set()
    at = Flare([proxy], lambda: False)
    id = at.push(1, b"", dict(ABOUT), 600.0, 3)
    try:
        while len(knocks) < 3:
            at.pause()
            assert at.pull(id) is None
        there.clear()
        with pytest.raises(Aborted, match="north does not answer: call to north"):
            pause_for(at, 60)
    finally:
        done.set()
    assert set(proxy.timeouts) == {600.0, engine.KNOCK}


def pause_for(at: Flare, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        at.pause()


def test_who_is_not_asked_is_not_knocked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SILENT", 0.0)
    at, id = one()
    at.pause()
    at.pull(id)
    at.pause()
    assert at.knocks == {}


@pytest.mark.parametrize("answer", [b"bytes alone", ({},), ("text", b""), ({}, "text"), ({}, b"", b"")])
def test_what_no_site_of_ours_sends_is_no_answer(answer: Any) -> None:
    at, id = one(answer)
    with pytest.raises(ValueError, match="no table and no bytes"):
        at.pull(id)


def test_a_site_is_the_name_in_its_certificate_while_that_is_registered() -> None:
    at = Flare([Proxy(name, None) for name in ("west", "north", "elsewhere")], lambda: False)
    assert at.nodes(("north", "south", "west"), {"north": b"", "south": b""}) == {0: 2}


def test_a_site_whose_calls_fail_is_absent_for_the_round(silos: Silos, tmp_path: Path) -> None:
    job, proxies, _ = federate(silos, silos.run(THIN), tmp_path / "run")

    def fail(answer: Any) -> Any:
        raise CollabCallError("south", "visit", TimeoutError("timed out after 7 seconds"))

    proxies[1].tamper = fail
    course.train(job)
    for clients in visits(tmp_path / "run"):
        assert [error is None for *_, error in clients] == [True, False, True]
        assert "the engine reports: TimeoutError: timed out" in clients[1][3]


@pytest.mark.parametrize("name", ["north.1", "server", "localhost"])
def test_a_name_that_flare_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a site on NVIDIA FLARE"):
        kits.check_names(["north", name])


def test_kits_are_made_anew_and_admit_our_classes_and_no_others(tmp_path: Path) -> None:
    for port in (8102, 8103):
        kits.make(tmp_path / "kits", ("north", "south"), port)
        assert sorted(path.name for path in (tmp_path / "kits").iterdir()) == [kits.ADMIN, kits.HOST, "north", "south"]
        for name in ("north", "south", kits.HOST):
            place = tmp_path / "kits" / name
            resources = (place / "local" / "resources.json").read_text()
            assert "/tmp/nvflare" not in resources
            added = [each for each in json.loads(resources)["class_allow_list"] if "nvflare.app_common" not in each]
            assert [each for each in added if "thinwire" in each] == ["thinwire.federation.flare.app."]
            assert "*" not in added
        target = json.loads((tmp_path / "kits" / "north" / "startup" / "fed_client.json").read_text())["servers"][0]
        assert target["service"]["target"] == f"localhost:{port}"
    assert (tmp_path / "kits" / "north" / "startup" / "client.key").stat().st_mode & 0o077 == 0
    assert (tmp_path / "kits").stat().st_mode & 0o777 == 0o700
