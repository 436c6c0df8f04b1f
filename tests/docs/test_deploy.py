"""The files in deploy/: they name what exists, fit their schemas, and watch what the server really tells."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from typer.main import get_command

from polar_sdk.cli.main import app as polar
from polar_sdk.testing import tiny_model
from polar_server import Settings, build
from polar_server.deployment.launch import Launch
from polar_vllm.settings import KEY, VERSION, WORKER

DEPLOY = Path(__file__).parents[2] / "deploy"
_NAMES = re.compile(r"\b((?:polar_|vllm:)[a-z_]+)")


def load(path: str) -> list[dict[str, Any]]:
    return [part for part in yaml.safe_load_all((DEPLOY / path).read_text(encoding="utf-8")) if part]


def commands() -> list[tuple[str, list[str]]]:
    """Arguments that containers give to `polar`."""
    services = load("compose.yaml")[0]["services"]
    found: list[tuple[str, list[str]]] = [
        (f"compose {name}", service["command"]) for name, service in services.items() if service.get("image") == "polar"
    ]
    before_vllm = load("compose.vllm.yaml")[0]["services"]
    found += [(f"compose.vllm {name}", before_vllm[name]["command"]) for name in ("server-1", "server-2")]
    found += [("kustomization", args) for args in patched("/args")]
    for part in load("kubernetes/polar.yaml"):
        pod = part.get("spec", {}).get("template", {}).get("spec", {})
        found += [(f"kubernetes {container['name']}", container["args"]) for container in pod.get("containers", [])]
    last = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()[-1]
    return [*found, ("Dockerfile", json.loads(last.removeprefix("CMD ")))]


def patched(path: str) -> list[Any]:
    """What the kustomization puts into the container of the servers."""
    (patch,) = load("kubernetes/kustomization.yaml")[0]["patches"]
    assert patch["target"] == {"kind": "StatefulSet", "name": "polar"}
    found = [one for one in yaml.safe_load(patch["patch"]) if one["path"].endswith(f"/containers/0{path}")]
    return [one["value"] for one in found]


def workers() -> list[tuple[str, list[str], list[str]]]:
    """Arguments that containers give to vLLM, and the URLs of the containers."""
    services = load("compose.vllm.yaml")[0]["services"]
    names = [name for name, service in services.items() if service.get("image") == "polar-vllm"]
    (first, *others) = [services[name]["command"] for name in names]
    assert all(other == first for other in others)
    (pods,) = [part for part in load("kubernetes/vllm.yaml") if part["kind"] == "StatefulSet"]
    spec = pods["spec"]
    ((host, args),) = [(spec["serviceName"], one["args"]) for one in spec["template"]["spec"]["containers"]]
    of_pods = [f"http://{pods['metadata']['name']}-{number}.{host}:8000" for number in range(spec["replicas"])]
    return [("compose", first, [f"http://{name}:8000" for name in names]), ("kubernetes", args, of_pods)]


@pytest.mark.parametrize(("where", "command", "urls"), workers())
def test_servers_send_programs_to_each_vllm_that_has_the_plugin(
    where: str, command: list[str], urls: list[str]
) -> None:
    options = dict(pairwise(command))
    assert options["--worker-cls"] == WORKER
    assert json.loads(options["--additional-config"])[KEY]["fills"] == ["/models/fills"]
    assert "--enable-prompt-tokens-details" in command  # or cached tokens would be billed as if they had run
    (args,) = (
        patched("/args") if where == "kubernetes" else [load("compose.vllm.yaml")[0]["services"]["server-1"]["command"]]
    )
    backends = Launch(backend=[text for option, text in pairwise(args) if option == "--backend"]).backends()
    assert {tuple(each) for each in backends.values()} == {tuple(f"programs+{url}" for url in urls)}
    shipped = DEPLOY.parent / "polar_sdk/shipped/policies/smollm2-135m-instruct.json"
    assert set(backends) <= set(json.loads(shipped.read_text(encoding="utf-8"))["tiers"])
    lines = (DEPLOY / "Dockerfile.vllm").read_text(encoding="utf-8")
    assert f"vllm-openai:v{VERSION}" in lines
    assert f"VLLM_PLUGINS={KEY}" in lines


@pytest.mark.parametrize(("where", "command"), commands())
def test_containers_run_commands_that_exist(where: str, command: list[str]) -> None:
    name, *arguments = command
    chosen = get_command(polar).commands[name]  # type: ignore[attr-defined]
    context = chosen.make_context(name, list(arguments))  # raises for an option or a value that it does not take
    assert context.params


@pytest.mark.parametrize("path", ["kubernetes/polar.yaml", "kubernetes/vllm.yaml"])
def test_manifests_fit_the_schemas_of_kubernetes(path: str) -> None:
    for part in load(path):
        kubernetes_validate.validate(part, kubernetes_validate.latest_version(), strict=True)


def test_a_server_has_time_to_drain() -> None:
    (replicas,) = [part for part in load("kubernetes/polar.yaml") if part["kind"] == "StatefulSet"]
    pod = replicas["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    asleep = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(server["args"][server["args"].index("--drain") + 1])
    assert pod["terminationGracePeriodSeconds"] > asleep + drain
    service = load("compose.yaml")[0]["services"]["server-1"]
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace > float(service["command"][service["command"].index("--drain") + 1])


def test_every_path_that_compose_mounts_exists() -> None:
    services = [each for path in ("compose.yaml", "compose.vllm.yaml") for each in load(path)[0]["services"].values()]
    for volume in (volume for service in services for volume in service.get("volumes", [])):
        if volume.startswith("./") and not volume.startswith("./models:"):  # which whoever deploys it fills
            assert (DEPLOY / volume.split(":")[0]).exists(), volume
    (config,) = services[-1]["command"]
    assert (DEPLOY / "prometheus" / Path(config).name).exists()


def test_alerts_and_dashboard_ask_for_metrics_that_the_server_has() -> None:
    texts = [rule["expr"] for group in load("prometheus/alerts.yaml")[0]["groups"] for rule in group["rules"]]
    board = json.loads((DEPLOY / "grafana" / "polar.json").read_text(encoding="utf-8"))
    texts += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    (scaler,) = [part for part in load("kubernetes/polar.yaml") if part["kind"] == "HorizontalPodAutoscaler"]
    texts += [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    asked = {name for text in texts for name in _NAMES.findall(text)}
    assert len(asked) > 10
    with TestClient(build(Settings(engine=tiny_model(), name="tiny"))) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        told = client.get("/metrics").text
    has = {sample.name for family in text_string_to_metric_families(told) for sample in family.samples}
    has |= {family.name for family in text_string_to_metric_families(told)}
    # A counter that nothing was counted by has no sample yet, but is declared.
    has |= {f"{family.name}_total" for family in text_string_to_metric_families(told) if family.type == "counter"}
    assert asked <= has, asked - has


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.vllm"])
def test_the_image_copies_what_it_builds_from_and_runs_without_rights(name: str) -> None:
    lines = (DEPLOY / name).read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (DEPLOY.parent / source).exists(), line
    assert "USER 10001" in lines
