"""thinwire watch: a run's report in the browser, which fills itself as rounds come in."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from thinwire.commands.terminal import echo, leaving, one_line

TICK = 0.2  # seconds between two looks for the wish to end


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, at its hub or on one machine.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: any free one.")] = 0,
) -> None:
    """Serve the report of a run on this machine's loopback, new as rounds come in; Ctrl-C ends it."""
    with one_line(), leaving() as leave:
        from thinwire.errors import ConfigError
        from thinwire.federation.reach import listening
        from thinwire.operations.folders import is_run
        from thinwire.operations.live import serving
        from thinwire.operations.loopback import HOST
        from thinwire.report.page import require_library

        if not is_run(run):
            raise ConfigError(f"{run}: no run is there")
        require_library()
        if port:
            listening(HOST, port, "--port")
        with serving(run, port) as found, suppress(KeyboardInterrupt):
            echo(f"{run}: http://{HOST}:{found}/ for the users of this machine; Ctrl-C ends it")
            while not leave:
                time.sleep(TICK)
