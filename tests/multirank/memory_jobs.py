"""How much memory a start and a training step take on a rank, for a :class:`rank_pool.RankPool`.

On a CPU torch has no allocator of its own: tensors come from ``malloc``, whose exact count of bytes in use
(``mallinfo2``, glibc 2.33) is read after every torch operation, when its outputs exist and its inputs still do. What
was in use before the engine was made is subtracted. That is every tensor of the rank, weights and optimizer included,
and the little that Python and gloo add; on a GPU it would be ``torch.cuda.max_memory_allocated``. What an operation
allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from rank_jobs import changed_deepspeed_config, end_engine, start_engine
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.communication import CollectiveCounter
from pretrain.losses import training_objective


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "k")
    ]


def allocated_bytes() -> int:
    """Bytes that ``malloc`` has handed out in this process, in its arenas and as maps of their own."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallocInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


class PeakWatch(TorchDispatchMode):
    """The most bytes in use after any operation while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run ``func`` and look."""
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, allocated_bytes())
        return result


class MemoryPeaks(NamedTuple):
    """Bytes of a rank, over what it had before the engine."""

    between_steps: int
    forward: int
    backward: int
    step: int

    @property
    def peak(self) -> int:
        """Over a whole step."""
        return max(self)


def memory_of_a_step(values: dict[str, Any], loops: int, zero_settings: dict[str, Any]) -> MemoryPeaks:
    """The peaks of the third optimizer step, of one micro-batch, at depth ``loops``; two steps settle the engine."""
    gc.collect()
    before = allocated_bytes()
    with changed_deepspeed_config("zero_optimization", **zero_settings):
        engine = start_engine(values)
    config = engine.config
    generator = torch.Generator().manual_seed(engine.place.rank)
    shape = (config.parallel.micro_batch_size, config.data.sequence_length)
    for _ in range(3):
        ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        gc.collect()
        between_steps = allocated_bytes()
        with _watched() as forward:
            output = engine.forward(ids, loops, targets=ids, grad_loops=config.loop.grad_loops)
            loss = training_objective(output, ids, config).total
        with _watched() as backward:
            engine.backward(loss)
        del output, loss
        with _watched() as step:
            engine.step(config.optim.lr)
        engine.take_expert_load()
    end_engine(engine)
    return MemoryPeaks(*(value - before for value in (between_steps, forward.peak, backward.peak, step.peak)))


@contextlib.contextmanager
def _watched() -> Iterator[PeakWatch]:
    with PeakWatch() as watch:
        yield watch


class StartCost(NamedTuple):
    """Bytes of a rank, over what it had before, until AutoEP has replaced its layers; and those gathered meanwhile."""

    peak: int
    gathered: int


def cost_of_a_start(values: dict[str, Any], stock: bool = False) -> StartCost:
    """What building the model and spreading its experts takes; ``stock``: as AutoEP does it by itself."""
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    import pretrain.engine
    import pretrain.expert_start

    watch, counter = PeakWatch(), CollectiveCounter()
    costs: list[StartCost] = []
    spread = DeepSpeedEngine._configure_expert_parallel

    def spread_and_look(self: Any, *arguments: Any, **keys: Any) -> Any:
        result = spread(self, *arguments, **keys)
        costs.append(StartCost(watch.peak - before, counter.total["parameter_gather"].buffer_bytes))
        return result

    with contextlib.ExitStack() as changes:
        changes.enter_context(mock.patch.object(DeepSpeedEngine, "_configure_expert_parallel", spread_and_look))
        if stock:
            for module, name, replacement in (
                (pretrain.engine, "experts_without_memory", contextlib.nullcontext),
                (pretrain.expert_start, "own_experts_only", contextlib.nullcontext),
                (pretrain.expert_start, "ZeroInit", deepspeed.zero.Init),
            ):
                changes.enter_context(mock.patch.object(module, name, replacement))
        gc.collect()
        before = allocated_bytes()
        changes.enter_context(watch)
        changes.enter_context(counter)
        end_engine(start_engine(values))
    return costs[0]
