"""thinwire run: the rounds of a run file in one process."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from thinwire.commands.claim import GoOn, claimed, record
from thinwire.commands.journal import LogForm, current, journal
from thinwire.commands.terminal import AGAIN, Metrics, Overrides, Stopped, cause, leaving, one_line, settle


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    go_on: GoOn = False,
    metrics: Metrics = None,
    log: LogForm = "text",
) -> None:
    """Run the rounds of a run file, with progress, and leave a model that transformers loads."""
    with journal(log), one_line():
        settle()
        from safetensors import SafetensorError

        from thinwire import assemble, config, memory
        from thinwire.commands import estimate
        from thinwire.commands.show import Lines, Live, print_summary
        from thinwire.data.statistics import remarks, shortened
        from thinwire.errors import Paused
        from thinwire.operations.metrics import check_port, exporting
        from thinwire.runtime.course import train
        from thinwire.trackers import Trackers, check, trackers_of
        from thinwire.train import parallel

        settings = config.load(file, overrides or [])
        check(settings)
        if metrics is not None:
            check_port(metrics)
        folder = out if out is not None else Path("runs") / settings.name
        rank = parallel.join()
        resume = resume or (go_on and (folder / "run.toml").exists())
        with claimed(folder, settings, resume, alone=not rank) as complete:
            if complete:
                return
            again = shlex.join(["thinwire", "run", str(file), *(overrides or []), "--out", str(folder), "--resume"])
            if rank:
                folder = parallel.shadow(folder)
            parallel.wait()
            with memory.for_good():
                whole, rows = assemble.prepared(settings)
            start = assemble.begin(whole, rows)
            lines = current()
            if lines is not None:
                lines.about |= {"run": f"{assemble.identity(settings):08x}", "name": settings.name}
            watched = Live(settings, rows, start.net, folder, resume) if lines is None else nullcontext(Lines(lines))
            with watched as watch:
                with memory.for_good():
                    job = start.job(folder, watch)
                for line in (shortened(job.names, job.clients, settings.data.max_length), *remarks(job.clients)):
                    if isinstance(watch, Live):
                        watch.remark(line)
                record(folder, settings, assemble.fingerprints(job))
                alone = parallel.ranks()[1] == 1  # else all would have to end at the same round
                with leaving() if alone else nullcontext() as leave, exporting(folder, metrics if alone else None):
                    job.leave = lambda: bool(leave)
                    try:
                        with Trackers(watch, trackers_of(settings, folder)) as job.watch:
                            train(job)
                    except Paused as asked:
                        raise Stopped(f"{asked}; go on from there with: {again}", AGAIN) from None
                    except KeyboardInterrupt:
                        line = f"stopped; go on from the last whole round with: {again}"
                        raise Stopped(line, AGAIN if leave else 1) from None
                    except (OSError, SafetensorError) as error:
                        raise Stopped(f"{cause(error)}; go on from the last whole round with: {again}") from None
            print_summary(folder, estimate.verdict(settings, job, folder))
