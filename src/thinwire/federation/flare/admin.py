"""A command to a FLARE server in a process of its own, which ends with it: FLARE's session has threads and a voice.

    python -m thinwire.federation.flare.admin KIT submit JOB FEWEST SECONDS NAME...
    python -m thinwire.federation.flare.admin KIT status ID

`submit` waits for the named sites, so many seconds at most, and for FEWEST of them for good; it prints the job's id.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from thinwire.federation.flare.kits import ADMIN

HEALTHY = 240.0  # seconds that a server has to take a session
STEP = 0.5


def main(kit: str, command: str, *words: str) -> str:
    """The answer to a command."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    until = time.monotonic() + HEALTHY
    while True:
        try:
            session = new_secure_session(ADMIN, kit, timeout=10)
            break
        except Exception:  # each of FLARE's layers has its own for a server that is not there yet
            if time.monotonic() > until:
                raise
            time.sleep(STEP)
    try:
        if command == "status":
            return str(session.get_job_meta(words[0])["status"])
        job, fewest, seconds, *names = words
        _wait(session, names, int(fewest), float(seconds))
        return str(session.submit_job(job))
    finally:
        session.close()


def _wait(session: Any, names: Sequence[str], fewest: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        there = {client.name for client in session.get_system_info().client_info} & set(names)
        if len(there) == len(names):
            return
        if time.monotonic() > until:
            if len(there) >= fewest:
                return
            absent = ", ".join(name for name in names if name not in there)
            raise RuntimeError(f"{len(there)} of {len(names)} sites are connected, {fewest} must; absent: {absent}")
        time.sleep(STEP)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = main(*sys.argv[1:])
    print(answer)  # noqa: T201
