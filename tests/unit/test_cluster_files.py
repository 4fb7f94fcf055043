"""Cluster files and documentation pages are what their readers expect: Ray's schemas, our configuration, the code they describe."""

from __future__ import annotations

import copy
import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayward.config.data import DataConfig
from rayward.config.load import load_config, parse_config
from rayward.config.run import Config
from rayward.config.scoring import ScoringConfig
from rayward.data.formats.table import FORMATS, choose_format
from rayward.data.record import BadRow, Comparison, validate
from rayward.errors import STATUS_BY_CODE
from rayward.wire.native import ErrorReply, ScoreReply
from rayward.wire.rules import Limits, parse_request

ROOT = Path(__file__).resolve().parents[2]
CLUSTER, DOCS = ROOT / "cluster", ROOT / "docs"
LAUNCHER_FILES = ("aws.yaml", "local.yaml")
IMAGE_ROOT = "/home/ray/rayward/"
PAGES = sorted([*DOCS.glob("*.md"), CLUSTER / "README.md"])
KEYS: dict[str, dict[str, Any]] = {
    "critique": {"critique_lead_in": "Judge it."},
    "openrlhf": {"prompt_key": "question", "chosen_key": "good", "rejected_key": "bad"},
    "ultrafeedback": {"attributes": ["overall_score"], "rank_by": "overall_score"},
    "helpsteer2": {"attributes": ["helpfulness"]},
    "pointwise": {"attributes": ["label"]},
    "kto": {"attributes": ["label"]},
}
"""Settings that the example of a format is shown with."""


def read_yaml(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


# ---- ray up -----------------------------------------------------------------------------------------------------


def check_launcher_config(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_a_launcher_file_has_rays_schema(name: str) -> None:
    prepared = check_launcher_config(read_yaml(CLUSTER / name))
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_an_unknown_key_in_a_launcher_file_is_found(name: str) -> None:
    import jsonschema

    config = read_yaml(CLUSTER / name)
    config["idle_timeout_minute"] = 10
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        check_launcher_config(config)


def test_aws_workers_start_at_zero_and_the_limits_fit() -> None:
    config = read_yaml(CLUSTER / "aws.yaml")
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    assert set(workers) == {"gpu_worker", "data_worker"}
    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert config["max_workers"] >= max(kind["max_workers"] for kind in workers.values())
    images = {kind["node_config"]["ImageId"] for kind in config["available_node_types"].values()}
    assert len(images) == 1, "all machines need the same Python"


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_a_launcher_file_installs_the_projects_dependencies(name: str) -> None:
    commands = read_yaml(CLUSTER / name)["setup_commands"]
    installed = {word for command in commands if "pip install" in command for word in shlex.split(command)[3:]}
    assert set(project()["dependencies"]) | {"torch==2.13.0"} == installed


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_ray_start_names_its_authentication(name: str) -> None:
    config = read_yaml(CLUSTER / name)
    starts = [c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in config[key] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=disabled ~/rayward-env/bin/ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0], "without authentication the job API must not be reachable"


# ---- KubeRay ----------------------------------------------------------------------------------------------------


def ray_cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    cluster: dict[str, Any] = spec["rayClusterSpec" if document["kind"] == "RayJob" else "rayClusterConfig"]
    return cluster


@pytest.mark.parametrize(("name", "kind"), [("rayjob-train.yaml", "RayJob"), ("rayservice.yaml", "RayService")])
def test_a_kuberay_file_names_versions_and_images(name: str, kind: str) -> None:
    document = read_yaml(CLUSTER / "kuberay" / name)
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    cluster = ray_cluster(document)
    base = re.search(r"^FROM rayproject/ray:([\d.]+)-py311-gpu$", (CLUSTER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert base is not None
    assert cluster["rayVersion"] == base[1]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert images == {f"registry.example.com/rayward:{project()['version']}"}
    assert all(group["template"]["spec"]["restartPolicy"] == "Never" for group in groups)
    assert all(g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in cluster["workerGroupSpecs"])


def job_settings() -> tuple[Config, list[str]]:
    """The configuration that the RayJob's entrypoint resolves to, and its options."""
    words = shlex.split(read_yaml(CLUSTER / "kuberay" / "rayjob-train.yaml")["spec"]["entrypoint"])
    assert words[0] == "python"
    files = [ROOT / word.removeprefix(IMAGE_ROOT) for word in words[1:] if word.startswith(IMAGE_ROOT)]
    assert files[0] == ROOT / "jobs" / "train_rm.py"
    assert all(file.is_file() for file in files)
    options = [word for word in words if word.startswith("--")]
    return load_config(files[1:], [word for word in words if "=" in word]), options


def test_the_training_job_fits_its_pods() -> None:
    config, options = job_settings()
    cluster = ray_cluster(read_yaml(CLUSTER / "kuberay" / "rayjob-train.yaml"))
    group = next(g for g in cluster["workerGroupSpecs"] if g["groupName"] == "gpu")
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    _, workers = config.training.worker_range
    assert workers * config.training.gpus_per_worker <= limits["nvidia.com/gpu"] * group["maxReplicas"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    # The check before training sees the head alone.
    assert workers * config.training.cpus_per_worker + 1 <= int(head["resources"]["limits"]["cpu"])
    assert config.run.storage_path.startswith(head["volumeMounts"][0]["mountPath"])
    assert options == ["--no-evaluation"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Serve's own schema, when it is imported first here
def test_the_service_has_serves_schema_and_our_arguments() -> None:
    from ray.serve.schema import ServeDeploySchema

    document = read_yaml(CLUSTER / "kuberay" / "rayservice.yaml")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    (local,) = read_yaml(ROOT / "serve" / "reward_model.yaml")["applications"]
    assert application.import_path == local["import_path"]
    assert set(application.args) == set(local["args"])
    scoring = parse_config(dict(application.args), ScoringConfig)
    training, _ = job_settings()
    assert scoring.model == f"{training.run.storage_path}/{training.run.name}/export", "the service serves what the job exports"
    (group,) = ray_cluster(document)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert scoring.max_replicas * scoring.gpus_per_replica <= group["maxReplicas"] * limits["nvidia.com/gpu"]


def test_the_image_has_what_the_job_runs() -> None:
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    assert {"pyproject.toml", "platform", "jobs", "serve"} <= copied
    assert all((ROOT / name).exists() for name in copied)
    assert f"WORKDIR {IMAGE_ROOT.rstrip('/')}" in lines
    allowed = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    assert copied <= allowed


# ---- documentation ----------------------------------------------------------------------------------------------


def test_the_configuration_page_is_what_the_code_says() -> None:
    generator = runpy.run_path(str(DOCS / "generate_configuration.py"))
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert page == generator["render"](), "run: python docs/generate_configuration.py"
    names = [name for section in Config.model_fields.values() for name in section.default.__class__.model_fields]
    assert all(f"| `{name}` |" in page for name in [*names, *ScoringConfig.model_fields])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def json_blocks(page: str) -> list[tuple[str, Any]]:
    """Title of the section and content of each JSON example of a page."""
    found = []
    title = ""
    for part in re.split(r"^(#+ .*)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
        title = part.lstrip("# ") if part.startswith("#") else title
        found += [(title, json.loads(text)) for text in re.findall(r"```json\n(.*?)```", part, re.DOTALL)]
    return found


def test_every_format_has_an_example_that_it_reads() -> None:
    examples = dict(json_blocks("data.md"))
    assert set(examples) == set(FORMATS)
    for name, row in examples.items():
        config = parse_config(KEYS.get(name, {}), DataConfig)
        chosen, options = choose_format([row], config, where=name, source=name)
        assert chosen == name
        comparison: Comparison = FORMATS[name].adapt(row, options)
        validate(comparison, ties="quarantine")
        if name in ("helpsteer2", "pointwise", "critique", "kto"):
            assert (comparison.completions, comparison.ranks) == (("Seven.",), None)
            assert (comparison.critiques is not None) == (name == "critique")
            continue
        if name in ("stepwise", "prm800k"):
            assert (comparison.completions, comparison.step_labels) == (("Nine is 3 times 3.\n\nSo it is 11.",), ((1.0, 1.0),))
            continue
        assert comparison.ranks is not None
        assert comparison.completions[comparison.ranks.index(min(comparison.ranks))] == "Seven."


def test_every_quarantine_reason_has_a_remedy() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", (DOCS / "data.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [reason.value for reason in BadRow]


def test_the_wire_examples_are_valid() -> None:
    (_, request), (_, reply), (_, error) = json_blocks("serving.md")
    items, _ = parse_request(json.dumps(request).encode(), Limits())
    results = ScoreReply.model_validate_json(json.dumps(reply)).results
    assert len(items) == len(results)
    assert len(items[0].completions) == len(results[0].rewards or [])
    ErrorReply.model_validate_json(json.dumps(error))


def test_every_code_of_the_wire_is_listed_with_its_status() -> None:
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    package = ROOT / "platform" / "rayward"
    files = [package / "wire" / "rules.py", package / "wire" / "endpoints.py", *(package / "serving").glob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    conversation = (ROOT / "platform" / "rayward" / "contract" / "conversation.py").read_text(encoding="utf-8")
    codes = {*re.findall(r"RuleError\(\s*\"(\w+)\"", source), *re.findall(r"BrokenRule\(\"(\w+)\"", conversation), *STATUS_BY_CODE}
    codes |= {*re.findall(r"\"(\w+_field|wrong_type)\"", source)}
    assert len(codes) > 15
    rows = re.findall(r"^\| ([\d, ]+) \| (.+?) \| ", page, re.MULTILINE)
    listed = {code: statuses for statuses, text in rows for code in re.findall(r"`(\w+)`", text)}
    wrong = {code: listed.get(code) for code in codes if str(STATUS_BY_CODE.get(code, 422)) not in listed.get(code, "")}
    assert wrong == {}
