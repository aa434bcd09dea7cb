"""The metrics of a run and of a site, as Prometheus reads them."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused
from test_live import asked
from test_status import a_run, a_site

from thinwire.operations.loopback import HOST
from thinwire.operations.metrics import exporting
from thinwire.runtime.folder import locked


def test_without_the_package_one_line_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "prometheus_client":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    file = tmp_path / "run.toml"
    file.write_text('[data]\npath = "rows.jsonl"\n[method]\nname = "fedkseed"\n')
    line = "--metrics: prometheus-client is not installed; it comes with: pip install 'thinwire[metrics]'"
    assert refused("run", file, "--metrics", "9900") == line


def samples(folder: Path) -> dict[tuple[str, frozenset[str]], float]:
    """(name, values of its labels) -> value, as a scrape finds them."""
    parser = pytest.importorskip("prometheus_client.parser", reason="the extra `metrics` is not installed")
    with exporting(folder, 0) as port:
        status, text, headers = asked(port, "/metrics", f"{HOST}:{port}")
        assert asked(port, "/metrics", "example.org")[0] == 403
    assert (status, headers["Content-Type"].startswith("text/plain")) == (200, True)
    families = parser.text_string_to_metric_families(text.decode())
    return {(s.name, frozenset(s.labels.values())): s.value for family in families for s in family.samples}


def test_a_run_s_rounds_bytes_and_drops(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    run = a_run(tmp_path / "run")
    seen = {"north": {"id": 0, "seen": 1e9, "connected": True}, "south": {"id": 1, "connected": False}}
    (run / "federation" / "seen.json").write_text(json.dumps(seen))
    with locked(run):
        found = samples(run)
    for name, value in {
        ("thinwire_running", "silos"): 1,
        ("thinwire_rounds", "silos"): 5,
        ("thinwire_rounds_done", "silos"): 3,
        ("thinwire_bytes_total", "silos", "down"): 600,
        ("thinwire_bytes_total", "silos", "up"): 120,
        ("thinwire_dropped_total", "silos", "late"): 1,
        ("thinwire_dropped_total", "silos", "left out"): 1,
        ("thinwire_dropped_total", "silos", "away"): 0,
        ("thinwire_loss", "silos"): 2.5 / 3,
        ("thinwire_score", "silos", "heldout", "loss"): 2.75,
        ("thinwire_clients", "silos"): 2,
        ("thinwire_client_replies_total", "silos", "north"): 3,
        ("thinwire_client_bytes_total", "silos", "south", "down"): 300,
        ("thinwire_client_seen_timestamp_seconds", "silos", "north"): 1e9,
        ("thinwire_client_connected", "silos", "south"): 0,
    }.items():
        assert found[name[0], frozenset(name[1:])] == value, name
    assert samples(run)["thinwire_running", frozenset({"silos"})] == 0


def test_a_site_s_rounds_bytes_and_refusals(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    found = samples(a_site(tmp_path / "site"))
    label = frozenset({"north", "00000007", "fedkseed"})
    assert found["thinwire_site_running", frozenset({"north"})] == 0
    assert found["thinwire_site_rounds_total", label] == 2
    assert found["thinwire_site_bytes_total", label | {"out"}] == 60
    assert found["thinwire_site_refused_total", label] == 1


def test_a_folder_in_which_nothing_has_begun_has_no_metrics(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    assert samples(tmp_path) == {}
