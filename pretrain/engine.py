"""DeepSpeed, behind one door: the only file that knows its JSON keys and its calls.

What is asked of the engine, and why it is asked this way:

- ZeRO-3 gathers parameters module by module. The looped core is declared a *leaf*, so that its parameters are gathered
  once a forward and once a backward whatever the number of loops; otherwise every loop gathers them again.
- ZeRO-3 refuses DeepSpeed's own MoE layer. Experts are spread by AutoEP (the ``expert_parallel`` section), which
  replaces our MoE layers inside ``deepspeed.initialize``; ``model/expert_parallel.py`` is the other half of that seam.
- AutoEP would build all experts of a layer on every rank and keep a few: with ``expert_start.py`` each draws its own.
- The learning rate is a pure function of the step and is written into the optimizer's groups before each step; no
  scheduler state exists.
- Ending: a rank that leaves the interpreter while gloo threads live can abort after its work is done, so a successful
  run destroys the engine, meets the others at a barrier and destroys the process group. A failing one must not: it
  could wait for ever.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from launch.environment import Place, name_accelerator, prepare_rendezvous
from launch.settings import BadInputError
from model import IceConfig, IceModel
from model.expert_parallel import (
    DOWN_PROJ,
    EXPERTS,
    GATE_UP_PROJ,
    MOE_LAYER_PATTERN,
    ROUTER,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    adopt_replaced_layers,
    is_local_expert,
    routed_layers,
    to_plain_names,
    update_selection_biases,
)
from model.fp8 import Fp8Choice, choose_kernels, convert
from model.init import decays, experts_without_memory
from model.loop import LoopedCore
from model.looped_lm import LoopedOutput
from model.precision import PrecisionChoice, choose_precision
from pretrain.checkpoint.unpickling import load_data
from pretrain.config import OptimSection, TrainingConfig
from pretrain.host_memory import give_back_when_short, keep_freed_memory
from pretrain.universal_format import mended

if TYPE_CHECKING:
    from pretrain.interchange.weight_source import WeightSource


class StepOutcome(NamedTuple):
    """What an optimizer step did.

    ``grad_norm`` is before clipping. ``skipped``: the gradients were not finite on some rank, and no rank changed its
    weights or its optimizer. ``scale_lowered``: so it was, by fp16's loss scaler, which may have overshot.
    """

    grad_norm: float
    skipped: bool
    scale_lowered: bool


def deepspeed_config(config: TrainingConfig, world_size: int, precision: PrecisionChoice) -> dict[str, Any]:
    """The DeepSpeed JSON of a run on ``world_size`` ranks."""
    parallel, optim = config.parallel, config.optim
    torch_adam = optim.implementation == "torch" and parallel.offload_optimizer == "none"
    return {
        "train_batch_size": config.data.global_batch_size,
        "train_micro_batch_size_per_gpu": parallel.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(world_size),
        "gradient_clipping": 0.0 if _clips_here(config, precision) else optim.grad_clip,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": [optim.beta1, optim.beta2],
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "torch_adam": torch_adam,
                # One pass over weights, gradients and moments instead of ten.
                **({"fused": True} if torch_adam else {}),
            },
        },
        "zero_optimization": _zero_section(config),
        **_precision_section(config, precision),
        **_expert_parallel_section(config),
    }


def _clips_here(config: TrainingConfig, precision: PrecisionChoice) -> bool:
    """Without ZeRO and in fp32 DeepSpeed clips by the *mean* of the ranks' norms, and experts make those differ."""
    return config.parallel.zero_stage == 0 and precision.name == "fp32"


def _zero_section(config: TrainingConfig) -> dict[str, Any]:
    parallel = config.parallel
    section: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": parallel.reduce_bucket_size,
        "sub_group_size": parallel.sub_group_size,
        "overlap_comm": torch.cuda.is_available(),
    }
    if config.optim.kind == "muon":
        section["reduce_scatter"] = False  # DeepSpeed's Muon demands it
    for key, device in (
        ("offload_optimizer", parallel.offload_optimizer),
        ("offload_param", parallel.offload_parameters),
    ):
        if device != "none":
            section[key] = {"device": device, "pin_memory": torch.cuda.is_available()}
            if device == "nvme":
                section[key]["nvme_path"] = parallel.nvme_path
    return section


def _precision_section(config: TrainingConfig, precision: PrecisionChoice) -> dict[str, Any]:
    if precision.name == "bf16":
        return {"bf16": {"enabled": True}}
    if precision.name == "fp16":
        scaling = config.precision
        return {
            "fp16": {
                "enabled": True,
                "loss_scale": 0,
                "initial_scale_power": scaling.initial_loss_scale_power,
                "loss_scale_window": scaling.loss_scale_window,
            }
        }
    return {}


def _expert_parallel_section(config: TrainingConfig) -> dict[str, Any]:
    model = config.model
    if model.n_experts == 0:
        return {}
    section: dict[str, Any] = {
        "enabled": True,
        "autoep_size": config.parallel.expert_parallel_size,
        "moe_layer_pattern": MOE_LAYER_PATTERN,
        "router_pattern": ROUTER,
        "expert_pattern": EXPERTS,
        "expert_w1": GATE_UP_PROJ,
        "expert_w2": DOWN_PROJ,
        "expert_w3": None,
        "num_experts_attr": "n_experts",
        "top_k_attr": "n_experts_per_tok",
        "score_func": model.score_func,
        "score_apply": "post",
        "route_norm": model.route_norm,
        "route_scale": model.route_scale,
        "has_shared_experts": model.n_shared_experts > 0,
    }
    if config.parallel.comm_backend == "deepep":
        sequences = max(config.parallel.micro_batch_size, config.eval.micro_batch_size or 0)
        section.update(comm_backend="deepep", comm_max_tokens_per_rank=sequences * config.data.longest_row)
    if model.n_shared_experts > 0:
        section["shared_experts_pattern"] = SHARED_EXPERTS
    if model.moe_n_groups > 1:
        section.update(num_expert_groups=model.moe_n_groups, num_limited_groups=model.moe_topk_groups)
    return {"expert_parallel": section}


def fp8_choice(config: TrainingConfig, device_type: str, precision: PrecisionChoice) -> Fp8Choice | None:
    """What multiplies under ``precision.recipe``; ``BadInputError`` when it needs a package that is not installed."""
    try:
        return choose_kernels(config.precision.recipe, device_type, precision.dtype)
    except ImportError as error:
        raise BadInputError(f"precision.recipe = {config.precision.recipe}: {error}") from None


def parameter_groups(model: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """The optimizer groups: matrices, which are decayed, and the rest, which are not; Muon's matrices are a third.

    DeepSpeed splits each by expert-parallel group and needs a ``name`` to tell the splits apart. ``lr_ratio`` is a
    group's learning rate in units of ``optim.lr``.
    """
    decayed: dict[str, Any] = {"name": "decayed", "params": [], "weight_decay": optim.weight_decay, "lr_ratio": 1.0}
    plain: dict[str, Any] = {"name": "not_decayed", "params": [], "weight_decay": 0.0, "lr_ratio": 1.0}
    if optim.kind == "adamw":
        for name, parameter in model.named_parameters():
            (decayed if decays(name, parameter) else plain)["params"].append(parameter)
        return [decayed, plain]
    from pretrain.muon import is_muons

    muon: dict[str, Any] = {
        "name": "muon",
        "params": [],
        "use_muon": True,
        "lr": optim.muon_lr,
        "momentum": optim.muon_momentum,
        "weight_decay": optim.muon_weight_decay,
        "lr_ratio": optim.muon_lr / optim.lr,
    }
    adam = {"use_muon": False, "lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    for name, parameter in model.named_parameters():
        group = muon if is_muons(name, parameter) else decayed if decays(name, parameter) else plain
        group["params"].append(parameter)
    return [muon, decayed | adam, plain | adam]


def _optimizer_builder(optim: OptimSection) -> Callable[[list[dict[str, Any]]], Any] | None:
    """What makes the optimizer of the groups once AutoEP has replaced its parameters; None: DeepSpeed's own AdamW."""
    if optim.kind == "adamw":
        return None
    from pretrain.muon import build_optimizer

    return lambda groups: build_optimizer(groups, optim)


def restrict_unpickling() -> None:
    """DeepSpeed unpickles its own files: make torch.load refuse all but tensors, plain containers, and these classes.

    They are what a checkpoint of any ZeRO stage holds besides, by ``get_unsafe_globals_in_checkpoint``: data only,
    nothing that runs code when it is built.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def _state_capture(folder: Path, copy: Callable[[Any], Any] | None) -> Any:
    """A checkpoint engine for DeepSpeed that writes nothing: it keeps what it is asked to save.

    DeepSpeed's own asynchronous one (``decoupled``) hands live tensors to a process and waits for it before the next
    optimizer step; torch's (``distributed.checkpoint.async_save``) writes files that DeepSpeed cannot load.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class StateCapture(TorchCheckpointEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.captured: dict[str, Any] = {}

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """No folder is needed."""

        def save(self, state_dict: Any, path: str) -> None:
            self.captured[str(Path(path).relative_to(folder))] = state_dict if copy is None else copy(state_dict)

        def preserves_storage_sharing(self) -> bool:
            """Whether DeepSpeed must clone tensors to cut them loose from a larger storage; a copy is."""
            return copy is None

    return StateCapture()


def _mapped_reader() -> Any:
    """A checkpoint engine for DeepSpeed whose files are mapped, not read into memory.

    A rank that resumes has its own state already; reading the file whole would hold another. Tensors come from the page
    cache as they are copied, and what the optimizer takes over as it is becomes the rank's own at its first update.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class MappedReader(TorchCheckpointEngine):  # type: ignore[misc]
        def load(self, path: str, map_location: Any = None) -> Any:
            return load_data(Path(path), mapped=True)

    return MappedReader()


def _forget_empty_step(optimizer: Any) -> None:
    """Set Adam's step count back to 0 after DeepSpeed's stage-0 wrapper of 16-bit weights was built.

    The wrapper takes a step on zero gradients to allocate its moments. They stay 0, but the bias correction then starts
    at step 2, and the first update is 0.735 of what it should be (betas 0.9, 0.95).
    """
    for state in optimizer.optimizer.state.values():
        state["step"].zero_()


def _unlink_shared_memory(place: Place) -> None:
    """Take away the name of this rank's buffer in ``/dev/shm`` once every rank has mapped it (CPU ranks only).

    DeepSpeed never does: 66 MiB a rank stay in memory after each run, and after a kill the next run on the same port
    may map the old buffer, states and all, before its owner has written it anew.
    """
    dist.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{place.rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


class TrainingEngine:
    """A model on its ranks: forward, backward, step, checkpoint files, whole weights.

    Building one starts the process group, so every check of the user's input comes before it. All methods are
    collective: every rank calls them in the same order.
    """

    def __init__(self, config: TrainingConfig, place: Place, initial: WeightSource | None = None) -> None:
        """Start the process group, build the model from ``run.seed`` or ``initial``, and hand it to DeepSpeed."""
        name_accelerator()
        # DeepSpeed 0.19 calls collectives under names that torch 2.13 has begun to rename.
        warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
        # Importing DeepSpeed takes seconds and prints; a configuration error or --dry-run should not wait for it.
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        from pretrain.attention_kernel import choose_attention
        from pretrain.deepep_transport import check_deepep
        from pretrain.expert_compute import adopt_engine_experts, expert_product
        from pretrain.expert_layer import adopt_expert_layers
        from pretrain.expert_start import ZeroInit, own_experts_only
        from pretrain.interchange.initial_weights import fill_biases, fill_model
        from pretrain.lean_zero import adopt_lean_zero
        from pretrain.row_moves import choose_moves

        product = expert_product(config.parallel.expert_backend)
        row_moves = choose_moves(config.parallel.row_moves, get_accelerator().device_name())
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        restrict_unpickling()
        prepare_rendezvous(place)
        accelerator = get_accelerator()
        self.config = config
        self.place = place
        self.precision = choose_precision(config.precision.dtype, accelerator.device_name())
        if self.precision.name == "fp16" and not accelerator.is_fp16_supported():
            raise BadInputError(f'precision.dtype = "fp16": this {accelerator.device_name()} has none; use "auto"')
        if config.parallel.comm_backend == "deepep":
            check_deepep(self.precision.dtype, accelerator.device_name())
        fp8 = fp8_choice(config, accelerator.device_name(), self.precision)
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
        _unlink_shared_memory(place)
        settings = deepspeed_config(config, place.world_size, self.precision)
        if accelerator.device_name() == "cpu":
            keep_freed_memory()

        torch.manual_seed(config.run.seed)
        sharded = ZeroInit(config_dict_or_path=settings) if config.parallel.zero_init else None
        with experts_without_memory(), sharded or contextlib.nullcontext():
            model = IceModel(config.model)
        if initial is not None:
            zero_init = config.parallel.zero_init

            def gathered(parameter: Tensor) -> Any:
                return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=zero_init)

            fill_model(model, initial, gathered, reads=place.is_first or not zero_init)
        model.set_remat(config.loop.remat, config.loop.remat_once, config.loop.remat_offload)
        model.set_loss_chunk(config.parallel.loss_chunk_tokens)
        if config.parallel.zero_stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [LoopedCore])
        with own_experts_only(accelerator.current_device_name() if config.parallel.zero_init else "cpu"):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=parameter_groups(model, config.optim),
                optimizer=_optimizer_builder(config.optim),
                config=settings,
            )
        if self.precision.name != "fp32" and config.parallel.zero_stage == 0:
            _forget_empty_step(self._engine.optimizer)
        # It would write scripts beside a checkpoint, at once; they refuse checkpoints with AutoEP anyway.
        self._engine._copy_recovery_script = lambda save_path: None
        self.model: IceModel = self._engine.module
        self.device = torch.device(accelerator.current_device_name())
        self._zero = deepspeed.zero
        adopt_replaced_layers(self.model, self.model.core.expert_load)
        if initial is not None:
            fill_biases(self.selection_biases(), initial)
        self.fp8: list[str] = []  # how FP8 is used, for the log
        if fp8 is not None:
            converted = convert(self.model, config.model, fp8.kernels, config.precision.fp8_exclude)
            product = converted.experts or product
            self.fp8.append(f"{fp8.reason}; {converted}")
        adopt_engine_experts(self.model, product)
        fp8_dispatch = config.parallel.fp8_dispatch
        # Why the engine's own layer runs; None: ours does.
        self.stock_expert_layer = adopt_expert_layers(self.model, config.model, row_moves.moves, fp8_dispatch)
        if fp8_dispatch and self.stock_expert_layer is not None:
            raise BadInputError(
                f"parallel.fp8_dispatch = true: {self.stock_expert_layer}, which cannot; set it to false"
            )
        if fp8_dispatch:
            self.fp8.append("rows travel to their experts in 8 bits, and back in " + self.precision.name)
        adopt_lean_zero(self._engine.optimizer)
        self.kernels: list[str] = []  # what was chosen for this machine, for the log
        attention = choose_attention(config, self.device, self.precision.dtype, self.sum_over_ranks)
        self.model.set_attention_kernel(attention.kernel)
        self.kernels.append(f"attention: {attention.reason}")
        if config.model.n_experts:
            self.kernels.append(f"rows of experts are moved by {row_moves.reason}")
        if config.parallel.comm_backend == "deepep":
            self.kernels.append("rows travel between ranks by DeepEP, in its deterministic mode")
        # Every rank leaves here with the same generator state, whatever building the model drew.
        torch.manual_seed(config.run.seed)

    @property
    def model_config(self) -> IceConfig:
        """The architecture being trained."""
        return self.config.model

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def forward(self, input_ids_BS: Tensor, n_loops: int, **options: Any) -> LoopedOutput:
        """Logits and loop measurements of a micro-batch; ``options`` are those of ``IceModel.forward``."""
        output: LoopedOutput = self._engine(input_ids_BS, n_loops=n_loops, return_output=True, **options)
        return output

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a micro-batch's mean loss; the engine divides by the accumulation steps.

        A loss that is not finite may still have finite gradients, on this rank alone. They are made NaN, which reaches
        the norm of every rank through the reduction that happens anyway, and :meth:`step` then skips on all of them.
        """
        self._engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch; the last one's step is the caller's

    def step(self, lr: float) -> StepOutcome:
        """Clip, update the weights with learning rate ``lr``, and clear the gradients; after the last micro-batch.

        Gradients that are not finite change nothing. Every stage of ZeRO, and the wrapper of 16-bit weights without
        it, looks at the reduced norm, the same on all ranks, before its optimizer runs; ``tests/multirank`` holds them
        to it. Only fp32 without ZeRO has no such check, and is clipped and checked here.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)  # checkpoints of before have none
        skipped_before = self._engine.skipped_steps
        norm = self._clip_unsharded() if _clips_here(self.config, self.precision) else None
        skips_here = norm is not None and not math.isfinite(norm)
        if skips_here:
            self._engine.zero_grad()  # an optimizer passes over parameters that have no gradient
        give_back_when_short()  # of what backward and the last micro-batch's activations were
        self._engine.step()
        give_back_when_short()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        skipped = skips_here or self._engine.skipped_steps > skipped_before
        return StepOutcome(
            grad_norm=float(norm) if norm is not None else math.nan,
            skipped=skipped,
            scale_lowered=skipped and self.precision.name == "fp16",
        )

    def _clip_unsharded(self) -> float:
        """Clip whole fp32 gradients by their global norm, and return it: each expert counts once over the ranks."""
        shared, local = torch.zeros(2, dtype=torch.float64, device=self.device).unbind()
        gradients = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        for name, gradient in gradients:
            (local if is_local_expert(name) else shared).add_(gradient.double().square().sum())
        dist.all_reduce(local)
        copies = self.place.world_size // self.config.parallel.expert_parallel_size
        norm = float((shared + local / copies).sqrt())
        if 0 < self.config.optim.grad_clip < norm:
            for _, gradient in gradients:
                gradient.mul_(self.config.optim.grad_clip / (norm + 1e-6))
        return norm

    def take_expert_load(self) -> Tensor | None:
        """Tokens of each (loop, layer, expert) over all ranks since the last call, int64; None without experts."""
        if self.model_config.n_experts == 0:
            return None
        load_TLE = self.model.core.expert_load.take().to(self.device)
        dist.all_reduce(load_TLE)
        return load_TLE.cpu()

    def balance_experts(self, load_TLE: Tensor) -> None:
        """Move every selection bias one step against the load summed over loops."""
        update_selection_biases(self.model, load_TLE.sum(dim=0), self.config.optim.expert_bias_update_rate)

    def injection_radius(self) -> float | None:
        """Largest decay of the carried state, rho(A): below 1 by construction; None where nothing decays linearly."""
        if not self.model.injections():
            return None
        parameters = [p for injection in self.model.injections() for p in injection.parameters()]
        with self._zero.GatheredParameters(parameters, enabled=self.config.parallel.zero_stage == 3):
            return self.model.get_spectral_radius()

    def selection_biases(self) -> dict[str, Tensor]:
        """The router biases by layer name, fp32, the same on every rank."""
        return {
            f"{layer.name}.{ROUTER}.{SELECTION_BIAS}": getattr(layer.router, SELECTION_BIAS)
            for layer in routed_layers(self.model)
        }

    def snapshot(self, folder: Path, tag: str, copy: Callable[[Any], Any] | None) -> dict[str, Any]:
        """What this rank would save in ``folder/tag``: objects for ``torch.save`` by their path below ``folder``.

        Each is what ``copy`` makes of DeepSpeed's live state; without ``copy`` it is that state, and good until the
        next step. Nothing is written, but for optimizer states on NVMe, whose files DeepSpeed copies below ``folder``
        at once.
        """
        capture = _state_capture(folder, copy)
        stock, self._engine.checkpoint_engine = self._engine.checkpoint_engine, capture
        try:
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        finally:
            self._engine.checkpoint_engine = stock
        captured: dict[str, Any] = capture.captured
        return captured

    def load(self, folder: Path, tag: str) -> None:
        """Read from ``folder/tag`` what ``snapshot`` gave, on the same topology."""
        stock, self._engine.checkpoint_engine = self._engine.checkpoint_engine, _mapped_reader()
        try:
            path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
        finally:
            self._engine.checkpoint_engine = stock
        if path is None:
            raise RuntimeError(f"{folder / tag}: the engine found no checkpoint there")

    def load_universal(self, folder: Path, tag: str) -> None:
        """Read from ``folder/tag`` what ``universal_format.write_universal`` made, on any topology."""
        settings = self._engine._config
        settings.load_universal_checkpoint = True
        try:
            with mended(self._engine.optimizer.optimizer):
                self.load(folder, tag)
        finally:
            settings.load_universal_checkpoint = False

    def plain_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights under the plain model's names, one at a time: tensors on the first rank's host memory.

        Every rank iterates to the end (each item is a gather); ranks other than the first get empty tensors.
        """
        yield from to_plain_names(self._whole_parameters())
        yield from ((name, bias.cpu().clone()) for name, bias in self.selection_biases().items())

    def _whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        expert_ranks = self.config.parallel.expert_parallel_size
        for name, parameter in self.model.named_parameters():
            with self._zero.GatheredParameters([parameter], enabled=self.config.parallel.zero_stage == 3):
                whole = parameter.detach()
                if is_local_expert(name) and expert_ranks > 1:
                    whole = self._gather_experts(whole)
                # An empty tensor of the same rank lets the name mapping treat all ranks alike.
                yield name, whole.cpu().clone() if self.place.is_first else torch.empty([0] * whole.dim())

    def _gather_experts(self, local: Tensor) -> Tensor:
        from deepspeed.utils import groups

        size = self.config.parallel.expert_parallel_size
        group = groups._get_expert_parallel_group(f"ep_size_{size}")
        parts = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Element-wise sum in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (small, plain Python), in rank order."""
        gathered: list[Any] = [None] * self.place.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def rendezvous_store(self, prefix: str) -> Any:
        """The ``Store`` in which the ranks met, over an own connection, keys under ``prefix``; None for a lone rank.

        It is hosted by the first rank (or by the launcher's agent), and shared by whoever asks with the same prefix.
        """
        if self.place.world_size == 1:
            return None
        store: Any = distributed_c10d._get_default_store()
        return distributed_c10d.PrefixStore(prefix, store.clone())

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def close(self) -> None:
        """Leave together, after success only."""
        self._engine.destroy()
        dist.barrier()
        dist.destroy_process_group()
