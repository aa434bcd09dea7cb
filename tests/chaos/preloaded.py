"""Commands of thinwire as processes of their own, forked off one that has imported all, with the shim before libc."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHIM = "THINWIRE_CHAOS_SHIM"
MODES = ("off", "count", "before", "after", "half", "stop", "fail_from", "fail_once", "short")
PATIENCE = 120.0  # seconds that a command may take before it counts as hanging


@dataclass(frozen=True)
class Fault:
    """What befalls a process at the `at`-th call that changes its files; with `openings` at the at-th file it opens.

    `before`, `after`, `half`: it is killed, with half of a write done. `stop`: it stands still until it is let go
    on. `fail_from`, `fail_once`: the call fails with `error`. `short`: writes take half of what they are given.
    """

    mode: str
    at: int = 1
    error: int = 0
    openings: bool = False


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, below 0 the signal; None where it had to be killed for hanging."""

    status: int | None
    out: str
    err: str

    @property
    def line(self) -> str | None:
        """The one line in which the command refused or stopped; None if it printed anything else, or a traceback."""
        lines = self.err.splitlines()
        if self.status in (1, 2) and len(lines) == 1 and lines[0].startswith("thinwire: "):
            return lines[0].removeprefix("thinwire: ")
        return None


def reexec(folder: Path) -> bool:
    """Begin this program again with the shim before libc; False where there is no C compiler."""
    if SHIM in os.environ:
        return True
    if (compiler := shutil.which("cc")) is None or not sys.platform.startswith("linux"):
        return False
    shim = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(source), "-ldl"], check=True)
    env = {**os.environ, "LD_PRELOAD": str(shim), SHIM: str(shim), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.stdout.flush()
    return os.execve(sys.executable, [sys.executable, *sys.argv], env)


def warm(*runs: list[str | Path]) -> None:
    """Import all that runs import, and load what numba has compiled for them, so that a fork has both."""
    from thinwire.commands.terminal import settle

    settle()
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    for args in runs:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(SystemExit):
            command(*args)()


class Process:
    """A function in a fork of this process, its output in files of `folder`, `fault` set for what lies below it."""

    def __init__(self, job: Callable[[], int], folder: Path, fault: Fault | None = None, trace: Path | None = None):
        self.outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - until the process has ended
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(job, folder, fault, trace)
        self.until = time.monotonic() + PATIENCE

    def _run(self, job: Callable[[], int], folder: Path, fault: Fault | None, trace: Path | None) -> None:
        status = 70
        try:
            for number, file in enumerate(self.outputs, 1):
                os.dup2(file.fileno(), number)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if fault is not None or trace is not None:
                arm(folder, fault or Fault("count"), trace)
            status = job()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def stopped(self) -> bool:
        """Wait until the process stands still; False if it has ended."""
        return os.WIFSTOPPED(self._wait(os.WUNTRACED))

    def go_on(self) -> None:
        """Let a process that stands still go on."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> Ended:
        """Wait for the end."""
        status = self._wait(0)
        out, err = ("" if file.seek(0) else file.read().decode(errors="replace") for file in self.outputs)
        for file in self.outputs:
            file.close()
        return Ended(None if status == -1 else os.waitstatus_to_exitcode(status), out, err)

    def _wait(self, flags: int) -> int:
        """The status; -1 for a process that had to be killed."""
        if not hasattr(self, "status"):
            while True:
                pid, status = os.waitpid(self.pid, flags | os.WNOHANG)
                if pid:
                    break
                if time.monotonic() > self.until:
                    os.kill(self.pid, signal.SIGKILL)
                    os.waitpid(self.pid, 0)
                    status = -1
                    break
                time.sleep(0.01)
            if status != -1 and os.WIFSTOPPED(status):
                return status
            self.status = status
        return self.status


def arm(folder: Path, fault: Fault, trace: Path | None = None) -> None:
    """Set the shim of this very process."""
    library = ctypes.CDLL(os.environ[SHIM])
    library.chaos_arm(
        os.fsencode(folder),
        MODES.index(fault.mode),
        ctypes.c_long(fault.at),
        fault.error,
        int(fault.openings),
        os.fsencode(trace) if trace is not None else b"",
    )


def command(*args: str | Path) -> Callable[[], int]:
    """A command line, to be run within a process."""

    def job() -> int:
        from thinwire import cli

        sys.argv = ["thinwire", *map(str, args)]
        cli.main()
        return 0

    return job


def thinwire(*args: str | Path, folder: Path, fault: Fault | None = None, trace: Path | None = None) -> Ended:
    """How a command ends, in a process of its own."""
    return Process(command(*args), folder, fault, trace).end()
