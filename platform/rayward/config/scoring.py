"""The configuration of a Serve application and of its scorers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rayward.config.placement import Device, HashWeights, Placement
from rayward.schema import Frozen
from rayward.wire.rules import Limits


class ReplicaConfig(Frozen):
    """How the replicas of one version of a model run; kept with the version in the table of routes."""

    device: Device = "auto"
    """Where a replica computes; `auto` takes CUDA when a replica reserves a GPU."""
    tokens_per_batch: int = Field(8192, ge=64)
    """Token budget of one forward over whatever waits."""
    batch_invariant: bool = False
    """Bitwise the same reward whatever is scored beside it; slower (docs/serving.md has the price)."""
    min_replicas: int = Field(1, ge=0)
    """Replicas that always run; 0 stops them all when nothing is asked."""
    max_replicas: int = Field(1, ge=1)
    """Replicas at most; more than min_replicas scales with the backlog."""
    target_queue_s: float = Field(1.0, gt=0.0)
    """How long a token should wait: autoscaling aims at a backlog of so many seconds of a replica's work."""
    max_queue_s: float = Field(30.0, gt=0.0)
    """A replica whose backlog would be more seconds of its work than this refuses with 429."""
    max_queued_tokens: int = Field(4_000_000, ge=1024)
    """The same bound in tokens, for as long as a replica's speed is not known, and at most."""
    upscale_delay_s: float = Field(5.0, ge=0.0)
    """How long the backlog is too long before replicas are added."""
    downscale_delay_s: float = Field(300.0, ge=0.0)
    """How long fewer replicas would do before some are removed."""
    max_ongoing_requests: int = Field(1024, ge=1)
    """Requests one replica holds, waiting ones included; the bound that is meant to hold is the one in tokens."""
    drain_s: float = Field(120.0, gt=0.0)
    """How long a replica that is removed may finish what it holds."""
    encoder_processes: int = Field(1, ge=1)
    """Processes beside the compute thread that render and tokenize."""
    encoding_timeout_s: float = Field(10.0, gt=0.0)
    """Longest rendering and tokenizing of one item; then its process is ended and the item fails alone."""
    cpus_per_replica: float = Field(1.0, gt=0.0)
    """Logical CPUs that Ray reserves for a replica."""
    gpus_per_replica: float = Field(0.0, ge=0.0)
    """GPUs that Ray reserves for a replica."""
    threads_per_replica: int = Field(1, ge=1)
    """Compute threads of a replica on CPU."""
    verify_golden: bool = True
    """Check files, head and golden scores against the contract at start and refuse to serve when they differ."""
    hash_weights: HashWeights = "full"
    """What the version of a model without contract covers of its weights: every byte, or sizes, headers and a piece of every tensor."""

    @model_validator(mode="after")
    def _replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}; the rule is min <= max")
        return self

    @property
    def placement(self) -> Placement:
        """Where each replica scores; the replicas are Serve's."""
        return Placement(
            device=self.device,
            gpus_per_actor=self.gpus_per_replica,
            tokens_per_batch=self.tokens_per_batch,
            verify=self.verify_golden,
            hash_weights=self.hash_weights,
            batch_invariant=self.batch_invariant,
        )


class ScoringConfig(ReplicaConfig):
    """Configuration of one Serve application; the `args:` block of `serve/*.yaml`.

    What it says of replicas holds for the models that it names; a version that is published later brings its own, or takes these.
    """

    model: str | None = None
    """Directory, URI (`s3://…`) or hub name of an exported model, or of any Hugging Face sequence-classification reward model."""
    model_name: str | None = None
    """Name of `model` in requests and replies; default: the last part of `model`."""
    models: dict[str, str] = Field(default_factory=dict)
    """Further models: name -> directory, URI or hub name."""
    default_model: str | None = None
    """Who answers a request that names no model; default: the first one."""
    state: str | None = None
    """Directory or URI where the table of routes is kept; default: one per application under `~/.rayward/serving`, for one machine only."""
    ingress_replicas: int = Field(1, ge=1)
    """Processes that speak HTTP."""
    max_requests: int = Field(4096, ge=1)
    """Requests that one ingress holds; more are refused with 429."""
    default_deadline_s: float = Field(300.0, gt=0.0)
    """For requests that say none."""
    max_deadline_s: float = Field(3600.0, gt=0.0)
    """No request may ask for a longer one."""
    body_timeout_s: float = Field(30.0, gt=0.0)
    """A body must have come in by then."""
    keys_file: str | None = None
    """JSON lines `{"name", "key" or "sha256", "scopes": ["score", "admin"], …}`, read again when it changes; else RAYWARD_API_KEYS."""
    allow_anonymous: bool = False
    """Let anybody who reaches a non-loopback address score; publishing always needs a key with scope admin."""
    requests_per_s: float | None = Field(None, gt=0.0)
    """What one caller may send, where its key does not say; more is refused with 429. None: as much as there is room for."""
    tokens_per_s: float | None = Field(None, gt=0.0)
    """The same in tokens."""
    max_concurrent: int | None = Field(None, ge=1)
    """Requests that one caller may have in flight, where its key does not say."""
    flat_text: Literal["as_given", "refuse"] = "as_given"
    """A text of a flat dialect that went through no template: tokenized as it stands, and the reply says so; or an error."""
    trace_share: float = Field(0.0, ge=0.0, le=1.0)
    """Share of requests whose spans go to the OpenTelemetry collector that OTEL_EXPORTER_OTLP_ENDPOINT names."""
    log_texts: bool = False
    """Let errors in the log quote what users sent."""
    page: bool = True
    """Serve the page at `/`."""
    max_items_per_request: int = Field(1024, ge=1)
    """More items are refused with 413."""
    max_completions_per_item: int = Field(256, ge=1)
    """More completions of one item are refused with 413."""
    max_chars_per_text: int = Field(200_000, ge=1)
    """A longer prompt turn or completion is refused with 413, before it is tokenized."""
    max_critiques: int = Field(16, ge=1)
    """More `n_critiques` than these are refused with 422."""
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024)
    """A larger request body, also after inflation, is refused with 413, before it is parsed."""

    @property
    def replica(self) -> ReplicaConfig:
        """What a scorer needs of it."""
        return ReplicaConfig(**{name: getattr(self, name) for name in ReplicaConfig.model_fields})

    @property
    def limits(self) -> Limits:
        """What one request may hold."""
        return Limits(
            max_items=self.max_items_per_request,
            max_completions_per_item=self.max_completions_per_item,
            max_chars_per_text=self.max_chars_per_text,
            max_body_bytes=self.max_body_bytes,
            max_critiques=self.max_critiques,
        )
