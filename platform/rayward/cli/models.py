"""Commands for models that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from rayward.cli.options import Device, TokensPerBatch, app, numbers, placed
from rayward.errors import ConfigError


@app.command()
def merge(
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    models: Annotated[list[str], typer.Argument(help="Two or more exported models of one architecture and contract.")],
    weights: Annotated[str | None, typer.Option(help="Comma-separated, sum 1 [default: equal].")] = None,
    expo: Annotated[float | None, typer.Option(help="Extrapolate: first + ALPHA (second - first), for example 1.52.")] = None,
) -> None:
    """Average or extrapolate the weights of exported models, shard by shard."""
    from rayward.workflows.merge import merge as run
    from rayward.workflows.merge import shares_of

    given = None if weights is None else numbers(weights, float, "--weights")
    run([Path(model) for model in models], shares_of(len(models), given, expo), output)
    typer.echo(f"model: {output}")


@app.command("import")
def import_model(
    source: Annotated[Path, typer.Argument(help="Checkpoint of a reward model with its tokenizer: directory or hub name.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    max_tokens: Annotated[int | None, typer.Option(help="Longest conversation [default: 4096, or the model's context].")] = None,
    outputs: Annotated[str | None, typer.Option(help="Names of the outputs, where there are several, with commas between.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights of the outputs in the reward, with commas between.")] = None,
    templated_text: Annotated[str, typer.Option(help="Text that was templated before: refuse, or as_rendered.")] = "refuse",
    unshown_text: Annotated[str, typer.Option(help="What the chat template leaves out or changes: refuse, or accept.")] = "refuse",
    device: Device = "auto",
    tokens_per_batch: TokensPerBatch = 8192,
) -> None:
    """Write a reward model of others as an export: contract, golden scores by its own forward, checked."""
    placement = placed(device=device, tokens_per_batch=tokens_per_batch)
    names = tuple(outputs.split(",")) if outputs else ()
    shares = numbers(weights, float, "--weights") if weights else ()
    from rayward.contract.contract import TemplatedText, UnshownText

    for option, given, known in (
        ("--templated-text", templated_text, get_args(TemplatedText)),
        ("--unshown-text", unshown_text, get_args(UnshownText)),
    ):
        if given not in known:
            raise ConfigError(f"{option} is {given!r}; the rule is {' or '.join(known)}", remedy="use one of these")
    from rayward.workflows.import_model import import_model as run

    contract = run(
        source, output, max_tokens=max_tokens, outputs=names, weights=shares, placement=placement,
        templated_text=cast(TemplatedText, templated_text), unshown_text=cast(UnshownText, unshown_text),
    )  # fmt: skip
    typer.echo(f"model: {output}\n{len(contract.golden)} golden scores of {source} agree")


@app.command("import-armo")
def import_armo(
    source: Annotated[Path, typer.Argument(help="Checkpoint with regression_layer, reward_transform_matrix and gating tensors.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    attributes: Annotated[str, typer.Option(help="Names of the objectives, with commas between.")],
    gate_ids: Annotated[str, typer.Option(help="Token ids of the assistant's header.")] = "128009,128006,78191,128007,271",
    max_tokens: Annotated[int, typer.Option(help="Longest conversation.")] = 4096,
) -> None:
    """Write a published mixture-of-objectives checkpoint as an export with a contract."""
    from rayward.workflows.import_armo import import_armo as run_import

    names, ids = tuple(attributes.split(",")), numbers(gate_ids, int, "--gate-ids")
    run_import(source, output, attributes=names, gate_ids=ids, max_tokens=max_tokens)
    typer.echo(f"model: {output}")
