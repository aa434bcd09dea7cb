"""The chart as Helm itself renders it: what Kubernetes has schemas for, and what a hub and a site may do there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_folder, tiny_rows, write_jsonl
from typer.testing import CliRunner

from thinwire.cli import app

helm = pytest.importorskip("helm_python", reason="comes with: pip install helm-python-sdk")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="comes with: pip install kubernetes-validate")

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
HUB = {"enabled": True, "run": 'name = "silos"\n', "sites": ["north", "south"]}
SITE = {
    "enabled": True,
    "name": "north",
    "server": {"host": "hub.example", "address": "192.0.2.7"},
    "rows": {"claim": "rows"},
    "model": {"claim": "models", "folder": "smollm2"},
}
Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def chart() -> Iterator[Any]:
    with helm.Chart.load(DEPLOY / "chart") as loaded:
        yield loaded


def rendered(chart: Any, **values: Any) -> dict[str, Manifest]:
    """What these values make, by kind."""
    texts = chart.render(values, name="silos", namespace="federation").values()
    found = [one for text in texts for one in yaml.safe_load_all(text) if one]
    assert len({one["kind"] for one in found}) == len(found)
    return {one["kind"]: one for one in found}


def pod(manifests: dict[str, Manifest]) -> Manifest:
    """The pod of a hub or of a site."""
    return dict((manifests.get("Job") or manifests["Deployment"])["spec"]["template"]["spec"])


@pytest.mark.parametrize("version", ["1.28", "1.33", "1.37"])
@pytest.mark.parametrize(
    "values",
    [
        {"hub": HUB},
        {"hub": {**HUB, "clusterIP": "192.0.2.7", "sources": ["192.0.2.0/24"], "model": {"claim": "models"}}},
        {"site": SITE},
        {"site": {**SITE, "server": {"host": "hub", "address": "2001:db8::7"}, "arguments": ["--device", "cuda"]}},
    ],
)
def test_manifests_are_what_kubernetes_takes(chart: Any, values: dict[str, Any], version: str) -> None:
    manifests = rendered(chart, pullSecrets=["registry"], **values)
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)
    kinds = {"NetworkPolicy", "PersistentVolumeClaim"}
    assert set(manifests) == kinds | ({"Deployment"} if "site" in values else {"ConfigMap", "Service", "Job"})


def test_helm_finds_nothing_wrong() -> None:
    report = helm.lint(DEPLOY / "chart", {"hub": HUB}, strict=True)
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("values", [{"hub": HUB}, {"site": SITE}])
def test_containers_have_no_more_than_they_need(chart: Any, values: dict[str, Any]) -> None:
    spec = pod(rendered(chart, **values))
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    containers = spec["containers"] + spec.get("initContainers", [])
    for container in containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    written = {mount["name"] for one in containers for mount in one["volumeMounts"] if not mount.get("readOnly")}
    kinds = {volume["name"]: set(volume) - {"name"} for volume in spec["volumes"]}
    assert {name for name in written if kinds[name] != {"emptyDir"}} == {"run" if "hub" in values else "state"}
    (main,) = spec["containers"]
    assert {"requests", "limits"} <= set(main["resources"])
    assert "readinessProbe" in main


def test_a_site_reaches_the_server_and_nothing_else(chart: Any) -> None:
    manifests = rendered(chart, site=SITE)
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == []
    reached = {"to": [{"ipBlock": {"cidr": "192.0.2.7/32"}}], "ports": [{"protocol": "TCP", "port": 8443}]}
    assert policy["egress"] == [reached]
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert pod(manifests)["hostAliases"] == [{"ip": "192.0.2.7", "hostnames": ["hub.example"]}]  # no name server


def test_a_site_reads_rows_model_and_secrets_and_its_key_is_its_own(chart: Any) -> None:
    spec = pod(rendered(chart, site=SITE))
    (client,) = spec["containers"]
    mounts = {mount["name"]: mount.get("readOnly", False) for mount in client["volumeMounts"]}
    assert {name for name, alone in mounts.items() if alone} == {"rows", "model", "secret", "key"}
    sources = {volume["name"]: volume for volume in spec["volumes"]}
    for name in ("rows", "model"):
        assert sources[name]["persistentVolumeClaim"]["readOnly"] is True
    assert sources["secret"]["secret"]["secretName"] == "thinwire-site"
    assert "0600" in spec["initContainers"][0]["command"]  # the command refuses a key that others can read
    options = [word.partition("=")[0] for word in client["args"][1:]]
    known = CliRunner().invoke(app, ["client", "--help"]).output
    assert client["args"][0] == "client"
    assert [option for option in options if option not in known] == []


def test_the_hub_s_volume_has_the_files_that_its_command_reads(chart: Any) -> None:
    spec = pod(rendered(chart, hub=HUB))
    (keys,) = (volume["projected"]["sources"] for volume in spec["volumes"] if volume["name"] == "keys")
    needed, optional = ({item["path"] for item in source["secret"]["items"]} for source in keys)
    assert needed == {"ca.crt", "server.crt", "server.key", "sites/north.pub", "sites/south.pub"}
    assert optional == {"sites/north.rows", "sites/south.rows"}
    assert "ca.key" not in json.dumps(spec)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"hub": {"rounds": 3}}, "at '/hub': additional properties 'rounds' not allowed"),
        ({"sites": []}, "at '': additional properties 'sites' not allowed"),
        ({"site": {"rows": {"path": "/rows"}}}, "at '/site/rows': additional properties 'path' not allowed"),
        ({"site": {"server": {"address": "hub.example"}}}, "at '/site/server/address': 'hub.example' does not match"),
        ({"hub": {"sites": ["a b"]}}, "at '/hub/sites/0': 'a b' does not match pattern"),
        ({"hub": {"port": 443}}, "at '/hub/port': minimum: got 443, want 1,024"),
        ({"hub": {"enabled": True}}, "hub.run: missing; --set-file hub.run=FILE.toml"),
        ({"hub": {"enabled": True, "run": "x"}}, "hub.sites: missing; the names in federation.sites"),
        ({"site": {"enabled": True}}, "site.name: missing"),
        ({"site": {**SITE, "rows": {}}}, "site.rows.claim: missing"),
        ({"site": {**SITE, "model": {}}}, "site.model.claim: missing"),
        ({"site": {**SITE, "server": {"host": "hub"}}}, "site.server.address: missing"),
    ],
)
def test_a_value_that_is_wrong_is_refused_in_one_line(chart: Any, values: dict[str, Any], line: str) -> None:
    def used() -> None:
        chart.validate_schema(values)
        chart.render(values, name="silos")

    with pytest.raises(helm.HelmError) as caught:
        used()
    (found,) = [text for text in str(caught.value).splitlines() if text != "thinwire:"]
    assert line in found


def test_every_value_has_a_default_and_a_place_in_the_schema(chart: Any) -> None:
    def names(tree: Any, at: str = "") -> set[str]:
        inner = tree.get("properties", {}) if "type" in tree or "properties" in tree else {}
        return {at, *(name for key, each in inner.items() for name in names(each, f"{at}.{key}"))}

    def defaults(tree: Any, at: str = "") -> set[str]:
        inner = tree.items() if isinstance(tree, dict) and not at.endswith(("requests", "limits")) else ()
        return {at, *(name for key, each in inner for name in defaults(each, f"{at}.{key}"))}

    assert names(chart.schema) - {".global"} == defaults(chart.values)


def test_resources_come_from_the_estimate(chart: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(12))
    (tmp_path / "run.toml").write_text(
        f'name = "r"\nmodel.path = "{tiny_folder(tmp_path / "model")}"\ndata.path = "{tmp_path / "rows.jsonl"}"\n'
        'data.clients = 2\ndata.template = "plain"\ndata.max_length = 64\nmethod.name = "fedkseed"\n'
    )
    done = CliRunner().invoke(app, ["estimate", str(tmp_path / "run.toml"), "--json"])
    assert done.exit_code == 0, done.output
    (tmp_path / "estimate.json").write_text(done.output)
    script = [sys.executable, str(DEPLOY / "resources.py")]
    made = subprocess.run([*script, str(tmp_path / "estimate.json")], capture_output=True, text=True, check=True)
    values = yaml.safe_load(made.stdout)
    chart.validate_schema(values)
    estimate = json.loads(done.output)
    for name, half in (("hub", "server"), ("site", "client")):
        found = values[name]["resources"]
        asked, most = (int(found[kind]["memory"].removesuffix("Mi")) for kind in ("requests", "limits"))
        assert estimate[half]["total"] / (1 << 20) + 100 < asked < most
    wrong = subprocess.run([*script, str(tmp_path / "run.toml")], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert wrong.stderr.count("\n") == 1
