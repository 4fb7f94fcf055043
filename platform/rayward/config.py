"""Typed configuration: YAML files plus dotted overrides, resolved once, before anything heavy is imported.

Unknown keys, wrong types and contradictions raise `ConfigError` naming key, value, rule and remedy. Every field is
documented by the string under it; units and scope are in the names. No torch, Ray or DeepSpeed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from rayward.errors import ConfigError
from rayward.objectives import OBJECTIVES, BradleyTerryObjective
from rayward.overrides import merged_settings
from rayward.section import ObjectiveSection, Section

SourceFormat = Literal[
    "auto",
    "trl",
    "openrlhf",
    "hh_rlhf",
    "ultrafeedback_binarized",
    "helpsteer2_preference",
    "helpsteer3_preference",
    "ranking",
    "nectar",
    "ultrafeedback",
    "helpsteer2",
    "safe_rlhf",
    "scored",
    "pointwise",
    "stepwise",
    "critique",
]


class RunConfig(Section):
    name: str = Field("rayward", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """A new driver with the same name and storage path continues the run."""
    storage_path: str = "runs"
    """Directory or pyarrow filesystem URI (s3://…, gs://…) for prepared data, checkpoints, logs and exports."""
    seed: int = Field(0, ge=0)
    """Seeds weight initialisation, the data order and the split."""


class DataConfig(Section):
    train: tuple[str, ...] = ()
    """Files, globs, directories, URIs, or Hugging Face data sets as `hf:owner/name[/config][@split]`."""
    validation: tuple[str, ...] = ()
    """Like `train`; when empty, `validation_fraction` of the prompts is held out."""
    format: SourceFormat = "auto"
    """Format of every source; `auto` detects it from the columns."""
    prompt_key: str | None = None
    """OpenRLHF-style column name of the prompt (None: implicit in chosen and rejected)."""
    chosen_key: str = "chosen"
    """Column name of the better completion, for formats `trl` and `openrlhf`."""
    rejected_key: str = "rejected"
    """Column name of the worse completion."""
    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of prompts (not rows) held out when `validation` is empty."""
    ties: Literal["quarantine", "keep"] = "quarantine"
    """What to do with completions ranked equal: quarantine, or train them towards probability one half."""
    too_long: Literal["truncate", "quarantine"] = "truncate"
    """`truncate` drops the oldest turns of the prompt and keeps the whole completion; rows that still do not fit
    are quarantined either way."""
    attributes: tuple[str, ...] = ()
    """Ratings to keep, by name and in this order (`objective: regression` learns them); a row may lack some of them."""
    attribute_range: tuple[float, float] | None = None
    """Smallest and largest rating; a row with another one is quarantined. None: any finite number."""
    rank_by: str | None = None
    """Attribute that ranks the completions of rows without a ranking (a higher rating is better); None: they stay unranked."""
    preference: Literal["better", "safer"] = "better"
    """Which judgement of format `safe_rlhf` orders the completions."""
    merge_prompts: bool = False
    """Unranked rows of one prompt (single rated completions) become one comparison with all their completions."""
    step_separator: str | None = Field(None, min_length=1)
    """Text between two steps of a completion, for process rewards; goes into their scoring contract. None: an empty line in format
    `stepwise`; elsewhere labels of steps are ignored."""
    critique_lead_in: str | None = Field(None, min_length=1)
    """Every completion is followed by a user turn of this text and its critique, and judged at the end of it; goes into the scoring
    contract. None: critiques in the data are ignored."""
    group_pairs: bool = False
    """Ranked rows of one prompt become one comparison of K completions where their judgements determine one order of all of them."""
    group_tokens: int | None = Field(None, ge=8)
    """Largest such comparison in tokens, the prompt once; a larger one stays as its rows. None: twice `model.max_tokens`, like a pair."""
    max_bad_fraction: float = Field(0.05, ge=0.0, le=1.0)
    """More quarantined rows than this share stop the run before training (duplicates, ties and
    training rows whose prompt stands in the validation data are not counted)."""
    rows_per_shard: int = Field(10_000, ge=1)
    """Rows in one Parquet shard of the prepared data."""

    @model_validator(mode="after")
    def _ratings(self) -> Self:
        if len(set(self.attributes)) != len(self.attributes):
            raise ValueError(f"data.attributes is {list(self.attributes)}; the rule is that each name stands once; remove the repetition")
        if self.attribute_range is not None and not self.attribute_range[0] < self.attribute_range[1]:
            raise ValueError(f"data.attribute_range is {list(self.attribute_range)}; the rule is smallest < largest; correct it")
        if self.rank_by is not None and self.rank_by not in self.attributes:
            raise ValueError(
                f"data.rank_by is {self.rank_by!r} and data.attributes is {list(self.attributes)}; the rule is one of them; add it there"
            )
        if self.group_tokens is not None and not self.group_pairs:
            raise ValueError("data.group_tokens is set and data.group_pairs is false; nothing is grouped; set it, or remove the first")
        return self


class ModelConfig(Section):
    path: str | None = None
    """Local directory or hub name of a pretrained model; its weights initialise the backbone."""
    revision: str | None = None
    """Hub revision of `path`."""
    architecture: dict[str, Any] | None = None
    """A Transformers config as a mapping (with `model_type`) to start from random weights instead of `path`."""
    tokenizer: str | None = None
    """Local directory or hub name; default: `path`."""
    max_tokens: int = Field(2048, ge=8)
    """Longest conversation in tokens, prompt and completion together; part of the scoring contract."""
    head: Literal["auto", "fresh"] = "auto"
    """`auto` takes the reward head of `path` (its outputs must be the run's) and starts one where there is none; `fresh` starts anew."""
    head_output: str | None = None
    """Start the one output of the run from this output of an exported `path` (arXiv 2410.01257: Bradley-Terry from regression)."""
    template_kwargs: dict[str, str] = Field(default_factory=dict)
    """Extra variables for the chat template, frozen into the contract."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path and self.architecture:
            raise ValueError("model.path and model.architecture are both set; the rule is one of them; remove the one you do not mean")
        if self.architecture is not None:
            if "model_type" not in self.architecture:
                raise ValueError("model.architecture has no model_type; add for example model_type: llama")
            if self.tokenizer is None:
                raise ValueError("model.architecture needs model.tokenizer; set a directory or a hub name")
        if self.head_output is not None and (self.path is None or self.head == "fresh"):
            raise ValueError(
                f"model.head_output is {self.head_output!r} without model.path, or with model.head=fresh; it names an output of "
                "model.path; set the path, or remove it"
            )
        return self

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer comes from."""
        name = self.tokenizer or self.path
        if name is None:
            raise ConfigError(
                "model.path, model.architecture and model.tokenizer are all unset; a model is needed",
                remedy="set model.path to a directory or a hub name",
            )
        return name


def _objective(value: Any) -> Any:
    # The block's own schema is the table's row of its type: a new method needs no change here.
    if not isinstance(value, Mapping):
        return value
    name = value.get("type", DEFAULT_OBJECTIVE.type)
    if name not in OBJECTIVES:
        raise ValueError(f"objective.type is {name!r}; the rule is one of {', '.join(OBJECTIVES)}; correct it")
    return OBJECTIVES[name].settings.model_validate(value)


DEFAULT_OBJECTIVE = BradleyTerryObjective()


ObjectiveConfig = Annotated[SerializeAsAny[ObjectiveSection], BeforeValidator(_objective)]
"""The settings of the method that `type` names; fields and methods in `rayward.objectives`."""


class TrainingConfig(Section):
    num_workers: int | tuple[int, int] = 1
    """Train workers: a number, or [min, max] for elastic training."""
    comparisons_per_step: int = Field(64, ge=1)
    """Comparisons in one optimizer step, over all workers."""
    tokens_per_microbatch: int = Field(4096, ge=8)
    """Token budget of one forward and backward on one worker; shared prefixes count once."""
    num_epochs: int = Field(1, ge=1)
    """More than one over-fits reward models (arXiv 2203.02155, 2307.09288): a warning is printed."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimizer steps; the schedule ends there too."""
    learning_rate: float = Field(1e-5, gt=0.0)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(0.03, ge=0.0, le=1.0)
    """Share of the steps with linear warm-up."""
    min_lr_fraction: float = Field(0.1, ge=0.0, le=1.0)
    """The cosine ends at this share of `learning_rate`."""
    weight_decay: float = Field(0.1, ge=0.0)
    """For matrices only; biases, norms and embeddings' one-dimensional parameters do not decay."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """AdamW decay of the first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """AdamW decay of the second moment."""
    epsilon: float = Field(1e-8, gt=0.0)
    """AdamW term added to the root of the second moment."""
    clip_norm: float = Field(1.0, gt=0.0)
    """Global gradient norm is clipped to this."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass (non-reentrant)."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is the plain single-worker engine, for comparison and tests."""
    log_every_steps: int = Field(1, ge=1)
    """Steps between two metric lines."""
    evaluate_every_steps: int | None = Field(None, ge=1)
    """Steps between two validations; None: only at the end."""
    max_failures: int = Field(3, ge=-1)
    """Worker-group failures tolerated before the run is given up; -1: any number."""
    cpus_per_worker: float = Field(0.5, gt=0.0)
    """Logical CPUs that Ray reserves for a worker (not threads); at least one must be left for the data stream."""
    gpus_per_worker: float = Field(0.0, ge=0.0)
    """0 trains on CPU in fp32; 1 or more trains on CUDA in bf16."""
    threads_per_worker: int = Field(1, ge=1)
    """OMP_NUM_THREADS of every worker."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        low, high = self.worker_range
        if low < 1 or high < low:
            raise ValueError(f"training.num_workers is {self.num_workers}; the rule is 1 <= min <= max; correct the range")
        if self.engine == "torch" and high > 1:
            raise ValueError(f"training.engine is torch with {high} workers; the plain engine runs on one; use engine: deepspeed")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers


class CheckpointConfig(Section):
    every_steps: int = Field(100, ge=1)
    """Optimizer steps between two committed checkpoints; the last step is always committed."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept; the one with the best validation accuracy is kept besides."""


class TrackingConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard events beside the JSON lines."""


class Config(Section):
    """The whole configuration of `prepare`, `train` and `export`."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = BradleyTerryObjective()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the head's outputs."""
        return self.objective.outputs(self.data.attributes)

    @property
    def group_tokens(self) -> int | None:
        """Largest comparison in tokens that `data.group_pairs` makes; None: it makes none."""
        # Never a matter of the micro-batches: the data of a run must not change with their budget.
        return (self.data.group_tokens or 2 * self.model.max_tokens) if self.data.group_pairs else None

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        if not self.outputs:
            raise ValueError("objective.type is regression and data.attributes is empty; name the ratings to learn in data.attributes")
        self.objective.reward_weights(self.outputs)
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        limit, budget = self.model.max_tokens, self.training.tokens_per_microbatch
        if budget < limit:
            raise ValueError(
                f"training.tokens_per_microbatch is {budget}, less than model.max_tokens {limit}; one conversation must fit a "
                "micro-batch; raise the first or lower the second"
            )
        return self


class ScoringConfig(Section):
    """Configuration of one Serve application; the `args:` block of `serve/*.yaml`."""

    model: str = "model"
    """Directory of an exported model (or of any Hugging Face sequence-classification reward model)."""
    model_name: str | None = None
    """Name in replies; default: the last part of `model`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a replica computes; `auto` takes CUDA when there is one."""
    tokens_per_batch: int = Field(8192, ge=64)
    """Token budget of one forward pass over the requests that wait."""
    batch_wait_s: float = Field(0.005, ge=0.0)
    """How long a batch waits for company."""
    max_ongoing_requests: int = Field(256, ge=1)
    """Requests one replica works on; Serve's default of 5 would cap batching at 5."""
    max_queued_requests: int = Field(2048, ge=1)
    """Requests that may wait; more are refused with 503."""
    min_replicas: int = Field(1, ge=0)
    """Replicas that always run."""
    max_replicas: int = Field(1, ge=1)
    """Replicas at most; more than min_replicas scales with the load."""
    target_ongoing_requests: float = Field(32.0, gt=0.0)
    """Requests per replica that autoscaling aims at."""
    cpus_per_replica: float = Field(1.0, gt=0.0)
    """Logical CPUs that Ray reserves for a replica."""
    gpus_per_replica: float = Field(0.0, ge=0.0)
    """GPUs that Ray reserves for a replica."""
    threads_per_replica: int = Field(1, ge=1)
    """Compute threads of a replica on CPU."""
    max_items_per_request: int = Field(1024, ge=1)
    """More items are refused with 413."""
    max_completions_per_item: int = Field(256, ge=1)
    """More completions of one item are refused with 413."""
    max_chars_per_text: int = Field(200_000, ge=1)
    """A longer prompt turn or completion is refused with 413, before it is tokenized."""
    max_critiques: int = Field(16, ge=1)
    """More `n_critiques` than these are refused with 422."""
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024)
    """A larger request body is refused with 413, before it is parsed."""
    verify_golden: bool = True
    """Check files, head and golden scores against the contract at start and refuse to serve when they differ."""

    @model_validator(mode="after")
    def _replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}; the rule is min <= max")
        return self


T = TypeVar("T", bound=BaseModel)


def load_config(
    paths: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    *,
    schema: type[T] = Config,  # type: ignore[assignment]
) -> T:
    """Read YAML files left to right, apply `section.key=value` overrides, validate.

    Args:
        paths: YAML files; later files win, mappings merge key by key.
        overrides: dotted assignments; values are parsed as YAML.
        schema: the model to validate against.

    Raises:
        ConfigError: a file cannot be read, or a key, type or combination is wrong.
    """
    return parse_config(merged_settings(paths, overrides), schema)


def parse_config(values: dict[str, Any], schema: type[T]) -> T:
    """Validate a mapping.

    Raises:
        ConfigError: naming every key that is wrong, its value and the rule.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, schema, values), remedy="correct the keys above; `rayward config` prints all of them") from exc


def dump_config(config: BaseModel) -> str:
    """The fully resolved configuration as JSON (JSON keeps nulls), for run directories and exports."""
    return json.dumps(config.model_dump(mode="json"), indent=2)


def _explain(exc: ValidationError, schema: type[BaseModel], values: Mapping[str, Any]) -> str:
    lines = []
    for error in exc.errors():
        key = ".".join(str(part) for part in error["loc"] if part != "function-after")
        if error["type"] == "extra_forbidden":
            known = _keys_beside(schema, error["loc"], values)
            lines.append(f"{key} = {error['input']!r}: unknown key; known here: {', '.join(known)}")
        elif error["type"] == "value_error":
            lines.append(str(error["ctx"]["error"]))
        else:
            lines.append(f"{key} = {error['input']!r}: {error['msg']}")
    return "the configuration is not valid\n  " + "\n  ".join(lines)


def _keys_beside(schema: type[BaseModel], loc: tuple[int | str, ...], values: Mapping[str, Any]) -> list[str]:
    node: Any = schema
    for part in loc[:-1]:
        field = getattr(node, "model_fields", {}).get(part)
        if field is None:
            continue
        node = field.annotation
        if node is ObjectiveSection:
            node = OBJECTIVES[values[str(part)].get("type", DEFAULT_OBJECTIVE.type)].settings
    return sorted(getattr(node, "model_fields", {}))
