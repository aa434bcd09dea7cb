"""What FLARE's processes on this machine start with: a kit for the server, for its admin and for each site.

Each has a certificate of the federation's own authority, and the list of classes that a job may name there.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from thinwire.errors import ConfigError

HOST = "localhost"
ADMIN = "admin@thinwire.local"
PROJECT = "thinwire"
SOCKET = "thinwire.json"  # in a site's folder `local`
# The prefixes of all that our jobs name; a job that brings code of its own is another matter, and needs another right.
CLASSES = ("nvflare.collab.runtime.", "thinwire.federation.flare.app.")
TAKEN = ("server", HOST)


def require_flare() -> None:
    """ConfigError with what to install, without FLARE or with one that has no Collab API as it is called here."""
    try:
        import nvflare.collab.runtime  # noqa: F401
    except ImportError:
        raise ConfigError("NVIDIA FLARE is not installed; it comes with: pip install 'thinwire[nvflare]'") from None


def check_names(sites: Sequence[str]) -> None:
    """ConfigError for a name that FLARE would not take."""
    for name in sites:
        if not re.fullmatch("[A-Za-z0-9_-]+", name) or name in TAKEN:
            raise ConfigError(f"{name!r} is no name for a site on NVIDIA FLARE: letters, digits, dashes, underscores")


def make(place: Path, sites: Sequence[str], port: int) -> None:
    """Kits below `place`, in the place of what is there: HOST, ADMIN and a folder a site."""
    from nvflare.lighter.entity import Project
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.signature import SignatureBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    place.chmod(0o700)
    project = Project(PROJECT, "a federation on one machine")
    project.set_server(HOST, PROJECT, {"fed_learn_port": port, "admin_port": port, "default_host": HOST})
    for name in sites:
        project.add_client(name, PROJECT, {})
    project.add_admin(ADMIN, PROJECT, {"role": "project_admin"})
    builders = [WorkspaceBuilder(), StaticFileBuilder(scheme="grpc"), CertBuilder(), SignatureBuilder()]
    made = place / "made"
    Provisioner(str(made), builders).provision(project, logger=_Quiet())
    (kits,) = (made / PROJECT).glob("prod_*")
    for name in (HOST, ADMIN, *sites):
        (kits / name).rename(place / name)
    shutil.rmtree(made)
    for name in (HOST, *sites):
        _allow(place / name / "local", place / "store")


def socket_file(kit: Path) -> Path:
    """Where a site's kit has the worker's socket."""
    return kit / "local" / SOCKET


def socket_of(local: Path) -> Path:
    """The worker's socket, as the site's folder `local` has it."""
    return Path(json.loads((local / SOCKET).read_text(encoding="utf-8"))["socket"])


def _allow(local: Path, store: Path) -> None:
    """Have a kit take jobs that name our classes, and keep what it keeps below `store`, not in a folder of /tmp."""
    text = (local / "resources.json.default").read_text(encoding="utf-8").replace("/tmp/nvflare", str(store))
    resources = json.loads(text)
    resources["class_allow_list"] = [*resources["class_allow_list"], *CLASSES]
    (local / "resources.json").write_text(json.dumps(resources, indent=2), encoding="utf-8")


class _Quiet:
    """A log of FLARE's provisioning that keeps its word to itself."""

    def debug(self, text: str) -> None: ...

    info = warning = debug

    def error(self, text: str) -> None:
        raise RuntimeError(text)
