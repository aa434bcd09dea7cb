"""What a run or a site has come to, for Prometheus: read from its folder whenever it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from thinwire.errors import ConfigError
from thinwire.federation.reach import listening
from thinwire.operations.drops import ALL
from thinwire.operations.folders import is_run, is_site
from thinwire.operations.loopback import HOST, served
from thinwire.operations.site_status import SiteStatus, site_status
from thinwire.operations.status import RunStatus, counts, run_status

MOST = 500  # clients that have series of their own: a simulation of 100,000 would fill the database


def exporting(folder: Path, port: int | None) -> Any:
    """Serve the metrics of a folder on loopback as long as the block lasts; without a port nothing."""
    return nullcontext() if port is None else _exporting(folder, port)


def check_port(port: int) -> None:
    """ConfigError where the port is taken, or with what to install, without Prometheus' client."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--metrics: prometheus-client is not installed; it comes with: pip install 'thinwire[metrics]'"
        ) from None
    listening(HOST, port, "--metrics")


@contextmanager
def _exporting(folder: Path, port: int) -> Iterator[int]:
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    registry = CollectorRegistry()
    registry.register(Folder(folder))
    with served({"/metrics": (CONTENT_TYPE_LATEST, lambda: generate_latest(registry))}, port) as found:
        yield found


class Folder:
    """A collector of Prometheus' client. Names begin with thinwire_; all series have the label `run`, or `site`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> Iterator[Any]:
        """See CollectorRegistry: what there will be is not known before there is a record."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """See CollectorRegistry: metric families, made of the folder as it is now."""
        if is_run(self.folder):
            yield from _of_run(run_status(self.folder))
        elif is_site(self.folder):
            yield from _of_site(site_status(self.folder))


def _of_run(run: RunStatus) -> Iterator[Any]:
    at = {"run": run.name}
    yield _family("running", "Whether a process is at work on the run.", [(at, run.state == "running")])
    yield _family("ended", "Whether the run has ended.", [(at, run.state == "ended")])
    yield _family("rounds", "Rounds of the run.", [(at, run.rounds)])
    yield _family("rounds_done", "Rounds that have ended.", [(at, run.round)])
    if run.changed is not None:
        yield _family("round_ended_timestamp_seconds", "When the last round ended.", [(at, run.changed)])
        yield _family("rounds_seconds_total", "Seconds of all rounds.", [(at, run.seconds)])
    ways = [({**at, "way": "down"}, run.bytes_down), ({**at, "way": "up"}, run.bytes_up)]
    yield _family("bytes_total", "Bytes of all frames, down to clients and up from them.", ways)
    found = counts(run.drops)
    kinds = [({**at, "kind": kind}, found.get(kind, 0)) for kind in ALL]
    yield _family("dropped_total", "Replies that did not count, by kind of reason.", kinds)
    if run.loss is not None:
        yield _family("loss", "Training loss of the last round.", [(at, run.loss)])
    scores = [
        ({**at, "split": split, "score": name}, value)
        for split, values in run.scores.items()
        for name, value in values.items()
        if name != "round"
    ]
    yield _family("score", "The last evaluation of each split.", scores)
    yield _family("clients", "Clients that the run knows.", [(at, sum(client.member for client in run.clients))])
    few = [({**at, "client": client.name}, client) for client in run.clients[:MOST]]
    dropped = [(label, client.dropped) for label, client in few]
    replies = [(label, client.replies) for label, client in few]
    yield _family("client_replies_total", "Replies that counted.", replies)
    yield _family("client_dropped_total", "Replies that did not count.", dropped)
    sent = [({**label, "way": way}, getattr(client, f"bytes_{way}")) for label, client in few for way in ("down", "up")]
    yield _family("client_bytes_total", "Bytes of a client's frames.", sent)
    seen = [(label, client.seen) for label, client in few if client.seen is not None]
    yield _family("client_seen_timestamp_seconds", "When a site was last connected, or answered.", seen)
    there = [(label, client.connected) for label, client in few if client.connected is not None]
    yield _family("client_connected", "Whether a site is connected.", there)


def _of_site(site: SiteStatus) -> Iterator[Any]:
    at = {"site": site.name}
    yield _family("site_running", "Whether a client is at work here.", [(at, site.state == "running")])
    yield _family("site_visit", "Whether a visit is under way.", [(at, site.asked)])
    if site.seen is not None:
        yield _family("site_seen_timestamp_seconds", "When the last frame came or went.", [(at, site.seen)])
    runs = [({**at, "run": run.run, "method": run.method}, run) for run in site.runs]
    rounds = [(label, run.rounds) for label, run in runs]
    yield _family("site_rounds_total", "Rounds of training that were answered.", rounds)
    ways = [({**label, "way": "in"}, run.bytes_in) for label, run in runs]
    ways += [({**label, "way": "out"}, run.bytes_out) for label, run in runs]
    yield _family("site_bytes_total", "Bytes of the frames that came in, and of those that left.", ways)
    refused = [(label, sum(run.refused.values())) for label, run in runs]
    yield _family("site_refused_total", "Frames that were refused, and answers that did not leave.", refused)


def _family(name: str, about: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> Any:
    """A metric family: a counter where its name ends as one."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    labels = list(samples[0][0]) if samples else []
    family = kind(f"thinwire_{name}", about, labels=labels)
    for label, value in samples:
        family.add_metric(list(label.values()), float(value))
    return family
