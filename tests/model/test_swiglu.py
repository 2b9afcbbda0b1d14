from __future__ import annotations

import torch
import torch.nn.functional as F

from model.swiglu import swiglu


def test_the_activation_and_its_gradient_are_autograds_in_float64() -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(3, 5, 14, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(3, 5, 7, dtype=torch.float64)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    torch.testing.assert_close(swiglu(gate_up), expected)
    (wanted,) = torch.autograd.grad((expected * factor).sum(), gate_up)
    (found,) = torch.autograd.grad((swiglu(gate_up) * factor).sum(), gate_up)
    torch.testing.assert_close(found, wanted)


def test_only_the_input_is_kept_for_the_backward() -> None:
    gate_up = torch.randn(4, 6, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate_up)
    assert [t.data_ptr() for t in kept] == [gate_up.data_ptr()]
