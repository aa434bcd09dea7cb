"""An engine's processes: started with safe settings, looked after by number, ended with whoever started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from thinwire.errors import ConfigError

BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}
LEAN = {  # for processes that pass pieces on: what glibc frees goes back to the system at once
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LEVEL = re.compile(r"^(DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL) *: *")
ERROR = re.compile(r"^(ERROR|CRITICAL) *:|\[(emerg|alert|crit|error)\]|^Error: |^[A-Za-z_.]+(Error|Exception): ")
WATCH = 1.0  # seconds between two looks at the parent
GRACE = 8.0  # seconds that a process has to end by itself
COMMAND = 300.0  # seconds that a command of an engine's has to end
HEALTHY = 240.0  # seconds that a hub has to get well


def require_flower() -> None:
    """ConfigError with what to install, without Flower."""
    try:
        import flwr  # noqa: F401
    except ImportError:
        raise ConfigError("Flower is not installed; it comes with: pip install 'thinwire[flower]'") from None


def environment(home: Path) -> dict[str, str]:
    """The environment for Flower's processes: its home in a folder of ours, and nothing that it sends or installs."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    return {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path, "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Children:
    """Processes that end with this one: each is signalled by the system where it is Linux, and by `stop`."""

    def __init__(self, home: Path, logs: Path) -> None:
        self.environment, self.home, self.logs = environment(home), home, logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.began: dict[str, int] = {}  # where in its log a process begins

    def start(self, name: str, command: Sequence[str | Path], **extra: str) -> subprocess.Popen[bytes]:
        """Start a process under a name; what it prints goes to NAME.log."""
        return self.hand(name, command, (), **extra)

    def hand(
        self, name: str, command: Sequence[str | Path], descriptors: Sequence[int], /, **extra: str
    ) -> subprocess.Popen[bytes]:
        """See start; the process receives open files of this one under their numbers."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"{name}.log").open("ab") as log:
            self.began[name] = log.tell()
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, **extra},
                pass_fds=descriptors,
                preexec_fn=_ask_kernel if sys.platform == "linux" else None,
                start_new_session=True,  # Ctrl-C is for us, who then end it
            )
        self.running[name] = process
        return process

    def call(self, command: Sequence[str | Path], seconds: float = COMMAND) -> str:
        """Run a command to its end; RuntimeError with its last line if it fails."""
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
        if done.returncode:
            printed = (done.stderr + done.stdout).strip().splitlines()
            raise RuntimeError(
                f"{Path(command[0]).name}: {printed[-1] if printed else f'exit status {done.returncode}'}"
            )
        return done.stdout

    def why(self, name: str) -> str:
        """What a process has printed of its end since it was started: its last error, else its last line."""
        with (self.logs / f"{name}.log").open("rb") as log:
            log.seek(self.began.get(name, 0))
            return last_error(log.read().decode(errors="replace"))

    def kill(self, name: str) -> None:
        """End a process, and what it has started, at once."""
        _signal(self.running[name], signal.SIGKILL)
        self.running[name].wait()

    def terminate(self) -> None:
        """Ask all to end, the last one first."""
        for process in reversed(self.running.values()):
            _signal(process, signal.SIGTERM)

    def stop(self) -> None:
        """End all, and what they have started."""
        self.terminate()
        until = time.monotonic() + GRACE
        for process in reversed(self.running.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            _signal(process, signal.SIGKILL)  # its group too: engines leave children of their own behind
            process.wait()
        self.running.clear()


def last_error(printed: str) -> str:
    """The last error that a process of Flower's, nginx or Python has printed, in one line; without one the last line.

    Flower's errors go on over lines that have no level of their own.
    """
    lines = [line for line in (COLOUR.sub("", line).strip() for line in printed.splitlines()) if line]
    errors = [i for i, line in enumerate(lines) if ERROR.search(line)]
    if not errors:
        return lines[-1] if lines else "it printed nothing"
    first = errors[-1]
    rest = takewhile(lambda line: not LEVEL.match(line), lines[first + 1 :]) if LEVEL.match(lines[first]) else ()
    return " ".join(LEVEL.sub("", line) for line in [lines[first], *rest] if "more information" not in line)[:400]


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)  # it leads a session of its own, so this is its group and nobody else's


def end_with_parent() -> None:
    """Have this process end as soon as the one that started it has; for what an engine starts, or another of ours."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(0)


def _ask_kernel() -> None:
    # PR_SET_PDEATHSIG: the kernel ends this process when the thread that started it does
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended unnoticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        pass
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def below(pid: int) -> Iterator[tuple[int, str]]:
    """The processes that a process has started, and theirs: number and command; none where there is no /proc."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if parent == pid:
            yield int(entry.name), command
            yield from below(int(entry.name))


def wait_healthy(process: subprocess.Popen[bytes], port: int, ca: Path) -> str | None:
    """Wait until a hub on loopback reports that it is well; what is wrong where it does not, "" where it has ended."""
    until, context = time.monotonic() + HEALTHY, ssl.create_default_context(cafile=str(ca))
    while time.monotonic() < until:
        if process.poll() is not None:
            return ""
        try:
            with urllib.request.urlopen(f"https://127.0.0.1:{port}/health", timeout=2, context=context) as answer:
                if answer.status == 200:
                    return None
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                return f"its certificate is not good for this machine's loopback ({reason.verify_message})"
        time.sleep(0.1)
    return f"it does not answer within {HEALTHY:g} seconds"
