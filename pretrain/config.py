"""What a run is: one JSON file, one section for each part that reads it.

Every section is a pydantic model with ``extra="forbid"``; defaults here are the documentation of the defaults.
Checks that need no process group are made here, so that a mistake ends with status 78 before anything starts; the
ones that need the number of ranks are in :func:`check_topology`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from launch.settings import BadInputError, SettingError
from model.config import IceConfig
from model.families import PRESETS
from model.fp8 import Fp8Part, RecipeName
from model.megablocks import BLOCK as MEGABLOCKS_BLOCK
from model.remat import RematOnce, RematPolicy
from pretrain.tasks import AnyTask, Task


class Section(BaseModel):
    """A part of the configuration: immutable, and every unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """Name, place and seed. The run lives in ``dir/name``."""

    name: str = Field("ice", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: str = "runs"
    seed: int = Field(0, ge=0, lt=2**31)
    init_from: str | None = Field(
        None,
        description="weights a run starts from instead of drawing them: a run directory, a checkpoint or an exported "
        "folder; a run that has a checkpoint of its own goes on from that",
    )
    preflight: bool = Field(True, description="make the cheap checks of launch/preflight.py when the run starts")

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.dir) / self.name


class SourceSection(Section):
    """A data set, some documents of one, or a task, as a part of the mixture (``pretrain/data/source.py``)."""

    path: str = Field("", description="a prepared data set; empty for a task")
    task: AnyTask | None = Field(None, description="problems that are generated (``pretrain/tasks``)")
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="default the folder's name")
    weight: float = Field(1.0, ge=0, description="share of the sequences, in proportion to the other sources'")
    max_epochs: int | None = Field(None, ge=1, description="then its weight goes to the others; null repeats for ever")
    domains: tuple[str, ...] | None = Field(None, min_length=1, description="only documents of these; null is all")
    min_document_tokens: int | None = Field(None, ge=0)
    max_document_tokens: int | None = Field(None, ge=0)
    difficulty: tuple[float, float] | None = Field(
        None, description="quantiles of documents by difficulty: [0, 0.5] is the easier half"
    )
    difficulty_file: str | None = Field(
        None, description="a .npy file, one number a document; default tokens a byte of text"
    )

    @property
    def label(self) -> str:
        """The name that stages, errors and tables use."""
        return self.name or (Path(self.path).name if self.task is None else self.task.kind)

    @model_validator(mode="after")
    def _bounds_rise(self) -> SourceSection:
        if (self.task is None) == (self.path == ""):
            raise SettingError("path", self.path, "a source is a prepared data set (path) or a task, one of them")
        if self.task is not None:
            for key in ("domains", "min_document_tokens", "max_document_tokens", "difficulty", "difficulty_file"):
                if getattr(self, key) is not None:
                    raise SettingError(key, getattr(self, key), "chooses documents of a data set; a task has settings")
        if self.difficulty is not None and not 0 <= self.difficulty[0] < self.difficulty[1] <= 1:
            raise SettingError("difficulty", self.difficulty, "must be two rising quantiles in [0, 1]")
        if self.difficulty_file is not None and self.difficulty is None:
            raise SettingError("difficulty_file", self.difficulty_file, "needs difficulty = [low, high]")
        low, high = self.min_document_tokens, self.max_document_tokens
        if low is not None and high is not None and low > high:
            raise SettingError("min_document_tokens", low, f"exceeds max_document_tokens = {high}")
        return self


class StageSection(Section):
    """A part of a curriculum: what is different from a number of tokens on, up to the next stage."""

    from_tokens: int = Field(ge=0, description="tokens of the run, rounded up to a whole optimizer step")
    weights: dict[str, float] | None = Field(
        None, description="by source name, the sources left out rest; null takes the sources' own"
    )
    sequence_length: int | None = Field(None, ge=2, description="a divisor of data.sequence_length; null is that")
    mean_loops: int | None = Field(None, ge=1, description="mean depth of its steps; null is loop.mean_loops")


class ResolvedStage(NamedTuple):
    """A stage with nothing left open: ``weights`` has one for each of the section's sources, in their order."""

    from_tokens: int
    sequence_length: int
    weights: tuple[float, ...]
    mean_loops: int | None


class DataSection(Section):
    """Which token shards in which mixture, cut into sequences of what length, how many an optimizer step sees.

    ``path`` alone is one source. With ``sources`` it is the data set whose held-out text is evaluated, by default the
    first source's.
    """

    path: str = Field(description="a prepared data set; empty where the first source is a task")
    sequence_length: int = Field(1024, ge=2, description="tokens a sequence; the longest one where stages shorten it")
    global_batch_size: int = Field(256, ge=1, description="sequences an optimizer step, over all ranks")
    sources: tuple[SourceSection, ...] = Field((), description="a mixture instead of one data set")
    stages: tuple[StageSection, ...] = Field((), description="a curriculum over the run's tokens")
    when_used_up: Literal["share", "refuse"] = Field(
        "share", description="a source at its max_epochs gives its weight to the others, or the run is refused at start"
    )
    packing: Literal["concatenate", "best_fit"] = Field(
        "concatenate", description="cut the stream anywhere, or keep documents whole and pad"
    )
    document_mask: bool = Field(False, description="attention stays inside a document")
    cache: str | None = Field(
        None, description="folder for best_fit's table of a large data set; null is .cache in the data set"
    )
    prefetch_workers: int = Field(2, ge=0, description="threads that read ahead; 0 reads when a step begins")
    prefetch_steps: int = Field(2, ge=1, description="steps that are read ahead")
    read_timeout_seconds: float = Field(900, gt=0, description="a step whose data takes longer ends the run, resumable")

    @model_validator(mode="before")
    @classmethod
    def _path_of_first_source(cls, values: Any) -> Any:
        if isinstance(values, dict) and "path" not in values:
            sources = values.get("sources")
            if isinstance(sources, (list, tuple)) and sources and isinstance(sources[0], dict):
                if "path" in sources[0]:
                    return {**values, "path": sources[0]["path"]}
                if "task" in sources[0]:
                    return {**values, "path": ""}
        return values

    @property
    def all_sources(self) -> tuple[SourceSection, ...]:
        """The sources; of ``path`` alone the one it is."""
        return self.sources or (SourceSection(path=self.path),)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row: of training, or of evaluation where a task asks longer problems."""
        tasks = (source.task for source in self.all_sources)
        return max(self.sequence_length, *(task.longest_row for task in tasks if task is not None), 0)

    @property
    def folders(self) -> list[str]:
        """Every prepared data set that the section names, once."""
        return sorted({path for path in (self.path, *(source.path for source in self.all_sources)) if path})

    @property
    def all_stages(self) -> tuple[ResolvedStage, ...]:
        """The stages from the first token on, with their defaults filled in."""
        own = tuple(source.weight for source in self.all_sources)
        resolved = [
            ResolvedStage(
                stage.from_tokens,
                stage.sequence_length or self.sequence_length,
                own
                if stage.weights is None
                else tuple(stage.weights.get(source.label, 0.0) for source in self.all_sources),
                stage.mean_loops,
            )
            for stage in self.stages
        ]
        if not resolved or resolved[0].from_tokens > 0:
            resolved.insert(0, ResolvedStage(0, self.sequence_length, own, None))
        return tuple(resolved)

    @model_validator(mode="after")
    def _mixture_fits(self) -> DataSection:
        if not self.path and (not self.sources or self.sources[0].task is None):
            raise SettingError("path", self.path, "must name a prepared data set, unless the first source is a task")
        labels = [source.label for source in self.all_sources]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise SettingError(f"sources.{index}.name", label, "is the name of two sources; give one another name")
        for index, stage in enumerate(self.stages):
            self._check_stage(index, stage, labels)
        if sum(self.all_stages[0].weights) <= 0:
            raise SettingError("sources.0.weight", 0, "no source has a weight; set one above 0")
        return self

    def _check_stage(self, index: int, stage: StageSection, labels: list[str]) -> None:
        key = f"stages.{index}"
        if index and stage.from_tokens <= self.stages[index - 1].from_tokens:
            raise SettingError(f"{key}.from_tokens", stage.from_tokens, "must be above the stage's before it")
        if stage.sequence_length is not None:
            if self.sequence_length % stage.sequence_length:
                raise SettingError(
                    f"{key}.sequence_length",
                    stage.sequence_length,
                    f"must divide data.sequence_length = {self.sequence_length}, the longest of the run",
                )
            if self.packing == "best_fit" and stage.sequence_length != self.sequence_length:
                raise SettingError(
                    f"{key}.sequence_length", stage.sequence_length, 'packing = "best_fit" packs for one length only'
                )
        for name, weight in (stage.weights or {}).items():
            if name not in labels:
                raise SettingError(f"{key}.weights", name, f"is not a source; accepted: {', '.join(labels)}")
            if weight < 0:
                raise SettingError(f"{key}.weights.{name}", weight, "must not be negative")
        if stage.weights is not None and sum(stage.weights.values()) <= 0:
            raise SettingError(f"{key}.weights", stage.weights, "no source has a weight; set one above 0")


class OptimSection(Section):
    """AdamW, or Muon for the hidden matrices and AdamW for the rest (``pretrain/muon.py``).

    Norms, biases, the injection and router biases are never decayed (``model.init.decays``).
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(3e-4, gt=0, description="peak, of what AdamW updates")
    muon_lr: float = Field(0.02, gt=0, description="peak, of what Muon updates; the schedule scales both")
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    muon_weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: float = Field(1.0, ge=0, description="global gradient norm; 0 does not clip")
    implementation: Literal["torch", "deepspeed"] = Field(
        "torch", description="torch.optim.AdamW, or DeepSpeed's fused kernel (CPUAdam when the optimizer is offloaded)"
    )
    expert_bias_update_rate: float = Field(
        1e-3, ge=0, description="step of auxiliary-loss-free expert balancing; 0 leaves the bias alone"
    )


class ScheduleSection(Section):
    """Steps, and the learning rate over them as a share of ``optim.lr``."""

    kind: Literal["cosine", "warmup_stable_decay", "constant"] = "cosine"
    steps: int = Field(1000, ge=1)
    warmup_steps: int = Field(100, ge=0)
    decay_steps: int | None = Field(None, ge=1, description="warmup_stable_decay only; default a fifth of steps")
    min_lr_ratio: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _phases_fit(self) -> ScheduleSection:
        if self.warmup_steps >= self.steps:
            raise SettingError("warmup_steps", self.warmup_steps, f"must be below steps = {self.steps}")
        if self.decay_steps is not None:
            if self.kind != "warmup_stable_decay":
                raise SettingError("decay_steps", self.decay_steps, "only used with kind = warmup_stable_decay")
            if self.warmup_steps + self.decay_steps > self.steps:
                raise SettingError(
                    "decay_steps",
                    self.decay_steps,
                    f"with warmup_steps = {self.warmup_steps} exceeds steps = {self.steps}",
                )
        return self


class ContrastiveDepthSection(Section):
    """CDL, contrastive depth learning: the weights and settings of its three terms (``pretrain/losses.py``)."""

    shallow_weight: float = Field(0.3, ge=0, description="of the loss at the shallow depth")
    margin_weight: float = Field(0.1, ge=0, description="of the margin the deep loss must win by, on hard tokens")
    margin: float = Field(0.1, ge=0, description="nats a token the deep state should gain over the shallow one")
    contrastive_weight: float = Field(0.01, ge=0, description="of the contrast between positions")
    temperature: float = Field(0.1, gt=0, description="of the contrast's cosine similarities")
    positions: int = Field(128, ge=2, description="positions of a sequence that are contrasted")


class ApexSection(Section):
    """The losses that Apex adds to the language model's, with model.core = apex only (``pretrain/losses.py``)."""

    verification_weight: float = Field(0.01, ge=0, description="of -log score: refinements towards what scores high")
    correctness_weight: float = Field(
        0.1, ge=0, description="of the verifier's own loss: scores against what was right"
    )
    consistency_weight: float = Field(0.01, ge=0, description="of proposal and review against the refinement")
    benefit_margin: float = Field(0.01, ge=0, description="nats a step must gain to have been worth it")


class LoopSection(Section):
    """How many loops a step runs, how many of them carry gradients, and what is kept for the backward pass."""

    distribution: Literal["fixed", "uniform", "poisson", "lognormal_poisson"] = "fixed"
    mean_loops: int | None = Field(None, ge=1, description="default model.max_loop_iters")
    min_loops: int = Field(1, ge=1)
    max_loops: int | None = Field(None, ge=1, description="a draw above is cut; default twice mean_loops")
    sigma: float = Field(0.5, gt=0, description="spread of the log-normal rate, lognormal_poisson only")
    grad_loops: int | None = Field(None, ge=1, description="backpropagate through the last ones only; null is all")
    ponder_weight: float = Field(0.01, ge=0, description="weight of the ponder cost in the loss; with model.act only")
    cdl: ContrastiveDepthSection | None = Field(None, description="contrastive depth learning; {} takes the defaults")
    depth_head_weight: float = Field(1.0, ge=0, description="of the depth heads' own loss; with model.slu only")
    depth_benefit_margin: float = Field(
        0.01, ge=0, description="nats a loop must gain to be worth it, with model.slu only"
    )
    apex: ApexSection = ApexSection()
    remat: RematPolicy = Field("loop", description="what each loop keeps for the backward pass (model/remat)")
    remat_once: RematOnce | None = Field(
        None, description="the same of prelude and coda: all, or each block's input; default block, unless remat = none"
    )
    remat_offload: bool = Field(False, description="keep the loops' states in host memory until the backward pass")

    @model_validator(mode="after")
    def _range_holds_mean(self) -> LoopSection:
        if self.mean_loops is not None and self.min_loops > self.mean_loops:
            raise SettingError("min_loops", self.min_loops, f"exceeds mean_loops = {self.mean_loops}")
        if self.max_loops is not None and self.max_loops < (self.mean_loops or self.min_loops):
            raise SettingError("max_loops", self.max_loops, "below mean_loops or min_loops")
        if self.remat_offload and self.remat == "none":
            raise SettingError("remat_offload", True, "remat = none keeps no loop states; choose another policy")
        return self


class PrecisionSection(Section):
    """The dtype of weights and activations in forward and backward; the optimizer's master weights are fp32.

    A recipe of FP8 (``model/fp8``) multiplies in eight bits and stores nothing differently: it may change on a resume.
    """

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto is bf16 where the hardware is fast in it, fp32 elsewhere"
    )
    initial_loss_scale_power: int = Field(16, ge=0, le=32, description="fp16: first loss scale is 2 to this power")
    loss_scale_window: int = Field(1000, ge=1, description="fp16: steps without overflow before the scale doubles")
    recipe: RecipeName = Field("bf16", description="what matrix products are made in; bf16 is dtype, no FP8")
    fp8_exclude: tuple[Fp8Part, ...] = Field((), description="parts whose products stay in dtype under an FP8 recipe")


DEFAULT_SUB_GROUP_SIZE = 1_000_000_000  # DeepSpeed's


class ParallelSection(Section):
    """How the engine spreads the run over its ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    expert_parallel_size: int = Field(1, ge=1)
    micro_batch_size: int = Field(1, ge=1, description="sequences a rank runs at once")
    loss_chunk_tokens: int | None = Field(
        1024, ge=1, description="tokens of a rank whose logits exist at once; null keeps all, which saves a product"
    )
    expert_backend: Literal["grouped_mm", "loop", "megablocks"] = Field(
        "grouped_mm", description="who multiplies the experts' rows; the weights and checkpoints are the same"
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="who attends where a window or documents hide keys; auto is flex on CUDA where it proves itself",
    )
    row_moves: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="who moves rows between tokens and experts on a rank; auto is triton on CUDA, torch elsewhere",
    )
    zero_init: bool = Field(False, description="partition parameters while the model is built (ZeRO-3)")
    comm_backend: Literal["default", "deepep"] = Field(
        "default", description="what carries rows to the experts of other ranks: all-to-alls of the backend, or DeepEP"
    )
    fp8_dispatch: bool = Field(
        False, description="rows travel to the experts of other ranks in eight bits, whatever precision.recipe is"
    )
    reduce_bucket_size: int = Field(
        500_000_000, ge=1, description="gradients collected before they are reduced, in elements: a buffer of this size"
    )
    sub_group_size: int = Field(
        DEFAULT_SUB_GROUP_SIZE, ge=1, description="elements of a rank that the ZeRO-3 optimizer steps at once, in fp32"
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None

    @model_validator(mode="after")
    def _stage_allows(self) -> ParallelSection:
        if self.fp8_dispatch and self.expert_parallel_size == 1:
            raise SettingError("fp8_dispatch", True, "expert_parallel_size = 1 sends no rows to other ranks")
        if self.comm_backend == "deepep" and self.expert_parallel_size == 1:
            raise SettingError("comm_backend", "deepep", "expert_parallel_size = 1 sends no rows to other ranks")
        if self.comm_backend == "deepep" and self.fp8_dispatch:
            raise SettingError(
                "comm_backend", "deepep", 'packs no rows in eight bits; use "default" or no fp8_dispatch'
            )
        if self.zero_init and self.zero_stage != 3:
            raise SettingError("zero_init", True, f"needs zero_stage = 3, not {self.zero_stage}")
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise SettingError(
                "offload_parameters", self.offload_parameters, f"needs zero_stage = 3, not {self.zero_stage}"
            )
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise SettingError("offload_optimizer", self.offload_optimizer, "needs zero_stage 1, 2 or 3")
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise SettingError("offload_optimizer", "nvme", f"needs zero_stage = 3, not {self.zero_stage}")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise SettingError("nvme_path", None, "offloading to nvme needs a folder on a fast local disk")
        return self


class CheckpointSection(Section):
    """When to save, what to keep, and what a resume may differ in."""

    every: int = Field(500, ge=1, description="steps")
    keep_last: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1, description="steps that are multiples are kept for ever")
    keep_best: int | None = Field(
        None, ge=1, description="how many of those at an evaluated step are kept for ever, by validation bits a byte"
    )
    asynchronous: bool = Field(
        True, description="training waits for a copy in host memory only; the writing goes on behind it"
    )
    verify_writes: bool = Field(True, description="read every file back before the checkpoint counts as one")
    write_timeout_seconds: float = Field(1800, gt=0, description="a write that takes longer has failed")
    max_failed_saves: int = Field(3, ge=1, description="saves that may fail in a row before the run stops, status 1")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto continues from the newest valid checkpoint; never refuses a used run directory"
    )
    plain_weights: bool = Field(
        True, description="also write the weights as safetensors under the plain model's names, for generate.py"
    )
    allow_changed: tuple[Literal["model", "data"], ...] = Field(
        (), description="fingerprints that may differ from the checkpoint's"
    )


class StabilitySection(Section):
    """What happens when the numbers go wrong (``pretrain/stability.py``)."""

    max_skips_in_row: int = Field(10, ge=1, description="steps that were not finite, then the run rolls back")
    spike_threshold: float | None = Field(
        8.0, gt=0, description="robust z-score from which a loss is high; null looks for none"
    )
    spike_steps: int = Field(3, ge=1, description="high losses in a row, then the run rolls back")
    spike_window: int = Field(128, ge=8, description="calm losses that a loss is compared with")
    spike_warmup_steps: int | None = Field(None, ge=0, description="none is high before; default schedule.warmup_steps")
    rollback_margin_steps: int = Field(5, ge=0, description="steps before the first bad one that are left out with it")
    max_rollbacks: int = Field(3, ge=0, description="then the run stops with status 1")
    skip_samples: tuple[tuple[int, int], ...] = Field(
        (), description="[from, to) in samples of the run's stream (next_sample in metrics.jsonl) to pass over"
    )

    @model_validator(mode="after")
    def _ranges_rise(self) -> StabilitySection:
        for index, (first, end) in enumerate(self.skip_samples):
            if not 0 <= first < end:
                raise SettingError(f"skip_samples.{index}", [first, end], "must be two rising sample numbers")
        return self


class WatchdogSection(Section):
    """When a run that hangs, or has lost a rank, is ended with status 75 (``pretrain/watchdog.py``)."""

    enabled: bool = Field(True, description="false for a debugger's sake")
    heartbeat_seconds: float = Field(1.0, gt=0)
    silence_seconds: float = Field(20.0, gt=0, description="without a heartbeat: then the rank counts as lost")
    factor: float = Field(10.0, gt=1, description="times the median of a phase's own times that it may take")
    floor_seconds: float = Field(120.0, gt=0, description="every phase may take this long")
    ceiling_seconds: float = Field(1800.0, gt=0, description="no phase may take longer; the limit of the first ones")

    @model_validator(mode="after")
    def _limits_rise(self) -> WatchdogSection:
        if self.silence_seconds < 3 * self.heartbeat_seconds:
            raise SettingError(
                "silence_seconds", self.silence_seconds, f"below 3 heartbeats of {self.heartbeat_seconds:g} s"
            )
        if self.floor_seconds < self.silence_seconds + 8 * self.heartbeat_seconds:
            raise SettingError(
                "floor_seconds",
                self.floor_seconds,
                f"a lost rank is noticed after silence_seconds = {self.silence_seconds:g}; must be 8 heartbeats more, "
                "or it looks like a slow one",
            )
        if self.floor_seconds > self.ceiling_seconds:
            raise SettingError("floor_seconds", self.floor_seconds, f"above ceiling_seconds = {self.ceiling_seconds:g}")
        return self


class StragglerSection(Section):
    """How slow ranks are found (``pretrain/stragglers.py``)."""

    every: int | None = Field(50, ge=1, description="steps between gatherings; null for none")
    factor: float = Field(1.5, gt=1, description="times the median over ranks, from which a rank is slow")
    times: int = Field(3, ge=1, description="gatherings in a row in which it was slow, then it is named")


class EvalSection(Section):
    """Bits per byte on the validation split while training."""

    every: int = Field(500, ge=1, description="steps")
    sequences: int | None = Field(None, ge=1, description="how many validation sequences; null is all")
    micro_batch_size: int | None = Field(None, ge=1, description="default parallel.micro_batch_size")


class LoggingSection(Section):
    """Where numbers go."""

    console_every: int = Field(10, ge=1, description="steps between lines where the console is not a terminal")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto is WANDB_MODE where that is set, else online with a key and offline without"
    )
    wandb_project: str = "ice"
    wandb_group: str | None = None
    wandb_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]+$", description="of the W&B run; null is a random one, kept in the checkpoints"
    )
    annotations: dict[str, str | int | float] = Field(
        default_factory=dict, description="what trackers show beside the settings, such as a sweep's budget; no effect"
    )
    tensorboard: bool = True
    plot: bool = True


def _expand_variant(value: Any) -> Any:
    """``{"variant": "ice_3b", "dim": 64}`` becomes that preset's fields with ``dim`` replaced."""
    if not isinstance(value, dict) or "variant" not in value:
        return value
    overrides = dict(value)
    name = overrides.pop("variant")
    if name not in PRESETS:
        raise SettingError("variant", name, f"unknown; accepted: {', '.join(PRESETS)}")
    return {**PRESETS[name]().model_dump(), **overrides}


class TrainingConfig(Section):
    """A whole run."""

    run: RunSection = RunSection()
    model: Annotated[IceConfig, BeforeValidator(_expand_variant), PlainSerializer(lambda c: c.model_dump())]
    data: DataSection
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    loop: LoopSection = LoopSection()
    precision: PrecisionSection = PrecisionSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    stability: StabilitySection = StabilitySection()
    watchdog: WatchdogSection = WatchdogSection()
    stragglers: StragglerSection = StragglerSection()
    eval: EvalSection = EvalSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> TrainingConfig:
        if self.data.sequence_length > self.model.max_seq_len:
            raise SettingError(
                "data.sequence_length",
                self.data.sequence_length,
                f"exceeds model.max_seq_len = {self.model.max_seq_len}",
            )
        if self.model.core == "plain" and self.loop.grad_loops is not None:
            raise SettingError(
                "loop.grad_loops",
                self.loop.grad_loops,
                "model.core = plain reads its input before the first loop only: prelude and embedding would not learn",
            )
        if self._compares_depths and self.shallowest_step < 2:
            idea = "model.slu" if self.model.slu else "loop.cdl" if self.loop.cdl is not None else "model.core = apex"
            raise SettingError(
                "loop.min_loops", self.shallowest_step, f"{idea} compares two depths: every step needs 2 loops or more"
            )
        for index, stage in enumerate(self.data.stages):
            if stage.mean_loops is not None:
                self._check_stage_depth(f"data.stages.{index}.mean_loops", stage.mean_loops)
        for index, source in enumerate(self.data.all_sources):
            if source.task is not None:
                self._check_task_fits(index, source.task)
        if self.optim.kind == "muon":
            self._check_muon()
        experts, size = self.model.n_experts, self.parallel.expert_parallel_size
        if experts == 0 and size > 1:
            raise SettingError("parallel.expert_parallel_size", size, "model.n_experts = 0 leaves nothing to spread")
        if self.model.n_experts and self.parallel.offload_optimizer == "nvme":
            raise SettingError(
                "parallel.offload_optimizer", "nvme", "the engine trains experts so and cannot save them; set it to cpu"
            )
        if experts and experts % size:
            divisors = [n for n in range(1, experts + 1) if experts % n == 0]
            raise SettingError(
                "parallel.expert_parallel_size",
                size,
                f"must divide model.n_experts = {experts}; accepted: {', '.join(map(str, divisors))}",
            )
        backend, precision = self.parallel.expert_backend, self.precision
        if (
            precision.recipe != "bf16"
            and backend != "grouped_mm"
            and not {"experts", "core"} & set(precision.fp8_exclude)
        ):
            raise SettingError(
                "parallel.expert_backend",
                backend,
                f'precision.recipe = {precision.recipe} multiplies the experts itself; add "experts" to '
                "precision.fp8_exclude, or use grouped_mm",
            )
        if experts and self.parallel.expert_backend == "megablocks":
            for key in ("dim", "expert_dim"):
                if getattr(self.model, key) % MEGABLOCKS_BLOCK:
                    raise SettingError(
                        f"model.{key}",
                        getattr(self.model, key),
                        f'parallel.expert_backend = "megablocks" needs a multiple of {MEGABLOCKS_BLOCK}',
                    )
        return self

    def _check_task_fits(self, index: int, task: Task) -> None:
        """Every row holds the longest training problem; the model can be asked the longest problem of all."""
        what = f"data.sources.{index}.task"
        resolved = self.data.all_stages[-len(self.data.stages) :]
        for number, stage in enumerate(self.data.stages):
            too_short = stage.sequence_length is not None and stage.sequence_length <= task.longest
            if too_short and resolved[number].weights[index] > 0:
                raise SettingError(
                    f"data.stages.{number}.sequence_length",
                    stage.sequence_length,
                    f"a problem of {what} has up to {task.longest + 1} tokens; use that or more",
                )
        asked = task.longest_asked
        # Between two end tokens.
        if task.longest_row + 1 > self.model.max_seq_len:
            raise SettingError(
                "model.max_seq_len",
                self.model.max_seq_len,
                f"{what} asks problems of up to {task.longest_row + 1} tokens; raise it to that, or ask smaller ones",
            )
        if asked.answer + 1 > self.model.max_output_tokens:
            raise SettingError(
                "model.max_output_tokens",
                self.model.max_output_tokens,
                f"answers of {what} have up to {asked.answer + 1} tokens; raise it to that, or ask smaller problems",
            )

    def _check_muon(self) -> None:
        if self.parallel.zero_stage != 3:
            raise SettingError("optim.kind", "muon", f"needs parallel.zero_stage = 3, not {self.parallel.zero_stage}")
        if self.parallel.offload_optimizer != "none":
            raise SettingError("optim.kind", "muon", "is not used with parallel.offload_optimizer; set it to none")
        if self.precision.dtype == "fp16":
            raise SettingError("optim.kind", "muon", "is not used with precision.dtype = fp16; use bf16")

    def _check_stage_depth(self, key: str, mean_loops: int) -> None:
        """A stage's depth must be one that ``loop`` allows, and deep enough for the ideas that compare two depths."""
        lowest = self.loop.min_loops if self.loop.distribution != "fixed" else 1
        if self._compares_depths and self.loop.distribution == "fixed":
            lowest = 2
        highest = self.loop.max_loops
        if mean_loops < lowest or (highest is not None and mean_loops > highest):
            limits = f"at least {lowest}" + ("" if highest is None else f" and at most loop.max_loops = {highest}")
            raise SettingError(key, mean_loops, f"must be {limits}, as loop allows")

    @property
    def _compares_depths(self) -> bool:
        """Whether every step reads the model at two depths or more."""
        return self.loop.cdl is not None or self.model.slu or self.model.core == "apex"

    @property
    def mean_loops(self) -> int:
        """Loops of an average step, and of an evaluation."""
        return self.loop.mean_loops or self.model.max_loop_iters

    @property
    def shallowest_step(self) -> int:
        """Fewest loops a step may run."""
        return self.mean_loops if self.loop.distribution == "fixed" else self.loop.min_loops

    @property
    def deepest_step(self) -> int:
        """Most loops a step may run, in any stage."""
        means = [self.mean_loops, *(stage.mean_loops for stage in self.data.stages if stage.mean_loops is not None)]
        return max(map(self._deepest_draw, means))

    def _deepest_draw(self, mean_loops: int) -> int:
        """The largest value of ``pretrain.loop_depth.sample_loops``."""
        loop = self.loop
        if loop.distribution == "fixed" or mean_loops == 1:
            return mean_loops
        limit = loop.max_loops or 2 * mean_loops
        if loop.distribution == "uniform":
            limit = min(limit, 2 * mean_loops - loop.min_loops)
        return max(loop.min_loops, limit)

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-batches a rank runs in an optimizer step (``check_topology`` has seen that they divide)."""
        return self.data.global_batch_size // (self.parallel.micro_batch_size * world_size)


def check_topology(config: TrainingConfig, world_size: int, source: str) -> None:
    """Raise ``BadInputError`` when ``world_size`` ranks cannot run ``config``; ``source`` names its file."""
    size = config.parallel.expert_parallel_size
    if world_size % size:
        raise BadInputError(
            f"{source}: parallel.expert_parallel_size = {size}: must divide the number of ranks, {world_size}; start "
            f"a multiple of {size} ranks or set a divisor of {world_size}"
        )
    together = config.parallel.micro_batch_size * world_size
    if config.data.global_batch_size % together:
        raise BadInputError(
            f"{source}: data.global_batch_size = {config.data.global_batch_size}: must be a multiple of "
            f"parallel.micro_batch_size x ranks = {config.parallel.micro_batch_size} x {world_size} = {together}"
        )
