"""Jobs for a :class:`rank_pool.RankPool`: each is called by every rank at once and returns plain values or tensors."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scenarios import Step, Trace, selection_bias, tokens_of_step
from torch import Tensor

from launch.environment import discover_place
from launch.settings import parse_settings
from model.expert_parallel import is_local_expert, to_plain_names
from pretrain.checkpoint.snapshot import HostBuffers
from pretrain.communication import CollectiveCounter, CollectiveKind, Traffic
from pretrain.config import TrainingConfig, check_topology
from pretrain.engine import TrainingEngine
from pretrain.losses import training_objective


def start_engine(values: dict[str, Any], routing: str = "ordinary") -> TrainingEngine:
    """An engine over all ranks, with the selection biases that force ``routing``."""
    config = parse_settings(TrainingConfig, values, "scenario")
    place = discover_place()
    check_topology(config, place.world_size, "scenario")
    engine = TrainingEngine(config, place)
    for bias in engine.selection_biases().values():
        bias.copy_(selection_bias(routing, config.model.n_experts))
    return engine


def end_engine(engine: TrainingEngine) -> None:
    """Free the engine and keep the process group for the next job."""
    engine._engine.destroy()


def initial_weights(values: dict[str, Any]) -> dict[str, Tensor] | None:
    """What an engine starts from, whole, under the plain model's names; on the first rank."""
    engine = start_engine(values)
    weights = dict(engine.plain_weights())
    end_engine(engine)
    return weights if engine.place.is_first else None


def micro_batches(engine: TrainingEngine, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of the global batch, as ``BatchLoader`` deals it: contiguous, cut into micro-batches."""
    inputs, targets = tokens_of_step(step)
    place, size = engine.place, engine.config.parallel.micro_batch_size
    share = len(inputs) // place.world_size
    for start in range(place.rank * share, (place.rank + 1) * share, size):
        yield inputs[start : start + size], targets[start : start + size]


def whole_gradients(engine: TrainingEngine) -> dict[str, Tensor]:
    """Every gradient, reduced over ranks and before clipping, under the plain model's names."""
    from deepspeed.utils import safe_get_full_grad

    def gather() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in engine.model.named_parameters():
            gradient = safe_get_full_grad(parameter)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = torch.zeros(shape) if gradient is None else gradient.detach().float().reshape(shape).clone()
            if is_local_expert(name) and engine.config.parallel.expert_parallel_size > 1:
                whole = engine._gather_experts(whole)
            yield name, whole

    return dict(to_plain_names(gather()))


def train(values: dict[str, Any], steps: list[Step], routing: str = "ordinary", gradients: bool = True) -> Trace | None:
    """The steps of a scenario on the engine; the first rank returns what happened."""
    engine = start_engine(values, routing)
    trace = train_on(engine, steps, gradients=gradients)
    end_engine(engine)
    return trace if engine.place.is_first else None


def train_on(
    engine: TrainingEngine, steps: list[Step], first_step: int = 0, gradients: bool = False, weights: bool = True
) -> Trace:
    """Run ``steps``, numbered from ``first_step``."""
    trace = Trace(weight_steps=len(steps))
    for number, step in enumerate(steps, start=first_step):
        losses, logits = [], []
        for inputs, targets in micro_batches(engine, number):
            options = {"targets": targets, "grad_loops": step.grad_loops, **step.reads(engine.config)}
            output = engine.forward(inputs, step.loops, **options)
            loss = training_objective(output, targets, engine.config).total
            engine.backward(loss)
            losses.append(loss.item())
            if output.logits is not None:
                logits.append(output.logits.detach().float())
        if gradients:
            trace.gradients.append(whole_gradients(engine))
        outcome = engine.step(engine.config.optim.lr)
        load = engine.take_expert_load()
        if load is not None:
            engine.balance_experts(load)
        (total,) = engine.sum_over_ranks([sum(losses) / len(losses)])
        trace.losses.append(total / engine.place.world_size)
        trace.norms.append(outcome.grad_norm)
        trace.loads.append(torch.empty(0) if load is None else load)
        if trace.logits is None and engine.config.parallel.loss_chunk_tokens is None:
            trace.logits = torch.cat([part for parts in engine.gather_objects(logits) for part in parts])
    if weights:
        trace.weights = dict(engine.plain_weights())
    return trace


@contextlib.contextmanager
def changed_deepspeed_config(section: str, **keys: Any) -> Iterator[None]:
    """Engines started inside have these keys in a section of their DeepSpeed configuration."""
    import pretrain.engine

    original = pretrain.engine.deepspeed_config

    def changed(*arguments: Any) -> dict[str, Any]:
        config = original(*arguments)
        config[section].update(keys)
        return config

    with mock.patch.object(pretrain.engine, "deepspeed_config", changed):
        yield


NOTHING_KEPT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


def traffic_by_depth(
    values: dict[str, Any], depths: list[int], leaf: bool = True, kept: bool = False
) -> dict[int, dict[CollectiveKind, Traffic]]:
    """What one optimizer step puts on the wire at each depth, by kind of collective.

    Each depth has its own engine and is measured in the third step, after ZeRO-3 has recorded its trace and prefetched
    by it once. Parameters of this size would stay gathered for ever by default (``kept``); otherwise nothing is kept,
    as in a model too large to keep. ``leaf=False`` is stock ZeRO-3, which gathers a looped block in every loop.
    """
    import deepspeed

    counts = {}
    for depth in depths:
        with contextlib.ExitStack() as changes:
            if not kept:
                changes.enter_context(changed_deepspeed_config("zero_optimization", **NOTHING_KEPT))
            if not leaf:
                changes.enter_context(mock.patch.object(deepspeed.utils, "set_z3_leaf_modules"))
            engine = start_engine(values)
        train_on(engine, [Step(depth)] * 2, weights=False)
        with CollectiveCounter() as counter:
            for inputs, targets in micro_batches(engine, 2):
                output = engine.forward(inputs, depth, targets=targets)
                engine.backward(training_objective(output, targets, engine.config).total)
            engine.step(engine.config.optim.lr)
        counts[depth] = dict(counter.total)
        end_engine(engine)
    return counts


def gradients_with(values: dict[str, Any], loops: int, leaf: bool, reentrant: bool) -> dict[str, Tensor]:
    """First-step gradients with the core as a leaf or not, and the kind of checkpointing."""
    import deepspeed
    from torch.utils.checkpoint import checkpoint

    import model.remat.checkpointing

    def reentrant_checkpoint(function: Callable[..., Tensor], *args: Any, **_: Any) -> Tensor:
        result: Tensor = checkpoint(function, *args, use_reentrant=True, preserve_rng_state=False)
        return result

    with contextlib.ExitStack() as changes:
        if not leaf:
            changes.enter_context(mock.patch.object(deepspeed.utils, "set_z3_leaf_modules"))
        if reentrant:
            changes.enter_context(mock.patch.object(model.remat.checkpointing, "checkpoint", reentrant_checkpoint))
        engine = start_engine(values)
        trace = train_on(engine, [Step(loops)], gradients=True)
        end_engine(engine)
    return trace.gradients[0]


def initialise_deepspeed_moe() -> str:
    """What DeepSpeed says to its own MoE layer under ZeRO-3."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    layer = MoE(hidden_size=16, expert=torch.nn.Linear(16, 16), num_experts=2, ep_size=1)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
    }
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), layer)
    try:
        deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def draw_depths(values: dict[str, Any], steps: int) -> list[int]:
    """The loop counts of a run as this rank draws them, its own generators being anywhere."""
    from pretrain.loop_depth import sample_loops

    config = parse_settings(TrainingConfig, values, "scenario")
    torch.manual_seed(discover_place().rank)
    return [sample_loops(config.loop, config.mean_loops, config.run.seed, step) for step in range(1, steps + 1)]


def save_engine(engine: TrainingEngine, folder: Path, tag: str) -> None:
    """The engine's files as a checkpoint has them: written from a copy."""
    for name, value in engine.snapshot(folder, tag, HostBuffers().copy).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, folder / name)
    if engine.place.is_first:
        torch.save(engine.selection_biases(), folder / "biases.pt")
    engine.barrier()


def save_and_continue(values: dict[str, Any], folder: Path, steps: list[Step]) -> Trace:
    """Train half of ``steps``, save, train the rest; the trace of the rest."""
    engine = start_engine(values)
    half = len(steps) // 2
    train_on(engine, steps[:half])
    save_engine(engine, folder, "saved")
    trace = train_on(engine, steps[half:], first_step=half)
    end_engine(engine)
    return trace


def load_and_continue(values: dict[str, Any], folder: Path, steps: list[Step]) -> Trace:
    """The second half of ``save_and_continue``, by a new engine that started from other weights."""
    engine = start_engine({**values, "run": {"seed": 99}})
    engine.load(folder, "saved")
    half = len(steps) // 2
    trace = train_on(engine, steps[half:], first_step=half)
    end_engine(engine)
    return trace


def answer_of_zero_to_fp32(folder: Path) -> str:
    """What DeepSpeed's converter to plain weights says on the first rank."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not discover_place().is_first:
        return ""
    try:
        get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="saved")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def refusal_of(values: dict[str, Any]) -> str:
    """What starting an engine raises."""
    try:
        engine = start_engine(values)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    end_engine(engine)
    return "accepted"


def train_16_bit(values: dict[str, Any], steps: list[Step]) -> tuple[Trace, set[str], str]:
    """A scenario's trace, the dtypes of the selection biases, and the dtype of the weights."""
    engine = start_engine(values)
    trace = train_on(engine, steps)
    dtypes = {str(bias.dtype) for bias in engine.selection_biases().values()}
    weights = str(next(engine.model.parameters()).dtype)
    end_engine(engine)
    return trace, dtypes, weights


def start_with_load_balance_coeff(values: dict[str, Any]) -> str:
    """What AutoEP says to its own balancing option."""
    with changed_deepspeed_config("expert_parallel", load_balance_coeff=0.001):
        return refusal_of(values)


def add_ranks() -> int:
    """The smallest collective."""
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    total = torch.tensor(discover_place().rank)
    dist.all_reduce(total)
    return int(total)


def one_rank_waits_for_ever() -> None:
    """What a collective that only one rank entered looks like."""
    import torch.distributed as dist

    if discover_place().is_first:
        dist.all_reduce(torch.zeros(1))


def second_rank_raises() -> None:
    """An ordinary failure of one rank, while the other waits for it."""
    add_ranks()
    if not discover_place().is_first:
        raise ValueError("on purpose")
    add_ranks()


def refusal_of_training(values: dict[str, Any]) -> str:
    """What the training command raises for these settings, without leaving the process group."""
    from pretrain.main import train as train_command

    config = parse_settings(TrainingConfig, values, "scenario")
    place = discover_place()
    try:
        check_topology(config, place.world_size, "scenario")
        with mock.patch.object(TrainingEngine, "close", end_engine):
            status = train_command(config, place)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"trained to status {status}"


def train_with_faults(values: dict[str, Any], numbers: list[int], faults: dict[int, str]) -> Trace | None:
    """Train on the batches ``numbers``; on the last rank, those in ``faults`` go wrong.

    ``loss``: one micro-batch's loss is NaN; ``infinite_loss``: its loss is infinite and its gradients are not;
    ``gradients``: the loss is finite and the gradients are NaN; ``expert``: one infinite number in the gradient of one
    expert, which this rank alone holds where experts are spread. The first rank returns losses, norms and weights.
    """
    engine = start_engine(values)
    on_this_rank = engine.place.rank == engine.place.world_size - 1
    trace = Trace()
    for number in numbers:
        fault = faults.get(number) if on_this_rank else None
        losses = []
        with contextlib.ExitStack() as stack:
            if fault == "expert":
                name, parameter = next((n, p) for n, p in engine.model.named_parameters() if is_local_expert(n))
                assert ".experts." in name
                handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
                stack.callback(handle.remove)
            for position, (inputs, targets) in enumerate(micro_batches(engine, number)):
                output = engine.forward(inputs, 2, targets=targets)
                loss = training_objective(output, targets, engine.config).total
                if position == 1 and fault == "loss":
                    loss = loss * torch.nan
                if position == 1 and fault == "infinite_loss":
                    loss = loss + torch.inf
                if position == 1 and fault == "gradients":
                    output.losses_BS.register_hook(lambda gradient: gradient * torch.nan)
                engine.backward(loss)
                losses.append(loss.item())
            outcome = engine.step(engine.config.optim.lr)
        load = engine.take_expert_load()
        assert load is not None
        if outcome.skipped:
            trace.skipped.append(number)
        else:
            engine.balance_experts(load)
            trace.losses.append(engine.sum_over_ranks([sum(losses)])[0])
            trace.norms.append(outcome.grad_norm)
    # Ranks that disagreed about a step would have other weights; gathered here, since shards would hide it.
    skipped_by_rank = engine.gather_objects(trace.skipped)
    assert all(skipped == trace.skipped for skipped in skipped_by_rank), skipped_by_rank
    trace.weights = dict(engine.plain_weights())
    end_engine(engine)
    return trace if engine.place.is_first else None


class SimulatedCrashError(BaseException):
    """Ends a run between two of its instructions, on every rank, without anything being saved."""


def run_training(
    values: dict[str, Any],
    spike: tuple[int, int] | None = None,
    crash_after: list[int] | None = None,
    stop_after: list[int] | None = None,
) -> list[int | str]:
    """The training command as often as it takes to end: its statuses, or "crash".

    ``spike``: the loss of steps that begin with these samples [first, end) is 50 nats higher. ``crash_after`` and
    ``stop_after``: steps after whose logging the run crashes, or the last rank is asked to stop, one start each, the
    crashes first.
    """
    import pretrain.trainer
    from pretrain.data import Prefetcher
    from pretrain.main import train as train_command
    from pretrain.run_log import RunLog

    config = parse_settings(TrainingConfig, values, "scenario")
    place = discover_place()
    plans = [("crash", step) for step in crash_after or []] + [("stop", step) for step in stop_after or []]
    first_sample = 0
    original_batches, original_step = Prefetcher.step_batches, RunLog.step

    def step_batches(self: Prefetcher, next_sample: int, *arguments: Any, **keys: Any) -> Any:
        nonlocal first_sample
        first_sample = next_sample
        return original_batches(self, next_sample, *arguments, **keys)

    def objective(*arguments: Any) -> Any:
        result = training_objective(*arguments)
        if spike is None or not spike[0] <= first_sample < spike[1]:
            return result
        return result._replace(terms={**result.terms, "loss": result.terms["loss"] + 50.0})

    statuses: list[int | str] = []
    while True:
        kind, at = plans.pop(0) if plans else ("", 0)

        def step(self: RunLog, state: Any, *rest: Any, kind: str = kind, at: int = at) -> None:
            original_step(self, state, *rest)
            if state.step == at:
                if kind == "crash":
                    raise SimulatedCrashError
                if place.rank == place.world_size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        with (
            mock.patch.object(TrainingEngine, "close", end_engine),
            mock.patch.object(Prefetcher, "step_batches", step_batches),
            mock.patch.object(pretrain.trainer, "training_objective", objective),
            mock.patch.object(RunLog, "step", step),
        ):
            try:
                statuses.append(train_command(config, place))
            except SimulatedCrashError:
                statuses.append("crash")
        if statuses[-1] not in ("crash", 75) or len(statuses) > 8:
            return statuses


def preflight_with_a_slow_host(values: dict[str, Any], slow_rank: int) -> list[Any]:
    """The thorough preflight where every rank is a host of its own, and one of them dawdles before each collective."""
    import socket
    import time

    import torch.distributed as dist

    from launch import preflight

    config, place = parse_settings(TrainingConfig, values, "scenario"), discover_place()
    _, gather = preflight.join(place)
    original = dist.all_to_all_single

    def dawdle(*arguments: Any, **keys: Any) -> Any:
        time.sleep(0.3 if place.rank == slow_rank else 0)
        return original(*arguments, **keys)

    with (
        mock.patch.object(socket, "gethostname", return_value=f"node{place.rank}"),
        mock.patch.object(dist, "all_to_all_single", dawdle),
    ):
        return preflight.inspect(config, place, gather, hashes="all")


def run_with_storage_fault(values: dict[str, Any], fault: str) -> tuple[int | str, str]:
    """The training command of a lone rank, and what it says on its error stream.

    From the fourth step on: ``full_disk`` for the metrics, ``slow_read`` of a minute, or ``stopped_in_slow_read``.
    """
    import io
    import threading
    import time

    import pretrain.main
    from pretrain.data import BatchLoader
    from pretrain.metrics import MetricsFile

    config = parse_settings(TrainingConfig, values, "scenario")
    original_read, original_append = BatchLoader.step_batches, MetricsFile.append
    released = threading.Event()
    fourth = 3 * config.data.global_batch_size

    def read(self: BatchLoader, next_sample: int) -> Any:
        if fault != "full_disk" and next_sample >= fourth:
            if fault == "stopped_in_slow_read":
                threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            released.wait(60)
        return original_read(self, next_sample)

    def append(self: MetricsFile, line: dict[str, Any]) -> None:
        if fault == "full_disk" and line["step"] == 4:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        original_append(self, line)

    said = io.StringIO()
    started = time.monotonic()
    with (
        mock.patch.object(BatchLoader, "step_batches", read),
        mock.patch.object(MetricsFile, "append", append),
        mock.patch.object(TrainingEngine, "close", end_engine),
        mock.patch.object(pretrain.main.os, "_exit", side_effect=SystemExit) as ended,
        contextlib.redirect_stderr(said),
    ):
        try:
            status: int | str = pretrain.main.train(config, discover_place())
        except SystemExit:
            status = f"ended with {ended.call_args.args[0]}"
    assert time.monotonic() - started < 55, "waited for the read after all"
    released.set()
    return status, said.getvalue()


def reshape_and_continue(
    values: dict[str, Any], folder: Path, steps: list[Step], mend: bool = True
) -> tuple[Trace, list[dict[str, Any]]]:
    """The second half of ``save_and_continue`` from the universal format; and the optimizer's groups and steps."""
    engine = start_engine({**values, "run": {"seed": 99}})
    with contextlib.nullcontext() if mend else mock.patch("pretrain.engine.mended", contextlib.nullcontext):
        engine.load_universal(folder, "universal")
    for name, bias in torch.load(folder / "biases.pt", weights_only=True).items():
        engine.selection_biases()[name].copy_(bias)
    adam = engine._engine.optimizer.optimizer
    groups = [{key: value for key, value in group.items() if key != "params"} for group in adam.param_groups]
    half = len(steps) // 2
    trace = train_on(engine, steps[half:], first_step=half)
    counts = [float(state["step"]) for state in adam.state.values()]
    end_engine(engine)
    return trace, [*groups, {"steps": counts}]


def train_and_record_batches(values: dict[str, Any]) -> tuple[int, list[list[Any]]]:
    """The training command's status, and this rank's batches of each step in the order in which it took them."""
    import pretrain.data
    from pretrain.main import train as train_command

    steps: list[list[Any]] = []

    class Recorder(pretrain.data.Prefetcher):
        def step_batches(self, next_sample: int, give_up: Callable[[], bool]) -> list[pretrain.data.Batch] | None:
            batches = super().step_batches(next_sample, give_up)
            if batches is not None:
                steps.append(batches)
            return batches

    config = parse_settings(TrainingConfig, values, "scenario")
    place = discover_place()
    check_topology(config, place.world_size, "scenario")
    with (
        mock.patch.object(TrainingEngine, "close", end_engine),
        mock.patch.object(pretrain.data, "Prefetcher", Recorder),
    ):
        return train_command(config, place), steps
