"""A command to a FLARE server in a process of its own, which ends with it: FLARE's session has threads and a voice.

    python -m thinwire.federation.flare.admin KIT submit JOB FEWEST SECONDS NAME...
    python -m thinwire.federation.flare.admin KIT status ID
    python -m thinwire.federation.flare.admin KIT clients

`submit` waits for the named sites, so many seconds at most, and fails with fewer than FEWEST of them. It prints the
job's id and the names of those that are absent; `status` how that stands; `clients` who is connected, a name a line.
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
        if command == "clients":
            return "\n".join(_connected(session))
        job, fewest, seconds, *names = words
        absent = _wait(session, names, int(fewest), float(seconds))
        return "\n".join([str(session.submit_job(job)), *absent])
    finally:
        session.close()


def _wait(session: Any, names: Sequence[str], fewest: int, seconds: float) -> list[str]:
    """Those that are absent in the end."""
    until = time.monotonic() + seconds
    while True:
        there = _connected(session)
        absent = [name for name in names if name not in there]
        if not absent:
            return []
        if time.monotonic() > until:
            came = len(names) - len(absent)
            if came >= min(fewest, len(names)):
                return absent
            raise RuntimeError(
                f"{came} of {len(names)} sites are connected, {fewest} must; absent: {', '.join(absent)}"
            )
        time.sleep(STEP)


def _connected(session: Any) -> set[str]:
    return {client.name for client in session.get_system_info().client_info}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = main(*sys.argv[1:])
    print(answer)  # noqa: T201
