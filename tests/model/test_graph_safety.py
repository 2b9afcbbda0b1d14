"""Which loops a CUDA graph could hold: nothing in them waits for the device, and shapes depend on shapes alone.

Run on the meta device, forward and backward: a tensor there has no values, so that reading one on the host raises,
whichever call does it. A dispatch mode besides forbids tensors to cross between devices.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import IceConfig, IceModel
from model.attention import SequenceContext, rope_tables
from model.depth import DepthPlan
from model.expert_parallel import set_expert_product
from model.grouped_product import loop

SAFE: dict[str, dict[str, Any]] = {
    "dense": {"n_experts": 0},
    "experts on one rank": {"moe_n_groups": 4, "moe_topk_groups": 2},
    "two layers, QK-norm, window": {"recurrent_layers": 2, "qk_norm": True, "sliding_window": 8},
    "mla": {"attn_type": "mla"},
    "moda": {"attn_type": "moda_v2", "n_kv_heads": 4, "moda_history_window": 2},
    "gated loops": {"kv_policy": "gated"},
    "scales, halting, adapters": {"msrd_scales": (1, 2), "act": True, "lora_rank": 4},
}


class NothingCrosses(TorchDispatchMode):
    """An operator with tensors on two devices raises, but for scalars of the host, which are kernel arguments."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or x.device.type == "meta"}
        assert len(devices) < 2, f"{function} crosses between {devices}"
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        assert not copies or len({x.device.type for x in tensors}) == 1, f"{function} copies between devices"
        return result


def run_loops(fields: dict[str, Any], remat: str = "none", product: Any = None) -> torch.Tensor:
    """A core's forward and backward on the meta device; the gradient of its input."""
    config = IceConfig.model_validate(IceConfig().scaled_down().model_dump() | fields)
    with torch.device("meta"):
        core = IceModel(config).to(torch.bfloat16).core
        if product is not None:
            set_expert_product(core, product)
        core.set_remat(remat)
        context = SequenceContext(rope_tables(config, 0, 32, torch.device("meta")))
        e_BSD = torch.empty(2, 32, config.dim, dtype=torch.bfloat16, requires_grad=True)
    with NothingCrosses():
        output = core(e_BSD, context, DepthPlan(4))
        (output.h_BSD.float().square().mean() + output.ponder_cost).backward()
    assert e_BSD.grad is not None
    return e_BSD.grad


@pytest.mark.parametrize("remat", ["none", "routes"])
@pytest.mark.parametrize("structure", SAFE)
def test_the_loops_of_these_settings_ask_the_device_nothing(structure: str, remat: str) -> None:
    assert run_loops(SAFE[structure], remat).shape == (2, 32, 64)


@pytest.mark.parametrize("structure", ["expert caching", "one product an expert"])
def test_the_loops_of_these_settings_do(structure: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run_loops({"aec": True} if structure == "expert caching" else {}, product=None if "cach" in structure else loop)


def test_a_tensor_that_crosses_is_noticed() -> None:
    with NothingCrosses(), pytest.raises(AssertionError, match="crosses"):
        torch.empty(3, device="meta").copy_(torch.zeros(3))
    with NothingCrosses(), pytest.raises(AssertionError, match="copies between devices"):
        torch.empty((), device="meta").copy_(torch.zeros(()))
