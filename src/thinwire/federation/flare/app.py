"""What NVIDIA FLARE starts for a job, at the server and at a site: objects of its Collab API that the job's files name.

Both sides take them from the thinwire that is installed there: a job ships no code.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from nvflare.collab import collab

from thinwire.federation.channel import Down, ask
from thinwire.federation.engine import Aborted, About
from thinwire.federation.flare.kits import socket_of
from thinwire.federation.processes import end_with_parent

LAST = 20.0  # seconds that FLARE has to end a job's process by itself once the loop has ended under it


class Loop:
    """The server's loop, for the run in a folder. `place`: where the command runs, from which the run's paths count."""

    def __init__(self, folder: str, place: str) -> None:
        self.folder, self.place = folder, place

    @collab.main
    def run(self) -> None:
        """Run the rounds that are left, with the sites that the job began with."""
        from thinwire.federation.flare.engine import Flare
        from thinwire.federation.server_app import serve

        os.chdir(self.place)
        engine = Flare(list(collab.clients), collab.context.is_aborted)
        try:
            serve(engine, Path(self.folder))
        except Aborted:  # whoever waits for the end of this process begins another job
            last = threading.Timer(LAST, os._exit, [1])
            last.daemon = True
            last.start()
            raise
        finally:
            engine.close()


class Relay:
    """The site's half: a process a job, which holds no model and hands each piece to the site's worker.

    `settings`: what the worker is to know of the run, in hex, for FLARE puts values into braces.
    """

    def __init__(self, settings: str) -> None:
        self.settings = settings

    @collab.init
    def begin(self) -> None:
        """Find the worker's socket, which the site's own folder names."""
        end_with_parent()  # FLARE leaves this process behind when its own has died
        self.text = bytes.fromhex(self.settings).decode()
        self.socket = socket_of(Path(collab.context.app.workspace.get_site_config_dir()))

    @collab.publish
    def knock(self) -> None:
        """Answer, and so show that this process is there."""

    @collab.publish
    def visit(self, about: About, piece: bytes) -> tuple[About, bytes]:
        """The worker's answer to a message; what goes wrong travels as its `error`."""
        transfer = str(about.get("transfer", ""))
        try:
            if collab.caller != "server":
                raise ValueError(f"a message of {collab.caller}, which is not the server")  # sites may call each other
            answer, body = ask(self.socket, {**about, "settings": self.text}, piece)
        except (Down, TypeError, ValueError) as error:
            return {"transfer": transfer, "total": 0, "error": str(error)}, b""
        return {"transfer": transfer, **answer}, body
