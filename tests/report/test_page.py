"""The page: what is in it, what must never be, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import SECRET, agreed_folder, run_folder

from thinwire.data.errors import DataError
from thinwire.data.shown import printable
from thinwire.report.page import _library, render
from thinwire.report.runs import collect

pytest.importorskip("vl_convert", reason="the extra `report` is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for name in ("fedavg", "fedkseed"):
        for seed in (0, 1):
            run_folder(folder / f"{name}-{seed}", name, seed)
    (folder / "report.html").write_text(render(collect([folder])))
    return folder / "report.html"


def data_of(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_data_behind_each_plot_is_in_the_page(page: Path) -> None:
    plots = data_of(page.read_text())["plots"]
    assert set(plots) == {"heldout-loss", "heldout-accuracy", "front", "training-loss", "bytes", "memory", "clients"}
    assert [row["value"] for row in plots["front"]["rows"]] == [0.4] * 4
    row = next(row for row in plots["heldout-loss"]["rows"] if row["round"] == 4)
    assert row == {"run": "fedavg, seed 0", "group": "fedavg", "round": 4, "bytes": 6400, "seconds": 10.0, "value": 0.4}
    for plot in plots.values():
        assert {key for key, _ in plot["columns"]} <= set(plot["rows"][0])


def test_the_page_refers_to_nothing_outside(page: Path) -> None:
    html = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)""", html)
    assert "default-src 'none'" in html


def test_rows_of_clients_are_shown_only_where_the_run_file_allows_it(tmp_path: Path) -> None:
    assert SECRET not in render(collect([run_folder(tmp_path / "a")]))
    assert SECRET not in render(collect([run_folder(tmp_path / "b", show_rows=False)]))
    assert SECRET in render(collect([run_folder(tmp_path / "c", show_rows=True)]))


def test_the_page_holds_no_control_characters(tmp_path: Path) -> None:
    others = "\x1b[31m\x7f\u202e</script>\x9b"
    folder = run_folder(tmp_path / "run", prompts=["x"], show_rows=True)
    for name in ("rounds", "evals"):
        file = folder / f"{name}.jsonl"
        lines = file.read_text().replace("site-1", json.dumps(others)[1:-1]).replace("well", json.dumps(others)[1:-1])
        file.write_text(lines)
    html = render(collect([folder])).replace(_library(), "")
    assert printable(html) == html
    names = {row["client"] for row in data_of(html)["plots"]["clients"]["rows"]}
    assert names == {"site-0", printable(others)}
    assert f"expected: {printable(others).replace('<', '&lt;').replace('>', '&gt;')}" in html


def test_text_of_a_run_is_text(page: Path) -> None:
    html = page.read_text()
    assert "How are &lt;/script&gt; you?" in html
    assert "<b>fine</b>" not in html


@pytest.fixture(scope="module")
def agreed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreed")
    agreed_folder(folder / "run")
    (folder / "report.html").write_text(render(collect([folder])))
    return folder / "report.html"


def test_who_counted_how_much_and_how_each_is_served(agreed: Path) -> None:
    html = agreed.read_text()
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", html.partition('id="cross-title"')[0])
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", line) for name, line in rows}
    assert cells["north"][:3] == ["10", "4", "40.0%"]
    assert cells["north"][-1] == "by examples, capped from 0.61, leant from 0.4 by a loss of 2.313"
    assert cells["north"][3:-1] == ["3.000", "2.000", "0.500", "0.500", "+0.0000", "-0.0300 ± 0.0040"]
    assert cells["south"][1] == "3, 1 dropped"
    assert cells["site-3"][3:7] == ["withheld"] * 4
    plots = data_of(html)["plots"]
    assert {"own", "shares"} <= set(plots)
    assert "agreed ended after round 4: the loss on heldout is 0.4000." in html
    assert "agreed has the weights of round 3, chosen by the loss on selection." in html
    assert {row["client"] for row in plots["own"]["rows"]} == {*cells} - {"site-3", "agreed"}
    assert len(plots["shares"]["rows"]) == 23  # of 24 visits one was dropped


def test_whose_learning_serves_whom(agreed: Path) -> None:
    section = agreed.read_text().partition('id="cross-title"')[2].partition("</section>")[0]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", section)
    cells = {name: re.findall(r"<td>(.*?)</td>", line) for name, line in rows}
    assert cells["south"][:5] == ["2.200", "2.000", "2.200", "-", "2.600"]
    assert cells["together"] == cells["north"]
    assert len(cells) == 7


def test_a_run_of_before_has_no_clients_table(page: Path) -> None:
    assert 'id="clients-title"' not in page.read_text()


def test_a_run_without_a_round_has_a_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    (folder / "rounds.jsonl").unlink()
    (folder / "evals.jsonl").write_text("")
    assert "0 of 4" in render(collect([folder]))


def test_the_report_needs_no_torch(page: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from thinwire.report.page import render; from thinwire.report.runs import collect\n"
        f"render(collect([Path({str(page.parent)!r})]))\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'thinwire.runtime')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("selenium", reason="selenium is not installed")
    from browser import BROWSER, DRIVER, chromium

    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")
    with chromium() as driver:
        yield driver


def axis_title(driver: Any, plot: str) -> str:
    return str(
        driver.execute_script(f"return document.querySelector('[data-plot={plot}] .role-axis-title').textContent")
    )


def test_axes_toggle_without_an_error(page: Path, browser: Any) -> None:
    from browser import Page

    shown = Page(browser, page)
    assert axis_title(browser, "heldout-loss") == "round"
    points = "return document.querySelectorAll('[data-plot=heldout-loss] .mark-symbol.role-mark path').length"
    assert browser.execute_script(points) == 8
    shown.pick("x", "bytes")
    assert axis_title(browser, "heldout-loss") == "bytes so far, both ways"
    shown.pick("xscale", "log")
    assert browser.execute_script(points) == 4  # the start has sent nothing, and a log axis has no zero
    assert browser.execute_script("return !document.getElementById('log-note').hidden")
    shown.pick("yscale", "log")
    shown.pick("x", "seconds")
    shown.pick("barscale", "linear")
    assert axis_title(browser, "heldout-loss") == "seconds so far"
    assert browser.execute_script("return document.getElementById('status').textContent") == "Bars on a linear axis"
    assert shown.errors() == []


def test_it_asks_no_network(page: Path, browser: Any) -> None:
    from browser import Page

    browser.get_log("performance")
    Page(browser, page).pick("x", "bytes")
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [page.resolve().as_uri()]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen(page: Path, browser: Any, width: int, dark: bool) -> None:
    from browser import Page

    shown = Page(browser, page)
    shown.look(width, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    wide = (
        "return [...document.querySelectorAll('.plot svg')].every(s => s.getBoundingClientRect().right <= innerWidth)"
    )
    assert browser.execute_script(wide)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") != dark
    assert shown.errors() == []


@pytest.mark.parametrize("width", [400, 1280])
def test_the_clients_fit_the_screen(agreed: Path, browser: Any, width: int) -> None:
    from browser import Page

    shown = Page(browser, agreed)
    shown.look(width, False)
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    table = "document.querySelector('details.clients .wide')"
    assert browser.execute_script(f"return {table}.getBoundingClientRect().height") > 150
    assert browser.execute_script(f"return {table}.getBoundingClientRect().right <= innerWidth")
    assert shown.errors() == []


def test_keyboard_and_screen_reader(page: Path, browser: Any) -> None:
    from browser import Page
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    shown = Page(browser, page)
    shown.look(1280, False)
    before = shown.drawn()
    radio = browser.find_element("css selector", "input[name=x][value=round]")
    radio.send_keys(Keys.ARROW_RIGHT)
    shown.ready(before + 1)
    assert axis_title(browser, "heldout-loss") == "bytes so far, both ways"
    summary = browser.find_element("css selector", "[data-table=heldout-loss] summary")
    summary.send_keys(Keys.ENTER)
    rows = "return document.querySelectorAll('[data-table=heldout-loss] tbody tr').length"
    # the table is filled when the browser gets to say that it was opened
    WebDriverWait(browser, 10).until(lambda browser: browser.execute_script(rows) == 8)
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if not n["ignored"]}
    for wanted in (
        ("heading", "Results"),
        ("figure", "Held-out loss"),
        ("radio", "log"),
        ("graphics-document", "Held-out loss"),
    ):
        assert wanted in named or (wanted[0].title().replace("-d", "D"), wanted[1]) in named, sorted(named)[:80]
    nameless = [
        n["role"]["value"] for n in tree if not n["ignored"] and n["role"]["value"] in ("radio", "combobox", "link")
    ]
    assert nameless
    assert all(
        n.get("name", {}).get("value") for n in tree if not n["ignored"] and n["role"]["value"] in ("radio", "link")
    )


def test_many_groups_are_told_apart_by_colour_and_shape(tmp_path: Path) -> None:
    """The page has eight colours: where one comes again, the shape is another."""
    from thinwire.report.plots import plots

    folders = [run_folder(tmp_path / f"m{i}", f"m{i}") for i in range(30)]
    for plot in plots(collect(folders)):
        if plot.name in ("front", "heldout-loss"):
            shapes = plot.spec["encoding"]["shape"]["scale"]["range"]
            assert len({(i % 8, shape) for i, shape in enumerate(shapes)}) == 30


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"round": 4}', '{"round": 4, "rows": {"a": 1}, "together": ["x"], "clients": {}}', "\0"],
)
def test_a_matrix_that_is_none_is_one_line(content: str, tmp_path: Path) -> None:
    agreed_folder(tmp_path / "run")
    (tmp_path / "run" / "cross.json").write_text(content)
    with pytest.raises(DataError, match=r"cross\.json: not as it was written"):
        collect([tmp_path])


def test_a_matrix_with_names_of_others_and_too_few_losses_is_shown(tmp_path: Path) -> None:
    agreed_folder(tmp_path / "run")
    name = "<script>alert(1)</script>\u001b[2J"
    found = {
        "round": 4,
        "rows": {name: 1, "b": None},
        "together": [1.0],
        "clients": {"0": {"name": name, "losses": []}},
    }
    (tmp_path / "run" / "cross.json").write_text(json.dumps(found))
    section = render(collect([tmp_path])).partition('id="cross-title"')[2].partition("</section>")[0]
    assert "<script>" not in section
    assert "\u001b" not in section
    assert re.findall(r"<td>(.*?)</td>", section) == ["-", "-", "1.000", "-"]
