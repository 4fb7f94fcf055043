"""Commands that serve, and that change what is served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rayward.cli.options import app
from rayward.errors import ConfigError

models_app = typer.Typer(no_args_is_help=True, help="Change what a running service serves: versions, their shares, their end.")
app.add_typer(models_app, name="models")

Url = Annotated[str, typer.Option(help="Base URL of the service.")]
KeyFile = Annotated[Path | None, typer.Option(help="File with a key of scope admin [default: RAYWARD_API_KEY].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's reply as it is.")]
Name = Annotated[str, typer.Argument(help="Name of the model in requests.")]
Version = Annotated[str, typer.Argument(help="Version, as `rayward models list` shows it.")]
LOCAL_URL = "http://127.0.0.1:8000"


@app.command()
def serve(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [NAME=MODEL]... [FILE.yaml]... [KEY=VALUE]...")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one [default: 8000].")] = None,
    name: Annotated[str, typer.Option(help="Of the application.")] = "rayward",
    route_prefix: Annotated[str, typer.Option(help="Path that it is mounted at.")] = "/",
    replace: Annotated[bool, typer.Option("--replace", help="Give an application of this name that runs already these settings.")] = False,
) -> None:
    """Serve models over HTTP until interrupted; a MODEL is a directory, a URI or a hub name."""
    from rayward.config.load import load_config
    from rayward.config.scoring import ScoringConfig

    files, overrides = serving_settings(settings or [], set(ScoringConfig.model_fields))
    resolved = load_config(files, overrides, schema=ScoringConfig)
    from rayward.workflows.serve import serve_until_interrupted

    serve_until_interrupted(resolved, host=host, port=port, name=name, route_prefix=route_prefix, replace=replace)


def serving_settings(given: Sequence[str], keys: set[str]) -> tuple[list[str], list[str]]:
    """Files and overrides among the arguments of `rayward serve`; models become overrides of `model` and `models`.

    Args:
        keys: of the configuration; `NAME=MODEL` with another name is a model.

    Raises:
        ConfigError: neither a key nor a model.
    """
    files = [each for each in given if each.endswith((".yaml", ".yml")) and "=" not in each]
    overrides, plain = [], [each for each in given if "=" not in each and each not in files]
    for each in given:
        key, separator, value = each.partition("=")
        # A URI may have options behind its question mark.
        if separator and ("://" in key or Path(each).is_dir()):
            plain.append(each)
        elif separator and key.split(".")[0] in keys:
            overrides.append(each)
        elif separator and (Path(value).expanduser().is_dir() or "/" in value):
            overrides.append(f"models={json.dumps({key: value})}")
        elif separator:
            raise ConfigError(
                f"{each}: there is no key {key!r}, and {value!r} is no directory, URI or hub name of a model",
                remedy=f"NAME=MODEL names a model; the keys are: {', '.join(sorted(keys))}",
            )
    if plain:
        overrides.insert(0, f"model={json.dumps(plain[0])}")
    for each in plain[1:]:
        overrides.append(f"models={json.dumps({Path(each.partition('?')[0].rstrip('/')).name: each})}")
    return files, overrides


@models_app.command("list")
def list_models(url: Url = LOCAL_URL, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Models, versions, what each does, and what became of those that failed."""
    _administer(url, key_file, "list", {}, as_json)


@models_app.command()
def publish(
    name: Name,
    source: Annotated[str, typer.Argument(help="Directory, URI or hub name, as the cluster sees it.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of its replicas.")] = None,
    url: Url = LOCAL_URL,
    key_file: KeyFile = None,
    promote: Annotated[bool, typer.Option("--promote", help="Let it answer as soon as it is verified.")] = False,
    wait: Annotated[bool, typer.Option(help="Until it is verified, or has failed.")] = True,
    as_json: AsJson = False,
) -> None:
    """Load a version beside those that run, and verify it."""
    from rayward.config.load import merged_settings
    from rayward.workflows.publish import Service, publish_model

    service = Service(url, key_file)
    listing = publish_model(service, name, source, config=merged_settings((), settings or ()), promote=promote, wait=wait)
    _show(listing, as_json)


@models_app.command()
def shadow(
    name: Name,
    version: Annotated[str | None, typer.Argument(help="Version; none ends it.")] = None,
    url: Url = LOCAL_URL,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Let a version score what the current one scores, and compare; `rayward models list` shows the difference."""
    _administer(url, key_file, "shadow", {"model": name, "version": version}, as_json)


@models_app.command()
def canary(
    name: Name,
    version: Version,
    share: Annotated[float, typer.Argument(help="Of the requests that pin no version; 0 ends it.")],
    url: Url = LOCAL_URL,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Let a version answer a share of the requests."""
    _administer(url, key_file, "canary", {"model": name, "version": version, "share": share}, as_json)


@models_app.command()
def promote(name: Name, version: Version, url: Url = LOCAL_URL, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Let a version answer; the one before is kept for a rollback."""
    _administer(url, key_file, "promote", {"model": name, "version": version}, as_json)


@models_app.command()
def rollback(name: Name, url: Url = LOCAL_URL, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Let the version before answer again."""
    _administer(url, key_file, "rollback", {"model": name}, as_json)


@models_app.command()
def retire(
    name: Name,
    version: Annotated[str | None, typer.Argument(help="Version; none takes the whole model away.")] = None,
    url: Url = LOCAL_URL,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Take a version down after what it holds."""
    _administer(url, key_file, "retire", {"model": name, "version": version}, as_json)


def _administer(url: str, key_file: Path | None, verb: str, body: dict[str, Any], as_json: bool) -> None:
    from rayward.workflows.publish import Service

    _show(Service(url, key_file).ask(verb, body), as_json)


def _show(listing: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(listing, indent=2))
        return
    from rayward.workflows.publish import lines_of

    for line in lines_of(listing):
        typer.echo(line)
