"""A snapshot is the state at one moment, whatever happens to the live tensors afterwards."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from pretrain.checkpoint.snapshot import HostBuffers


def nested() -> dict[str, Any]:
    whole = torch.arange(12.0)
    return {
        "weight": torch.nn.Parameter(whole[2:6]),  # a view of something larger
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, dtype=torch.bfloat16),
        "matrix": whole.view(3, 4).T,
        "shapes": OrderedDict(a=torch.Size([2, 3])),
        "list": [torch.ones(2), (torch.zeros(2), "text", None, 1.5)],
    }


def test_a_copy_is_equal_of_the_same_kinds_and_shares_no_memory() -> None:
    state, buffers = nested(), HostBuffers()
    copied = buffers.copy(state)
    assert list(copied) == list(state)
    assert isinstance(copied["shapes"]["a"], torch.Size)
    assert type(copied["shapes"]) is OrderedDict
    assert type(copied["list"][1]) is tuple
    assert copied["list"][1][1:] == ("text", None, 1.5)
    for name in ("weight", "scalar", "empty", "matrix"):
        assert torch.equal(copied[name], state[name])
        assert copied[name].dtype == state[name].dtype
        assert not copied[name].requires_grad
        assert copied[name].untyped_storage().nbytes() == copied[name].nbytes, "only its own bytes are written"
    with torch.no_grad():
        state["weight"].fill_(-1)
        state["list"][1][0].fill_(-1)
    assert copied["weight"].tolist() == [2, 3, 4, 5]
    assert copied["list"][1][0].tolist() == [0, 0]


def test_the_next_snapshot_of_the_same_state_allocates_nothing() -> None:
    state, buffers = nested(), HostBuffers()
    places = []
    for _ in range(3):
        buffers.begin()
        copied = buffers.copy(state)
        buffers.finish()
        places.append(sorted(copied[name].data_ptr() for name in ("weight", "scalar", "matrix")))
    assert places[0] == places[1] == places[2]


def test_two_tensors_of_one_size_never_get_the_same_memory() -> None:
    buffers = HostBuffers()
    for offset in range(3):
        buffers.begin()
        copies = buffers.copy([torch.full((4,), float(value + offset)) for value in range(5)])
        assert [copy[0].item() for copy in copies] == [value + offset for value in range(5)]


def test_memory_that_a_snapshot_had_no_use_for_is_freed_with_the_next() -> None:
    buffers = HostBuffers()
    buffers.copy([torch.ones(1000), torch.ones(10)])
    for _ in range(2):
        buffers.begin()
        buffers.copy([torch.ones(10)])
    assert sum(len(free) for free in buffers._free.values()) == 0
