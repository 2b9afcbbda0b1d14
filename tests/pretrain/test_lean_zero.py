"""The parts of the lean ZeRO-3 step that need no ranks; the multi-rank tests compare whole runs with one process."""

from __future__ import annotations

import torch

from pretrain.lean_zero import _joined


def test_neighbours_in_one_buffer_are_joined_without_a_copy() -> None:
    buffer = torch.arange(10.0)
    whole = _joined([buffer[2:5], buffer[5:6], buffer[6:10]])
    assert torch.equal(whole, buffer[2:])
    assert whole.data_ptr() == buffer[2:].data_ptr()


def test_others_are_copied() -> None:
    buffer = torch.arange(10.0)
    for parts in ([buffer[:2], buffer[3:5]], [buffer[4:6], buffer[2:4]], [buffer[:2], torch.ones(2)], [buffer[::2]]):
        whole = _joined(parts)
        assert torch.equal(whole, torch.cat(parts))
        assert whole.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()
