"""The page that follows a run: what it serves, to whom, and how it fills itself in a browser."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import environment, refused
from test_status import a_run

from thinwire.operations.live import Live, serving
from thinwire.operations.loopback import HOST
from thinwire.runtime.folder import locked

pytest.importorskip("vl_convert", reason="the extra `report` is not installed")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return a_run(tmp_path / "run", rounds=2)


@pytest.fixture
def port(run: Path) -> Iterator[int]:
    """Where the run's page is served."""
    with serving(run, 0) as found:
        yield found


def asked(port: int, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes, Any]:
    """Status, content and headers of an answer."""
    link = http.client.HTTPConnection(HOST, port, timeout=30)
    link.putrequest(method, path, skip_host=True)
    if host is not None:
        link.putheader("Host", host)
    link.endheaders()
    answer = link.getresponse()
    return answer.status, answer.read(), answer.headers


def end_round(run: Path, round: int) -> None:
    """A round more in the run's records."""
    lines = (run / "rounds.jsonl").read_text().splitlines()
    record = json.loads(lines[0]) | {"round": round}
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def test_the_page_is_the_report_and_the_state_follows_the_records(run: Path, port: int) -> None:
    status, page, headers = asked(port, "/", f"{HOST}:{port}")
    assert status == 200
    assert b"<h1>silos</h1>" in page
    assert headers["Cache-Control"] == "no-store"
    first = json.loads(asked(port, "/state", f"localhost:{port}")[1])
    assert f'data-mark="{first["mark"]}"'.encode() in page
    assert first["lines"][0].startswith("stopped: 2 of 5 rounds")
    with locked(run):
        end_round(run, 3)
        then = json.loads(asked(port, "/state", f"{HOST}:{port}")[1])
    assert then["mark"] != first["mark"]
    assert then["lines"][0].startswith("running: 3 of 5 rounds, about 4.0 s to go")
    assert "replies that did not count: late 1" in then["lines"]


def test_nothing_else_is_served_and_nobody_else_is_answered(run: Path, port: int) -> None:
    here = f"{HOST}:{port}"
    for path in ("/run.toml", "/../run.toml", "/%2e%2e/run.toml", "//etc/passwd", "/state/..", "/?x", "http://x/", "*"):
        assert asked(port, path, here)[0] == 404, path
    for host in (None, "", "example.org", f"example.org:{port}", HOST, f"{HOST}:{port + 1}", f"x@{here}", f"{here}."):
        assert asked(port, "/", host)[0] == 403, host
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert asked(port, "/", here, method)[0] == 501, method
    assert asked(port, "/", here, "HEAD")[1] == b""


def test_what_comes_from_others_is_text(run: Path) -> None:
    file = run / "rounds.jsonl"
    file.write_text(file.read_text().replace('"north"', '"<img src=x>"'))
    page = Live(run).page().decode()
    assert "<img" not in page.partition("<script>")[0]


def test_a_run_without_a_record_waits(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    for name in ("rounds", "evals"):
        (run / f"{name}.jsonl").unlink()
    assert b"No round has ended yet" in Live(run).page()
    assert Live(run).lines()[0] == "stopped: 0 of 5 rounds"


def test_the_command_ends_when_asked_to(run: Path) -> None:
    command = [sys.executable, "-u", "-m", "thinwire.cli", "watch", str(run)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
        assert asked(port, "/state", f"{HOST}:{port}")[0] == 200
        assert f"--port: 127.0.0.1:{port} is in use" in refused("watch", run, "--port", str(port))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert refused("watch", run.parent) == f"{run.parent}: no run is there"


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fills_itself_and_keeps_what_was_chosen(run: Path, port: int, width: int) -> None:
    pytest.importorskip("selenium", reason="selenium is not installed")
    sys.path.append(str(Path(__file__).parent.parent / "report"))
    from browser import BROWSER, DRIVER, Page, chromium
    from selenium.webdriver.support.wait import WebDriverWait

    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")
    rows = "return document.querySelector('[data-table=training-loss] summary').textContent"
    axis = "return document.querySelector('[data-plot=training-loss] .role-axis-title').textContent"
    with chromium() as driver, locked(run):
        shown = Page(driver, f"http://{HOST}:{port}/")
        shown.look(width, False)
        assert driver.execute_script(rows).endswith("(2 rows)")
        shown.pick("x", "bytes")
        driver.execute_script("document.querySelector('[data-table=training-loss]').open = true")
        for round in (3, 4):
            drawn = shown.drawn()
            end_round(run, round)
            shown.ready(drawn + 1)
            WebDriverWait(driver, 20).until(lambda d: d.execute_script(rows).endswith(f"({round} rows)"))  # noqa: B023
        assert driver.execute_script(axis) == "bytes so far, both ways"
        assert driver.execute_script("return document.querySelector('input[name=x]:checked').value") == "bytes"
        assert driver.execute_script("return document.querySelector('[data-table=training-loss]').open")
        cells = "return document.querySelectorAll('[data-table=training-loss] tbody tr').length"
        WebDriverWait(driver, 10).until(lambda d: d.execute_script(cells) == 4)
        text = driver.execute_script("return document.querySelector('#live p').textContent")
        assert text.startswith("running: 4 of 5 rounds")
        fits = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert driver.execute_script(fits)
        assert shown.errors() == []
        if keep := os.environ.get("THINWIRE_SHOTS"):
            shown.shoot(Path(keep) / f"watch-{width}.png")
