"""The plan's FLOPs against torch's own counter, forward, backward and recomputation of real (small) models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.planning.flops import model_flops, total_flops, training_flops
from launch.planning.run import PlannedRun
from model import IceConfig, IceModel
from model.parameters import training_flops_per_token
from model.variants import VARIANTS

BATCH, LENGTH, LOOPS = 2, 48, 3
aten = torch.ops.aten


def run_of(config: IceConfig, **fields: Any) -> PlannedRun:
    """A run on one rank."""
    plain: dict[str, Any] = {
        "name": "small",
        "model": config,
        "ranks": 1,
        "sequence_length": LENGTH,
        "global_batch_size": BATCH,
        "steps": 1,
        "mean_loops": LOOPS,
        "max_loops": LOOPS,
        "grad_loops": None,
        "dtype_bytes": 4,
        "zero_stage": 0,
        "expert_parallel_size": 1,
        "micro_batch_size": BATCH,
        "remat": "none",
        "remat_once": False,
    }
    return PlannedRun(**plain | fields)


def _squares(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
    """One product of queries with all keys and one with all values."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return _squares(q, k, v)


def _attention_backward(_grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Scores, and the gradients of v, scores, q and k: five products where the forward has two."""
    return _squares(q, k, v) * 5 // 2


def _grouped(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Every row meets one matrix, or both of rank two (the weights' gradient), one outer product each."""
    rows, inner = a
    return 2 * rows * inner * b[-1]


def _added(_sum: Any, a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def counted(config: IceConfig, remat: str, grad_loops: int | None) -> float:
    """FLOPs a token that torch counts in one training step of the plain model."""
    torch.manual_seed(0)
    model = IceModel(config)
    model.set_remat(remat)  # type: ignore[arg-type]
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH))
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten._grouped_mm: _grouped,
        aten.addmm_: _added,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        logits = model(ids, LOOPS, grad_loops=grad_loops)
        logits.flatten(0, 1).logsumexp(-1).sum().backward()
    return counter.get_total_flops() / (BATCH * LENGTH)


CASES: dict[str, dict[str, Any]] = {
    "gqa": {"attn_type": "gqa"},
    "dense core": {"attn_type": "gqa", "n_experts": 0},
    "gated loops": {"attn_type": "gqa", "kv_policy": "gated"},
    # With values as wide as keys: otherwise the CPU writes the scores out and computes nothing twice.
    "mla": {"attn_type": "mla", "q_lora_rank": 48, "v_head_dim": 24},
    "moda": {"attn_type": "moda_v2", "n_kv_heads": 4},
    "msrd, two layers, sandwich": {"msrd_scales": (1, 2), "recurrent_layers": 2, "sandwich_norm": True},
    "adapters, no shared experts": {"lora_rank": 8, "n_shared_experts": 0, "tie_embeddings": True},
}


@pytest.mark.parametrize(("remat", "grad_loops"), [("none", None), ("loop", 2)])
@pytest.mark.parametrize("case", CASES)
def test_flops_are_torchs_to_one_percent(case: str, remat: str, grad_loops: int | None) -> None:
    sizes = {"dim": 128, "ffn_dim": 256, "expert_dim": 64, "n_heads": 4, "vocab_size": 512, "qk_norm": False}
    values = VARIANTS["ice_tiny"]().scaled_down().model_dump() | sizes | CASES[case]
    config = IceConfig.model_validate(values)
    run = run_of(config, remat=remat, remat_once=remat != "none", grad_loops=grad_loops)
    planned = total_flops(training_flops(run, LOOPS, whole_squares=True)).total
    assert planned == pytest.approx(counted(config, remat, grad_loops), rel=0.01)


@pytest.mark.parametrize("variant", ["ice_1b", "ice_50b"])
def test_model_flops_are_those_that_training_reports(variant: str) -> None:
    """``model/parameters.py`` counts 6 FLOPs a parameter, norms included; the two must tell the same utilisation."""
    config = VARIANTS[variant]()
    run = run_of(config, sequence_length=4096, grad_loops=8)
    reported = training_flops_per_token(config, 16, context=4096, grad_loops=8)
    assert model_flops(training_flops(run, 16)) == pytest.approx(reported, rel=0.03)


def test_square_root_recomputes_nearly_twice_and_loops_without_gradient_cost_a_forward() -> None:
    run = run_of(VARIANTS["ice_1b"](), remat="loop", remat_once=True)
    once, twice = (total_flops(training_flops(r, 16)) for r in (run, replace(run, remat="sqrt")))
    core = training_flops(run, 16)["core experts"]
    assert twice.forward == once.forward
    assert once.recompute + 0.5 * core.recompute < twice.recompute < 2 * once.recompute
    short = total_flops(training_flops(replace(run, grad_loops=4), 16))
    assert short.forward == once.forward
    assert short.backward < once.backward
