"""Loop states in host memory between the forward and the backward pass.

Each checkpointed loop keeps the tensors it starts from. :class:`HostCopies` stands between (torch's hooks of saved
tensors): it copies them to host memory when the loop starts and brings them back when it is recomputed. What every loop
shares (the encoded input and what is made of it) stays where it is, and memory that several loops keep (a key that the
next loops see) is copied once.

On CUDA the way out is a copy into pinned memory on a stream of its own, behind which the loop computes; the device's
memory is free once it is done. When the backward asks for a loop's tensors, those of the loop before are fetched too,
on the same stream, so that they arrive while this loop is computed. Bytes on the bus a step: twice those of the states.

On a CPU there is no other memory: a copy is a copy. It costs time and saves nothing, and is there so that everything
but the streams is tested without a GPU.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class _View(NamedTuple):
    """A kept tensor: which copied memory, and how it lies in it."""

    copy: _HostCopy
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _HostCopy:
    """One storage's bytes on the host, and for the time between fetch and use on the device again."""

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        self.device, self.stream = tensor.device, stream
        self.host = _to_host(_whole_storage(tensor), stream)
        self._fetched: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def fetch(self) -> None:
        """Start bringing the bytes back, unless that has been started."""
        if self._fetched is not None:
            return
        if self.stream is None:
            self._fetched = self.host
            return
        with torch.cuda.stream(self.stream):
            self._fetched = self.host.to(self.device, non_blocking=True)
            self._arrived = self.stream.record_event()

    def take(self) -> torch.Tensor:
        """The bytes on the device, one-dimensional; the next time they are fetched anew."""
        self.fetch()
        fetched, self._fetched = self._fetched, None
        assert fetched is not None
        if self._arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._arrived)
            fetched.record_stream(current)
        return fetched


def _whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        storage, 0, (storage.nbytes() // tensor.element_size(),), (1,)
    )


def _to_host(flat: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
    if stream is None:
        return flat.clone()
    stream.wait_stream(torch.cuda.current_stream(flat.device))
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(flat, non_blocking=True)
    flat.record_stream(stream)
    return host


class HostCopies:
    """Host memory for the checkpointed loops of one forward.

    Args:
        stays: Tensors that all loops share; they, and views of them, are kept on the device.
    """

    def __init__(self, stays: Iterable[torch.Tensor]) -> None:
        self._stays = {StorageWeakRef(tensor.untyped_storage()) for tensor in stays}
        # A weak reference keeps the address of a freed storage from being given out again.
        self._copies: dict[StorageWeakRef, weakref.ref[_HostCopy]] = {}
        self._loops: list[list[weakref.ref[_HostCopy]]] = []
        self._loop_of: weakref.WeakKeyDictionary[_HostCopy, int] = weakref.WeakKeyDictionary()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """The context in which one loop's checkpoint is made: its arguments are kept on the host."""
        self._loops.append([])
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def host_bytes(self) -> int:
        """Bytes of the copies that are alive."""
        copies = [reference() for reference in self._copies.values()]
        return sum(copy.host.untyped_storage().nbytes() for copy in copies if copy is not None)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _View:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage in self._stays or tensor.dim() == 0:
            return tensor
        reference = self._copies.get(storage)
        copy = None if reference is None else reference()
        if copy is None:
            copy = _HostCopy(tensor, _side_stream(tensor.device))
            self._copies[storage] = weakref.ref(copy)
            self._loop_of[copy] = len(self._loops) - 1
            self._loops[-1].append(weakref.ref(copy))
        return _View(copy, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: torch.Tensor | _View) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        flat = kept.copy.take()
        loop = self._loop_of[kept.copy]
        if loop > 0:
            for reference in self._loops[loop - 1]:
                earlier = reference()
                if earlier is not None:
                    earlier.fetch()
        return flat.as_strided(kept.size, kept.stride, kept.offset)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The one stream of ``device`` on which states travel; None where there is no device memory."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
