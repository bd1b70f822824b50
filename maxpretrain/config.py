"""Run: the whole description of a run.

Frozen dataclasses of plain values. A config file is Python and defines `config: Run` (or `def config() -> Run`); the
command line overrides any field by its dotted name; the resolved Run is written as JSON beside the run and read back
strictly. Nothing here imports numpy or jax: `--help` must answer at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from maxpretrain.modelconfig import LatentConfig as LatentConfig
from maxpretrain.modelconfig import ModelConfig, require, validate_model
from maxpretrain.modelconfig import MoEConfig as MoEConfig
from maxpretrain.modelconfig import RelativeConfig as RelativeConfig
from maxpretrain.modelconfig import RopeConfig as RopeConfig
from maxpretrain.objectives.base import Objective
from maxpretrain.objectives.clm import CLM


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes ids."""

    kind: Literal["sentencepiece", "huggingface", "bytes", "characters"] = "sentencepiece"  # what makes the ids
    path: str = ""  # a .model or tokenizer.json to load; empty: trained on the training documents
    vocab_size: int = 4096  # of a tokenizer to train
    algorithm: Literal["unigram", "bpe"] = "unigram"  # of a sentencepiece model to train
    user_symbols: tuple[str, ...] = ()  # pieces never split, each with an id of its own
    control_symbols: tuple[
        str, ...
    ] = ()  # ids at the end of the vocabulary that no text has; the objective's own come by themselves
    sample_bytes: int = 20_000_000  # text that a tokenizer is trained on, at most


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from. A source is a path or glob of .txt/.md, .jsonl/.json, .parquet files (.gz and .zst too),
    `tfds:NAME[/CONFIG][:VERSION]`, or `embedded`: the English that every Python installation holds."""

    train: tuple[str, ...] = ("embedded",)  # sources of training documents
    weights: tuple[float, ...] = ()  # share of each source in the mixture; empty: by its number of tokens
    validation: tuple[str, ...] = ()  # sources of validation documents; empty: split off the training documents
    validation_fraction: float = 0.05  # of the documents (or of the text, with split "tail"), where none are given
    split: Literal["documents", "tail"] = "documents"  # by document (a hash of its id), or the last part of the text
    text_field: str = "text"  # of JSONL, Parquet and tfds records
    tfds_split: str = "train"  # of tensorflow-datasets sources
    separator: str = ""  # splits a plain text file into documents; empty: a file is a document
    shuffle: bool = True  # windows in an order drawn from the seed, another each epoch
    cache: str = "~/.cache/maxpretrain"  # prepared tokens, one folder per fingerprint (or $MAXPRETRAIN_CACHE)
    max_bad: float = 0.001  # share of unusable documents (invalid UTF-8, bad JSON, empty, …) above which preparing ends
    workers: int = 0  # processes that prepare; 0: one a core
    prefetch: int = 2  # batches made ahead of the device


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What one step consumes."""

    size: int = 32  # sequences per step, over all devices and microbatches
    length: int = 256  # tokens per sequence
    microbatches: int = 1  # the batch goes through the model in so many parts, with the same gradient


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a function of the step, as a factor of `optimizer.peak_lr`."""

    shape: Literal[
        "constant", "linear", "cosine", "inverse_sqrt", "exponential", "step", "polynomial", "wsd", "cosine_cycles"
    ] = "cosine"  # what follows the warmup; inverse_sqrt with a warmup is Noam's
    unit: Literal["steps", "tokens"] = "steps"  # what warmup, decay, boundaries and cycle are counted in
    warmup: int = 100  # linear rise to the peak
    warmup_from: float = 0.0  # factor where the warmup begins
    final: float = 0.1  # factor at the end of the decay
    decay: int | None = None  # length of the final decay of wsd; None: a fifth of the run
    decay_shape: Literal["linear", "sqrt"] = "linear"  # of wsd; sqrt: 1 − √(progress)
    power: float = 1.0  # of polynomial
    boundaries: tuple[int, ...] = ()  # of step: where the factor is multiplied by `rate`
    rate: float = 0.1  # of step and exponential (over the whole run for exponential)
    cycle: int | None = None  # length of one cosine cycle; None: a quarter of the run


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule."""

    name: Literal["adamw"] = "adamw"  # the update rule
    peak_lr: float = 1e-3  # learning rate at the top of the schedule
    schedule: ScheduleConfig = ScheduleConfig()
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled; not on biases, norms and position tables
    clip_norm: float | None = 1.0  # gradients scaled to this global norm at most; None: never
    clip_value: float | None = None  # gradients clipped to ± this, elementwise; None: never
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment


BalanceLoss = Literal[
    "none",
    "switch",
    "switch_mean",
    "importance",
    "importance_mean_square",
    "smooth_load",
    "importance_load",
    "sequence",
]


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the experts of a mixture evenly loaded; without experts it does nothing."""

    loss: BalanceLoss = (
        "switch_mean"  # added to the objective's; switch_mean is Switch's divided by top_k, 1 where all is even
    )
    weight: float = 0.01  # of that loss
    z_weight: float = 0.0  # of the mean squared logsumexp of the router's logits; 1e-3 is usual
    # batch: microbatches go forward through the network once more, so that the loss is of all (for sequence they are counted)
    over: Literal["batch", "microbatch"] = "batch"  # tokens whose statistics the loss is of
    bias_rate: float = 0.001  # step of the balance bias, where model.moe.balance_bias is on


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis has; at most one is -1 and takes what the others leave."""

    data: int = -1  # batch
    fsdp: int = 1  # batch and parameters (ZeRO-3)
    tensor: int = 1  # heads, MLP and vocabulary (Megatron)
    context: int = 1  # sequence
    expert: int = 1  # experts
    stage: int = 1  # layers (pipeline)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the step runs. `auto` is decided by the rule table in `hardware.py`, by accelerator; none of these changes what is
    learned, nor the checkpoint's layout."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; parameters stay float32
    remat: Literal["auto", "none", "dots", "full"] = "auto"  # what the backward pass computes again
    scan: Literal["auto", "on", "off"] = "auto"  # layers in one loop (compiles fast) or one after another
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # kernel
    loss_chunk: int = 0  # tokens whose logits exist at one time, per device; 0: chosen by vocabulary size
    cpu_devices: int = 0  # XLA devices that the CPU is split into; 0: chosen by the rule table


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured while training, always on the same validation windows."""

    every: int = 250  # steps between evaluations; 0: only at the end
    windows: int = 0  # at most so many, evenly spread over the validation text; 0: all of it
    prompts: tuple[str, ...] = ("The ",)  # continued, or their masks or sentinels filled, for the report
    sample_tokens: int = 64  # length of such a sample; 0: none
    temperature: float = 0.8  # of such a sample


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept."""

    every: int = 500  # steps between checkpoints; 0: only at the end
    keep: int = 2  # the last so many
    keep_best: bool = True  # and the one of lowest validation loss
    resume: Literal["auto", "must", "never"] = "auto"  # from the run directory's last checkpoint


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every: int = 10  # steps between lines
    tensorboard: bool = True  # event files in the run directory
    wandb: bool = False  # Weights & Biases (install maxpretrain[track])
    wandb_project: str = "maxpretrain"  # project of the above


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run. Every field can be set in a config file and overridden by its dotted name."""

    name: str = "run"  # the run directory is root/name
    root: str = "runs"  # where run directories are
    seed: int = 0  # of initialization, data order and dropout
    init_from: str = ""  # a run or Hugging Face directory to go on from, or a preset's name for its shape
    steps: int = 1000  # optimizer steps
    model: ModelConfig = ModelConfig()
    objective: Objective = field(default_factory=CLM)
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    balance: BalanceConfig = BalanceConfig()
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def tokens_per_step(self) -> int:
        return self.batch.size * self.batch.length

    def replace(self, **changes: object) -> Run:
        """A copy with other fields; dotted names as `optimizer__peak_lr` are not supported: replace the part."""
        return dataclasses.replace(self, **changes)


def _validate_schedule(schedule: ScheduleConfig, total: int) -> None:
    require(
        0 <= schedule.warmup <= total,
        f"optimizer.schedule.warmup is {schedule.warmup} {schedule.unit}, but the whole run has {total}; lengthen the run, or give "
        f"--optimizer.schedule.warmup {max(total // 10, 0)}",
    )
    require(
        schedule.final >= 0, f"optimizer.schedule.final is {schedule.final}; it is a factor of the peak, at least 0"
    )
    if schedule.decay is not None:
        require(
            0 < schedule.decay <= total - schedule.warmup,
            f"optimizer.schedule.decay is {schedule.decay}; after the warmup of {schedule.warmup} only {total - schedule.warmup} {schedule.unit} remain",
        )
    require(
        tuple(sorted(set(schedule.boundaries))) == schedule.boundaries,
        f"optimizer.schedule.boundaries {schedule.boundaries} must rise strictly",
    )
    if schedule.shape == "step":
        require(bool(schedule.boundaries), 'optimizer.schedule.shape "step" needs optimizer.schedule.boundaries')
    if schedule.shape == "exponential":
        require(schedule.rate > 0, f"optimizer.schedule.rate is {schedule.rate}; it must be above 0")
    if schedule.cycle is not None:
        require(schedule.cycle > 0, f"optimizer.schedule.cycle is {schedule.cycle}; it must be above 0")


def _validate_optimizer(opt: OptimizerConfig) -> None:
    for part, value in (
        ("optimizer.peak_lr", opt.peak_lr),
        ("optimizer.eps", opt.eps),
    ):
        require(value > 0, f"{part} is {value}; it must be above 0")
    for part in ("b1", "b2"):
        require(0 <= getattr(opt, part) < 1, f"optimizer.{part} is {getattr(opt, part)}; it must be in [0, 1)")
    for part in ("clip_norm", "clip_value"):
        value = getattr(opt, part)
        require(value is None or value > 0, f"optimizer.{part} is {value}; it must be above 0, or None for no clipping")
    require(opt.weight_decay >= 0, f"optimizer.weight_decay is {opt.weight_decay}; it must be at least 0")


def _validate_data(data: DataConfig) -> None:
    require(bool(data.train), "data.train names no source; give a path, or `embedded`")
    require(
        not data.weights or len(data.weights) == len(data.train),
        f"data.weights has {len(data.weights)} numbers for {len(data.train)} sources in data.train; give one each",
    )
    require(
        all(w > 0 for w in data.weights), f"data.weights {data.weights} must all be above 0; leave a source out instead"
    )
    if not data.validation:
        require(
            0 < data.validation_fraction < 1,
            f"data.validation_fraction is {data.validation_fraction}; it must be between 0 and 1, or name data.validation sources",
        )
    require(0 <= data.max_bad <= 1, f"data.max_bad is {data.max_bad}; it is a share of the documents, between 0 and 1")


def _validate_balance(balance: BalanceConfig, moe: MoEConfig, microbatches: int) -> None:
    require(
        balance.loss != "importance_mean_square" or balance.over == "batch" or microbatches == 1,
        'balance.loss "importance_mean_square" grows with the tokens of a microbatch, and batch.microbatches is '
        f'{microbatches}; use balance.over "batch", or loss "importance"',
    )
    if balance.loss not in ("smooth_load", "importance_load"):
        return
    require(
        moe.noisy,
        f'balance.loss "{balance.loss}" goes by the noise on the router\'s logits, and model.moe.noisy is off; turn it on, or '
        'use "importance"',
    )
    require(
        not (moe.balance_bias or moe.groups > 1),
        f'balance.loss "{balance.loss}" is of a choice by logits alone; turn model.moe.balance_bias off and set model.moe.groups to '
        '1, or use "importance"',
    )


def validate(run: Run, *, resolved: bool = False) -> None:
    """Checks what can be known without devices, data or jax.

    Args:
        resolved: the model is the run's own even where `init_from` names another, which is checked when it is read.

    Raises:
        UserError: one sentence that names the field, its value and what would do.
    """
    require(run.steps >= 1, f"steps is {run.steps}; it must be at least 1")
    require(0 <= run.seed < 2**32, f"seed is {run.seed}; it must be in [0, 2**32)")
    name_ok = run.name not in ("", ".", "..") and not any(c in run.name for c in "/\\\0")
    require(name_ok, f'name "{run.name}" is not a folder name; use letters, digits, "-" and "_"')
    batch = run.batch
    for part in ("size", "length", "microbatches"):
        require(getattr(batch, part) >= 1, f"batch.{part} is {getattr(batch, part)}; it must be at least 1")
    require(
        batch.size % batch.microbatches == 0,
        f"batch.size {batch.size} is not divisible by batch.microbatches {batch.microbatches}; use batch.size "
        f"{-(-batch.size // batch.microbatches) * batch.microbatches}",
    )
    own_model = resolved or not run.init_from
    if own_model:
        validate_model(run.model, batch.length)
    total = run.steps * (run.tokens_per_step if run.optimizer.schedule.unit == "tokens" else 1)
    _validate_schedule(run.optimizer.schedule, total)
    _validate_optimizer(run.optimizer)
    _validate_data(run.data)
    if run.model.moe.num_experts:
        _validate_balance(run.balance, run.model.moe, batch.microbatches)
    for part, value in (
        ("evaluation.every", run.evaluation.every),
        ("evaluation.windows", run.evaluation.windows),
        ("evaluation.sample_tokens", run.evaluation.sample_tokens),
        ("evaluation.temperature", run.evaluation.temperature),
        ("checkpoint.every", run.checkpoint.every),
        ("balance.weight", run.balance.weight),
        ("balance.z_weight", run.balance.z_weight),
        ("balance.bias_rate", run.balance.bias_rate),
        ("compute.loss_chunk", run.compute.loss_chunk),
        ("compute.cpu_devices", run.compute.cpu_devices),
        ("data.workers", run.data.workers),
    ):
        require(value >= 0, f"{part} is {value}; it must be at least 0")
    for part, value in (
        ("log.every", run.log.every),
        ("checkpoint.keep", run.checkpoint.keep),
        ("data.prefetch", run.data.prefetch),
    ):
        require(value >= 1, f"{part} is {value}; it must be at least 1")
    axes = dataclasses.asdict(run.mesh)
    require(
        all(n >= 1 or n == -1 for n in axes.values()) and list(axes.values()).count(-1) <= 1,
        f"mesh {axes} must hold numbers of at least 1, and -1 at most once",
    )
    if own_model:
        run.objective.validate(run)
