r"""What goes over the wire: every collective of this rank, counted by what it is for.

Whoever calls (DeepSpeed, an expert layer, our own engine), each collective of torch reaches one dispatcher operator,
``c10d::NAME``. A :class:`CollectiveCounter` is a dispatch mode that sees them go by, in forward, backward and step::

    with CollectiveCounter() as counter:
        engine.backward(...)
    counter.total["expert_payload"].sent_bytes

Two sizes are counted for each call on n ranks:

- ``buffer_bytes``: the whole tensor, all-gather's output, reduce-scatter's and all-to-all's input, what is reduced.
- ``sent_bytes``: what this rank puts on the wire, by the textbook ring formula. What it receives is as much, but for
  an all-to-all with unequal splits::

    all-gather, reduce-scatter     (n - 1) / n  of the buffer
    all-reduce                   2 (n - 1) / n  of the buffer
    all-to-all                     the buffer without this rank's own part
    broadcast, reduce, send        the buffer, whoever the root is; 0 for a lone rank

A library may use another algorithm (a tree, shared memory, the switch's own reduction); the formula does not change.

What a call is for follows from what it carries: floating-point all-gathers fetch parameters, reduce-scatters and
reductions of more than one number are gradients, floating-point (or, with FP8, one-byte) all-to-alls carry tokens to
experts and back, integer ones say how many, and the rest are the small things ranks agree on. Cost: a Python call for
every torch operation, so for measurements, not for training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

CollectiveKind = Literal["parameter_gather", "gradient_reduce", "expert_payload", "expert_counts", "other"]

_COUNTS = (torch.int32, torch.int64)
_NUMBERS_OF_MEASUREMENTS = (torch.float64, torch.int32, torch.int64)
_GATHERS = ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "allgather_coalesced_")
_SCATTERS = ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_")
_REDUCTIONS = ("allreduce_", "allreduce_coalesced_", "reduce_")
_EXCHANGES = ("alltoall_base_", "alltoall_")


class Traffic(NamedTuple):
    """Calls and bytes; adds up."""

    calls: int = 0
    sent_bytes: int = 0
    buffer_bytes: int = 0

    def __add__(self, other: tuple[Any, ...]) -> Traffic:  # type: ignore[override]  # a sum, not a longer tuple
        calls, sent_bytes, buffer_bytes = other
        return Traffic(self.calls + calls, self.sent_bytes + sent_bytes, self.buffer_bytes + buffer_bytes)


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives this rank takes part in while it is entered; ``total`` by kind, ``barrier`` never."""

    def __init__(self) -> None:
        super().__init__()
        self.total: defaultdict[CollectiveKind, Traffic] = defaultdict(Traffic)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count ``func`` when it is a collective, and run it."""
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        tensors = next((list(_tensors(arg)) for arg in _carriers(name, args)), [])
        group = next((ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)), None)
        if not tensors or group is None or name.startswith("barrier"):
            return
        ranks = group.size()
        whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if name in _EXCHANGES:
            sent = whole - _own_part(name, args, group)
        elif name in _GATHERS or name in _SCATTERS:
            sent = whole * (ranks - 1) // ranks
        elif name in ("allreduce_", "allreduce_coalesced_"):
            sent = 2 * whole * (ranks - 1) // ranks
        else:
            sent = whole if ranks > 1 else 0
        self.total[_kind(name, tensors)] += Traffic(1, sent, whole)


def _carriers(name: str, args: tuple[Any, ...]) -> Iterator[Any]:
    """The argument that is the whole buffer: the output of a gather, the input of everything else."""
    if name in _GATHERS:
        yield args[0]
    elif name in _SCATTERS or name in _EXCHANGES:
        yield args[1]
    else:
        yield args[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Iterable):
        for item in value:
            yield from _tensors(item)


def _own_part(name: str, args: tuple[Any, ...], group: ProcessGroup) -> int:
    """Bytes of an all-to-all's input that stay on this rank."""
    if name == "alltoall_":
        mine: Tensor = args[1][group.rank()]
        return mine.numel() * mine.element_size()
    rows: Tensor = args[1]
    splits = args[4]
    if not splits:
        return rows.numel() * rows.element_size() // group.size()
    row_bytes = rows.element_size() * (rows.numel() // rows.shape[0] if rows.shape[0] else 0)
    return int(splits[group.rank()]) * row_bytes


def _kind(name: str, tensors: list[Tensor]) -> CollectiveKind:
    dtype, elements = tensors[0].dtype, sum(tensor.numel() for tensor in tensors)
    if name in _EXCHANGES:
        return "expert_counts" if dtype in _COUNTS else "expert_payload"
    if dtype in _NUMBERS_OF_MEASUREMENTS or elements <= 1:
        return "other"
    if name in _GATHERS and dtype.is_floating_point:
        return "parameter_gather"
    return "gradient_reduce" if name in _SCATTERS or name in _REDUCTIONS else "other"
