"""A copy of the training state in host memory: the only part of a save that the training loop waits for.

The engine's state is made of live tensors that the next step overwrites. They are copied into buffers that stay
allocated from save to save: on a CPU, memory fresh from the kernel costs a page fault every 4 KiB, and a copy into it
took 15 times as long as one into memory that was used before (0.3 against 4.5 GB/s); on a GPU, allocating pinned
memory is slow and copying into it is asynchronous, so that one synchronisation at the end is enough. The price is host
memory of the size of a rank's state (for AdamW with fp32 master weights 12 bytes a parameter of its partition), for as
long as the run lasts.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor

_BufferKey = tuple[torch.dtype, int, bool]


class HostBuffers:
    """Copies nested state into host memory that it keeps. One snapshot lives at a time: ``begin`` ends the last."""

    def __init__(self) -> None:
        self._free: defaultdict[_BufferKey, list[Tensor]] = defaultdict(list)
        self._used: defaultdict[_BufferKey, list[Tensor]] = defaultdict(list)
        self._devices: set[torch.device] = set()

    def begin(self) -> None:
        """Every buffer may be overwritten from here on; those that the last snapshot had no use for are freed."""
        self._free, self._used = self._used, defaultdict(list)

    def copy(self, value: Any) -> Any:
        """``value`` with every tensor and container copied; a tensor's bytes are there after ``finish``."""
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if type(value) in (list, tuple):
            return type(value)(self.copy(each) for each in value)
        if isinstance(value, OrderedDict):
            return OrderedDict((key, self.copy(each)) for key, each in value.items())
        if isinstance(value, dict):
            return {key: self.copy(each) for key, each in value.items()}
        return copy.deepcopy(value)  # numbers, names, shapes, the loss scaler: small, without tensors

    def finish(self) -> None:
        """Wait for the copies from accelerators, once for all of them."""
        for device in self._devices:
            torch.accelerator.synchronize(device)
        self._devices.clear()

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        on_accelerator = tensor.device.type != "cpu"
        key = (tensor.dtype, tensor.numel(), on_accelerator)
        free = self._free[key]
        buffer = free.pop() if free else torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=on_accelerator)
        self._used[key].append(buffer)
        host = buffer.view(tensor.shape)
        host.copy_(tensor, non_blocking=on_accelerator)
        if on_accelerator:
            self._devices.add(tensor.device)
        return host
