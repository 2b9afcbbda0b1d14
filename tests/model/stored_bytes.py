"""What a model's forward keeps for its backward, in bytes, each storage once; for tests and benchmarks/memory.py.

Three counters that know nothing of each other: torch's hooks of saved tensors see what the graph keeps on the device,
the tapes and the host copies of ``model/remat`` hold the rest. :class:`LiveBytes` is the check on all of them: every
storage that an operation made and that is still alive, and the most there ever was, recomputation included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.remat import HostCopies
from model.remat.tape import Tape


class StoredBytes(NamedTuple):
    """Between the forward and the backward pass."""

    device: int  # saved by the graph: activations, parameters among them
    tape: int
    host: int
    host_afterwards: int  # still there after the backward


@contextmanager
def _made(cls: type) -> Iterator[list[Any]]:
    """The instances of ``cls`` made inside."""
    instances: list[Any] = []
    original = cls.__init__  # type: ignore[misc]

    def init(self: Any, *args: Any, **keys: Any) -> None:
        instances.append(self)
        original(self, *args, **keys)

    with mock.patch.object(cls, "__init__", init):
        yield instances


def stored_bytes(forward: Callable[[], torch.Tensor]) -> StoredBytes:
    """Run ``forward``, a loss, and its backward."""
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def size(tensors: Any) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    with ExitStack() as stack:
        tapes, hosts = stack.enter_context(_made(Tape)), stack.enter_context(_made(HostCopies))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward()
        device, host = size(seen.values()), sum(host.host_bytes() for host in hosts)
        tape = size(tensor for tape in tapes for tensor in tape.tensors())
        seen.clear()
        loss.backward()
        del loss
    return StoredBytes(device, tape, host, sum(host.host_bytes() for host in hosts))


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations under this mode have made and that are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note the memory of its results."""
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _has_memory(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _has_memory(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self._alive:
                    self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def _has_memory(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
