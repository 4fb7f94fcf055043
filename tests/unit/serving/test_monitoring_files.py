"""Dashboard, alert rules and documentation name what is counted, with its labels, as its kind allows."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from rayward.serving.metrics import BY_NAME, METRICS, PREFIX, Metric
from rayward.serving.reporting import CORRELATION_THRESHOLD, DRIFT_THRESHOLD, SPREAD_THRESHOLD, WINDOW_S

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = json.loads((ROOT / "serve" / "grafana.json").read_text(encoding="utf-8"))
ALERTS = ROOT / "serve" / "alerts.yaml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
QUERIES += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
EXPRESSIONS = [*QUERIES, *(rule["expr"] for rule in RULES)]

OF_PROCESSES = {"role", "source"}
GROUPINGS = ("by", "without", "on", "ignoring", "group_left", "group_right")
GROWING = ("rate", "increase", "irate")


def _metric_of(name: str) -> tuple[Metric, bool]:
    # And whether it only grows: a counter, or a part of a histogram but for a sum that may fall.
    whole = name.removeprefix(PREFIX)
    if whole in BY_NAME and BY_NAME[whole].kind != "histogram":
        return BY_NAME[whole], BY_NAME[whole].kind == "counter"
    base, _, part = whole.rpartition("_")
    metric = BY_NAME[base]
    assert metric.kind == "histogram", name
    assert part in ("bucket", "sum", "count"), name
    return metric, part != "sum" or min(metric.bounds) >= 0


def _labels_of(metric: Metric) -> set[str]:
    of_version = {"model", "version"} if "replica" in metric.role else set()
    return OF_PROCESSES | of_version | set(metric.labels) | ({"le"} if metric.kind == "histogram" else set())


def faults(expression: str) -> list[str]:
    """What is wrong with an expression, as far as names, labels and kinds tell."""
    found = []
    bare = re.sub(r'"[^"]*"', '""', expression)
    for opening, closing in ("()", "{}", "[]"):
        if bare.count(opening) != bare.count(closing):
            found.append(f"{opening} and {closing}")
    labels_there: set[str] = set()
    for match in re.finditer(rf"({PREFIX}\w+)(\{{[^}}]*\}})?(\[[^\]]+\])?", bare):
        name, selector, window = match.groups()
        try:
            metric, grows = _metric_of(name)
        except (KeyError, AssertionError):
            found.append(f"no metric {name}")
            continue
        labels_there |= _labels_of(metric)
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector or ""))
        found += [f"{name} has no label {label}" for label in asked - _labels_of(metric)]
        function = re.search(r"(\w+)\($", bare[: match.start()])
        rated = function is not None and function.group(1) in GROWING
        if rated and not grows:
            found.append(f"{name} may fall, and has no {function.group(1) if function else ''}")
        if rated != (window is not None) and not (function is not None and function.group(1) == "changes"):
            found.append(f"{name}: a window goes with a rate")
        if grows and not rated:
            found.append(f"{name} only grows, and stands there without a rate")
    for labels in re.findall(rf"\b(?:{'|'.join(GROUPINGS)})\s*\(([^)]*)\)", bare):
        found += [f"grouped by {label}" for label in re.split(r"\s*,\s*", labels.strip()) if label and label not in labels_there]
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_what_there_is(expression: str) -> None:
    assert PREFIX in expression
    assert faults(expression) == []


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("sum(rate(rayward_tokens_computed[5m]))", "no metric rayward_tokens_computed"),
        ("rate(rayward_queued_tokens[5m])", "rayward_queued_tokens may fall, and has no rate"),
        ("rate(rayward_reward_sum[5m])", "rayward_reward_sum may fall, and has no rate"),
        ("sum(rayward_forwards_total)", "rayward_forwards_total only grows, and stands there without a rate"),
        ('rayward_queued_tokens{reason="x"}', "rayward_queued_tokens has no label reason"),
        ("sum by (dialect) (rayward_queued_tokens)", "grouped by dialect"),
        ("sum(rate(rayward_forwards_total[5m])", "( and )"),
        ("rate(rayward_forwards_total)", "rayward_forwards_total: a window goes with a rate"),
    ],
)
def test_the_check_sees_a_fault(expression: str, fault: str) -> None:
    assert fault in faults(expression)


def test_what_is_counted_is_on_the_dashboard_or_in_a_rule() -> None:
    shown = {_metric_of(name)[0].name for expression in EXPRESSIONS for name in re.findall(rf"{PREFIX}\w+", expression)}
    # Parts of what is shown, or of interest to somebody who looks for one thing.
    aside = {
        "reward_sums",
        "reward",
        "reward_mean",
        "reward_std",
        "reward_length_correlation",
        "reference_mean",
        "reference_std",
        "forward_units",
    }
    aside |= {"forwards_total", "answered_items_total", "dispatched_requests_total", "shadow_difference_sum", "shadow_max_abs_difference"}
    aside |= {
        "shadow_uncompared_total",
        "poisoned_items_total",
        "route_table_generation",
        "start_time_seconds",
        "window_rewards",
        "healthy",
    }
    aside |= {"requests_in_flight", "body_bytes_held", "queued_items", "waiting_callers", "encoder_processes", "dropped_units_total"}
    assert {metric.name for metric in METRICS} - shown - aside == set()


def test_the_dashboard_is_whole() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    taken = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken)), "two panels lie on each other"
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = {name for query in QUERIES for name in re.findall(r"\$(\w+)", query)} - {"__rate_interval"}
    assert used < variables


def test_every_rule_says_what_it_means() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names))
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
        named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        kept = {label for labels in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in re.split(r"\s*,\s*", labels)}
        assert named <= kept, rule["alert"]


def test_thresholds_of_the_rules_are_those_of_the_code() -> None:
    by_name = {rule["alert"]: rule["expr"] for rule in RULES}
    assert by_name["RaywardRewardDrift"].endswith(f"> {DRIFT_THRESHOLD:g}")
    assert by_name["RaywardRewardCollapse"].endswith(f"< {SPREAD_THRESHOLD:g}")
    assert by_name["RaywardRewardIsLength"].endswith(f"> {CORRELATION_THRESHOLD:g}")
    assert WINDOW_S == 600


def test_the_page_lists_every_metric_and_every_alert() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    generator = runpy.run_path(str(ROOT / "docs" / "generate_metrics.py"))
    assert page == generator["render"](page), "run: python docs/generate_metrics.py"
    assert {rule["alert"] for rule in RULES} == set(re.findall(r"`(Rayward[A-Z]\w+)`", page))
    names = set(re.findall(rf"{PREFIX}[a-z_]+[a-z]", page))
    assert {name for name in names if name.removeprefix(PREFIX) not in BY_NAME} == set()


def test_prometheus_itself_reads_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not here: apt-get install prometheus")
    done = subprocess.run([promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(RULES)} rules found" in done.stdout
