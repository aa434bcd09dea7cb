"""The lock holds what pyproject.toml asks for, at the versions that are tested, with hashes and with nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
EXTRAS = ("flower", "report")
WITH_CUDA = re.compile(r"nvidia-|cuda-|triton$")  # come with PyPI's torch for Linux, not with its build for CPUs
COPYLEFT = re.compile(r"GPL|GNU|MPL|Mozilla|EUPL|SSPL|CDDL|\bEPL|Eclipse|\bOSL|CC-BY-SA")


def locked() -> dict[str, tuple[Version, list[str]]]:
    """Version and hashes of each package of the lock."""
    found = re.findall(r"^([a-z0-9-]+)==(\S+) \\\n((?: +--hash=\S+(?: \\)?\n)*)", LOCK, re.MULTILINE)
    assert len(found) == LOCK.count("==")
    return {
        name: (Version(version), re.findall(r"--hash=sha256:([0-9a-f]{64})\b", rest)) for name, version, rest in found
    }


def asked() -> list[Requirement]:
    """What pyproject.toml asks for, without extras and with those of the lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def licences() -> dict[str, str]:
    """The licence of each package of docs/licences.md."""
    rows = re.findall(r"^\| (\S+) +\| (.+?) +\|$", (ROOT / "docs/licences.md").read_text(), re.MULTILINE)
    return {canonicalize_name(name): licence for name, licence in rows if name != "Name"}


@pytest.mark.parametrize("requirement", asked(), ids=lambda requirement: requirement.name)
def test_lock_has_what_is_asked_for(requirement: Requirement) -> None:
    version, _ = locked()[canonicalize_name(requirement.name)]
    assert version in requirement.specifier


def test_each_package_has_a_hash() -> None:
    assert [name for name, (_, hashes) in locked().items() if not hashes] == []


def test_lock_and_constraints_agree() -> None:
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {canonicalize_name(name): Version(version) for name, version in lines}
    both = pinned.keys() & locked().keys()
    assert "torch" in both
    assert {name: pinned[name] for name in both} == {name: locked()[name][0] for name in both}


def test_lock_names_no_place() -> None:
    """Each line is a package, a hash, or why a package is there: no index, no address, no path, no local build."""
    line = re.compile(r"[a-z0-9-]+==[\w.]+ \\|    --hash=sha256:[0-9a-f]{64}(?: \\)?|\s*#[^/\\]*")
    assert [text for text in LOCK.splitlines() if not line.fullmatch(text)] == []


def test_licences_are_those_of_the_lock() -> None:
    without_cuda = {name for name in locked() if not WITH_CUDA.match(name)}
    assert {name for name in licences() if not WITH_CUDA.match(name)} == without_cuda
    assert [name for name, licence in licences().items() if licence == "UNKNOWN"] == []


def test_copyleft_is_named_on_the_page() -> None:
    page = (ROOT / "docs/howto/supply-chain.md").read_text()
    section = page.split("## Licences")[1]
    found = {name for name, licence in licences().items() if COPYLEFT.search(licence)}
    assert found == set(re.findall(r"^- `([\w-]+)`: ", section, re.MULTILINE))
