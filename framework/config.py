"""The configuration: dataclasses with the defaults, and the way from YAML and the command line to them.

A default lives once, on its dataclass. Hydra composes ``conf/`` and the overrides over :func:`schema`; :func:`to_typed`
turns the result into :class:`RunConfig`, and an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import OmegaConf

from framework.algorithms.catalog import AlgorithmConfig
from framework.algorithms.preference import DPO
from framework.environments.catalog import EnvironmentConfig
from framework.errors import ConfigError
from framework.lora.spec import LoraSpec
from framework.tracking import TrackingConfig
from framework.typed import build
from framework.types import AdamParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The frozen base model."""

    name_or_path: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A hub name or a folder with config.json, safetensors and a tokenizer."""
    dtype: str = "bfloat16"
    """Of weights, adapters and computation: bfloat16, float16 or float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareConfig:
    """What the ranks run on."""

    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the processes that torchrun started are divided."""

    tensor_parallel_size: int | None = None
    """Ranks that share one copy of the model; null takes all of them. The rest is data parallelism."""
    sequence_parallel: bool = True
    """Split norms and residuals over the sequence; has an effect with tensor parallelism."""
    timeout_s: float = 600.0
    """How long one collective, engine step or microbatch may take before every rank writes its stacks and exits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """The training side."""

    backend: str = "megatron"
    """megatron, or hf (transformers + PEFT, one process, the reference)."""
    max_tokens_per_microbatch: int = 2048
    """Token budget of one forward and backward."""
    recompute: str = "none"
    """What the backward pass computes again instead of keeping: none, mlp or full."""

    def __post_init__(self) -> None:
        if self.backend not in ("megatron", "hf"):
            raise ConfigError(f"trainer.backend={self.backend!r}: must be 'megatron' or 'hf'")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The sampling side."""

    backend: Literal["vllm", "trainer"] = "vllm"
    """vllm, or trainer: the trainer's own model, simple and slow; it has no KV cache of a set size, no prefix caching
    and no compilation, so the keys for these have no effect."""
    max_model_len: int = 2048
    """Prompt plus completion, in tokens."""
    max_num_seqs: int = 256
    """Requests worked on at once."""
    max_num_batched_tokens: int = 4096
    """Tokens of one engine step."""
    max_adapters: int = 2
    """Adapter versions the engine can hold at once."""
    kv_cache_gib: float | None = None
    """Size of the KV cache; null is 0.5 in the host's memory, and on an accelerator what the trainer leaves of it: its
    largest step is measured at the start."""
    gpu_memory_utilization: float | None = None
    """Share of an accelerator's memory for the engine, in place of what is measured; kv_cache_gib goes first."""
    memory_reserve_gib: float = 3.0
    """Of an accelerator's memory, not given to a measured KV cache: for the engine's graphs, fragments, libraries."""
    sleep: bool | None = None
    """Give the KV cache's memory to the trainer while it trains; null where a measured cache would else be smaller."""
    enforce_eager: bool | None = None
    """Quick start without compilation or graph capture; null captures graphs on an accelerator."""
    prefix_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-4
    schedule: str = "constant"
    """After warm-up: constant, linear (to 0) or cosine (to 0)."""
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Global norm the gradient is clipped to; 0 does not clip."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ConfigError(f"optimizer.schedule={self.schedule!r}: must be constant, linear or cosine")

    def at(self, step: int, num_steps: int) -> AdamParams:
        """The hyper-parameters of ``step``, counted from 1 to ``num_steps``."""
        import math

        warmup = min(1.0, step / (self.warmup_steps + 1)) if self.warmup_steps else 1.0
        progress = max(0.0, (step - 1 - self.warmup_steps) / max(1, num_steps - self.warmup_steps))
        decay = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.schedule]
        return AdamParams(
            learning_rate=self.learning_rate * warmup * decay,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How completions are drawn in training. Nucleus and top-k sampling are left out: the trainer could not
    recompute the logprobs of a truncated distribution."""

    max_tokens: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0.0:
            raise ConfigError(
                f"sampling.temperature={self.temperature}: must be above 0; evaluation is greedy by itself"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How much is sampled per step."""

    prompts_per_step: int = 8
    """Over all data-parallel replicas."""
    group_size: int = 8
    """Completions of the same prompt."""
    max_turns: int = 1
    timeout_s: float = 120.0
    """Limit of one environment call."""
    max_refills: int = 4
    """Rounds of dynamic sampling, for algorithms that use it."""
    max_lag: int = 0
    """Recipe grpo: how many versions old a sample may be when it is trained on. 0 is on-policy; with n a step's samples
    are trained on in n + 1 parts, one optimizer step each, so that those of the last part are n versions old."""

    def __post_init__(self) -> None:
        for key, least in (("prompts_per_step", 1), ("group_size", 1), ("max_turns", 1), ("max_lag", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"rollout.{key}={getattr(self, key)}: must be at least {least}")

    def check_replicas(self, num_replicas: int) -> None:
        """Refuses numbers that do not divide.

        Raises:
            ConfigError: prompts cannot be dealt out evenly to the replicas and the optimizer steps of a batch.
        """
        parts = num_replicas * (self.max_lag + 1)
        if self.prompts_per_step % parts or (self.max_lag and self.group_size <= self.max_lag):
            raise ConfigError(
                f"rollout.prompts_per_step={self.prompts_per_step}, rollout.max_lag={self.max_lag}: the prompts of a "
                f"step must be a multiple of {num_replicas} data-parallel replicas times {self.max_lag + 1} optimizer "
                f"steps, and rollout.group_size={self.group_size} above rollout.max_lag"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityConfig:
    """The gate on the difference between the trainer's logprobs and the engine's, of the same tokens.

    ``warn`` prints a warning, ``abort`` ends the run at that step. The quantities are in algorithms/mismatch.py.
    """

    warn_abs_diff_mean: float = 0.05
    abort_abs_diff_mean: float = 0.15
    warn_abs_diff_max: float = 2.0
    """Of one token; bf16 alone makes it 0.6."""
    abort_abs_diff_max: float = 10.0
    warn_gen_kl_error: float = 0.01
    abort_gen_kl_error: float = 0.05
    warn_token_mult_prob_error: float = 1.08
    """The factor by which probabilities are off; 1 when equal."""
    abort_token_mult_prob_error: float = 1.25
    probe: bool = True
    """Prove at the start that an adapter with a random B changes the engine's logprobs as it changes the trainer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on held-out problems: greedy inside training, as told here in the recipe evaluate."""

    every: int = 20
    """Steps between evaluations; there is always one before the first step and one after the last. 0: only these."""
    num_problems: int = 128
    """At most so many, the first of the held-out split."""
    num_samples: int = 1
    """Recipe evaluate: rollouts per problem. 1 is greedy; more are drawn at sampling.temperature and give pass@k."""
    adapter: str | None = None
    """Recipe evaluate: a PEFT folder to compare with the base model; null evaluates the base model alone."""
    environments: tuple[EnvironmentConfig, ...] = ()
    """Recipe evaluate: one table row each, e.g. ``[{name: gsm8k}, {name: arithmetic}]``; empty is ``environment``."""

    def __post_init__(self) -> None:
        for key in ("num_problems", "num_samples"):
            if getattr(self, key) < 1:
                raise ConfigError(f"evaluation.{key}={getattr(self, key)}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What a run writes to be continued."""

    every: int = 0
    """Steps between checkpoints; 0 writes one only when the run is asked to stop."""
    keep: int = 2
    """How many of the newest stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Demonstrations for supervised fine-tuning, or pairs for DPO."""

    name_or_path: str = "examples/data/largest.jsonl"
    """A JSONL or Parquet file, a folder of them, or a hub name. Rows have ``messages``, or ``prompt`` and
    ``completion``; for DPO ``prompt``, ``chosen`` and ``rejected``."""
    split: str = "train"
    batch_size: int = 32
    """Conversations, or pairs, per step, over all replicas."""
    max_tokens: int = 1024
    """Of one conversation."""
    too_long: Literal["error", "truncate"] = "error"
    heldout_rows: int = 64
    """The last rows of the data set; never trained on, they give eval/loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """On-policy distillation."""

    teacher: str | None = None
    """A PEFT folder of an adapter of the same base model, or another model, by folder or hub name, with the same
    tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything a run is determined by."""

    recipe: str = "grpo"
    seed: int = 0
    num_steps: int = 100
    run_dir: str | None = None
    """Folder of this run's metrics, checkpoints, adapter and summary; null is ``runs/<recipe>/<time>``."""
    resume: Literal["auto"] | None = None
    """null starts anew. auto continues from the newest checkpoint in run_dir, or, where run_dir is null, in the newest
    folder of ``runs/<recipe>`` that has one and no summary; without a checkpoint it starts anew."""
    init_adapter: str | None = None
    """A PEFT folder whose factors the run starts from, of the shape that ``lora`` says; null starts with fresh ones."""
    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    numerics: Literal["fast", "exact"] = "fast"
    """exact: the trainer's logprob of a sampled token is the engine's, bit for bit, and the ``parity`` gate allows no
    difference at all; on one Hopper GPU per model. Small products are then made by a kernel of ours."""
    lora: LoraSpec | None = field(default_factory=LoraSpec)
    """null, by ``lora=none`` on the command line, trains every weight of the base model instead of an adapter."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dpo: DPO = field(default_factory=DPO)
    distill: DistillConfig = field(default_factory=DistillConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.numerics == "exact" and dataclasses.replace(self.parity, probe=True) != ParityConfig():
            raise ConfigError(
                "numerics=exact allows no difference: leave the thresholds in the section parity out, or use "
                "numerics=fast"
            )
        if self.lora is None and self.init_adapter is not None:
            raise ConfigError(
                f"init_adapter={self.init_adapter}: lora=none trains the base model itself and starts from no adapter"
            )

    @property
    def parity_gate(self) -> ParityConfig:
        """What ``parity`` says, or with ``numerics=exact`` that there is no difference."""
        return self.parity if self.numerics == "fast" else EXACT_PARITY


EXACT_PARITY = ParityConfig(
    warn_abs_diff_mean=0.0,
    abort_abs_diff_mean=0.0,
    warn_abs_diff_max=0.0,
    abort_abs_diff_max=0.0,
    warn_gen_kl_error=0.0,
    abort_gen_kl_error=0.0,
    warn_token_mult_prob_error=1.0,
    abort_token_mult_prob_error=1.0,
)


def schema() -> dict[str, Any]:
    """Every key with its default, as plain containers: the bottom layer of Hydra's composition."""
    return plain(RunConfig())


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts and lists."""

    def convert(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple | list):
            return [convert(item) for item in value]
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        return value

    result: dict[str, Any] = convert(config)
    return result


def to_typed(composed: Any) -> RunConfig:
    """Hydra's result as a RunConfig.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named) or a value has the wrong type.
    """
    container = OmegaConf.to_container(composed, resolve=True) if OmegaConf.is_config(composed) else composed
    return build(RunConfig, container, "")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as ``{"a.b.c": value}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
