"""The Grafana dashboard, Prometheus' files and the page of metrics name what a running server exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from serving import ROOT, RunningServer

from foveate.api.metrics_reference import families, page

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "foveate.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
PROMTOOL = shutil.which("promtool")
NAME = re.compile(r"\bfoveate_\w+")
GPU_ONLY = "foveate_vision_cuda_ipc_"


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> Iterator[str]:
    yield from (target["expr"] for panel in panels() for target in panel["targets"])
    yield from (rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"])
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        yield variable.get("definition", "")


@pytest.fixture(scope="module")
def exported(busy: RunningServer) -> dict[str, Any]:
    """Every family of the server's /metrics, which is read by Prometheus' own parser."""
    return dict(families(httpx.get(f"{busy.url}/metrics").text))


def samples_of(exported: dict[str, Any]) -> set[str]:
    names = set()
    for name, family in exported.items():
        ends = ("_bucket", "_sum", "_count") if family.type == "histogram" else ("",)
        names |= {name + end for end in ends}
    return names


def test_every_name_is_exported(exported: dict[str, Any]) -> None:
    used = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(used) > 20
    unknown = {name for name in used - samples_of(exported) if not name.startswith(GPU_ONLY)}
    assert not unknown
    # Those need a GPU; that they are names at all is known from those of the other arena.
    for name in (name for name in used if name.startswith(GPU_ONLY)):
        assert name.replace(GPU_ONLY, "foveate_vision_arena_") in exported


def test_every_label_is_there(exported: dict[str, Any]) -> None:
    known = {label for family in exported.values() for sample in family.samples for label in sample.labels}
    known |= {"job", "instance", "gpu"}
    for expression in expressions():
        grouped = [label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")]
        matched = re.findall(r"(\w+)=~?\"", expression)
        assert {label.strip() for label in (*grouped, *matched)} <= known


def test_the_page_of_metrics_is_made_of_the_metrics() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == page(), "make docs-reference"


def test_the_page_has_what_is_exported(exported: dict[str, Any]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| [^|]*\| (.+) \|$", page(), re.MULTILINE)
    documented = {name: (kind, text) for name, kind, text in rows}
    shown = {name: (family.type, family.documentation) for name, family in exported.items()}
    assert {name: documented.get(name) for name in shown} == shown
    assert {name for name in documented if not name.startswith(GPU_ONLY)} == set(shown)


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["uid"]
    assert [one["name"] for one in dashboard["templating"]["list"]] == ["datasource", "job", "instance"]
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        assert {target["refId"] for target in panel["targets"]} == {chr(65 + i) for i in range(len(panel["targets"]))}
        for target in panel["targets"]:
            metrics = len(NAME.findall(target["expr"]))
            assert target["expr"].count('{job=~"$job", instance=~"$instance"') == metrics


def test_prometheus_finds_the_server_and_the_rules() -> None:
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    configuration = yaml.safe_load(text)
    assert configuration["rule_files"] == [ALERTS.name]
    (scraped,) = configuration["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": ["localhost:9997"]}]
    # What is commented out is right too.
    whole = yaml.safe_load(
        re.sub(r"^    # (?=\s*(authorization|type|credentials_file):)", "    ", text, flags=re.MULTILINE)
    )
    assert whole["scrape_configs"][0]["authorization"] == {
        "type": "Bearer",
        "credentials_file": "/etc/prometheus/foveate-key",
    }
    jobs = re.findall(r'job="(\w+)"', ALERTS.read_text())
    assert set(jobs) == {scraped["job_name"]}


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool")
def test_promtool_finds_nothing() -> None:
    assert PROMTOOL is not None
    command = [PROMTOOL, "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
