"""FP8 in the plan: against the conversion of real models, and the arithmetic that follows from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.planning.eight_bits import converted, copies_bytes, eight_bits, emulated
from launch.planning.flops import training_flops
from launch.planning.gpus import GPUS
from launch.planning.memory import plan_memory
from launch.planning.roofline import step_time
from launch.planning.run import planned_run
from launch.planning.weights import model_weights
from launch.settings import load_settings
from model import IceConfig
from model.fp8 import Fp8Part, choose_kernels, convert
from model.parameters import meta_model
from model.variants import VARIANTS
from pretrain.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[3]
ICE_10B = planned_run(load_settings(TrainingConfig, ROOT / "configs" / "ice_10b.json"), 32, 2)
H100 = GPUS["h100"]
SMALL = VARIANTS["ice_tiny"]().scaled_down().model_dump()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_type": "mla", "qk_norm": False, "q_lora_rank": 48, "lora_rank": 8, "slu": True},
        {"kv_policy": "gated", "msrd_scales": (1, 2), "act": True, "expert_dim": 24},
        {"n_experts": 0},
    ],
)
@pytest.mark.parametrize("exclude", [(), ("attention", "experts"), ("core",), ("prelude", "shared_experts")])
def test_the_converted_matrices_are_the_models(changes: dict[str, object], exclude: tuple[Fp8Part, ...]) -> None:
    config = IceConfig.model_validate(SMALL | changes)
    choice = choose_kernels("fp8_blockwise", "cpu", torch.float32)
    assert choice is not None
    expected = convert(meta_model(config), config, choice.kernels, exclude)
    run = replace(ICE_10B, model=config, recipe="fp8_blockwise", fp8_exclude=exclude)
    found = [weight for weight in model_weights(config).weights() if converted(run, weight)]
    assert {w.name.removesuffix(".weight") for w in found if not w.expert} == set(expected.linears)
    assert any(w.expert for w in found) == (expected.experts is not None)


def test_forward_recomputation_and_input_gradient_are_faster_and_nothing_else() -> None:
    run = replace(ICE_10B, recipe="fp8_blockwise")
    own, part = training_flops(run, run.mean_loops), "core experts"
    narrow = eight_bits(run, H100)
    assert narrow.flops[part] == pytest.approx(own[part].forward + own[part].backward / 2 + own[part].recompute)
    assert narrow.flops["head"] == narrow.flops["core attention"] == narrow.flops["fusion"] == 0
    for mixed in ("prelude", "coda", "core matrices"):  # routers and squares of scores among them
        assert 0 < narrow.flops[mixed] < own[mixed].total
    nothing = eight_bits(replace(run, fp8_exclude=("prelude", "core", "coda")), H100)
    assert not any(nothing.flops.values())
    assert nothing.rounding_bytes == 0


def test_a_step_is_faster_where_there_are_kernels_and_pays_for_rounding() -> None:
    run = replace(ICE_10B, recipe="fp8_blockwise")
    plain, fast = (step_time(r, H100).by_resource for r in (ICE_10B, run))
    assert 0.5 * plain["arithmetic"] < fast["arithmetic"] < 0.8 * plain["arithmetic"]
    assert fast["memory"] > plain["memory"]
    assert fast["expert traffic"] == plain["expert traffic"]
    for gpu, recipe in (("a100", "fp8_rowwise"), ("b200", "fp8_blockwise")):
        imitated = replace(run, recipe=recipe)
        assert emulated(imitated, GPUS[gpu])
        assert step_time(imitated, GPUS[gpu]) == step_time(ICE_10B, GPUS[gpu])
    assert emulated(replace(run, dtype_bytes=4), H100)
    assert not emulated(ICE_10B, GPUS["a100"])


def test_rounding_reads_the_dtype_and_writes_a_byte() -> None:
    """One product by hand: a model whose only converted matrices are the prelude's feed-forward."""
    exclude: tuple[Fp8Part, ...] = ("core", "coda", "attention")
    run = replace(ICE_10B, recipe="fp8_rowwise", fp8_exclude=exclude, remat="none", remat_once=False)
    model, tokens = run.model, run.step_tokens // run.ranks
    rows = tokens * (model.dim + model.ffn_dim)
    matrices = 3 * model.dim * model.ffn_dim * run.grad_accum_steps
    uses = 2  # forward and input gradient
    assert eight_bits(run, H100).rounding_bytes == pytest.approx(model.prelude_layers * uses * 3 * (rows + matrices))


def test_memory_has_a_matrix_and_its_rows_in_eight_bits_and_dispatched_rows_as_they_travelled() -> None:
    run = replace(ICE_10B, recipe="fp8_blockwise")
    experts = run.model.n_experts // run.expert_parallel_size * run.model.expert_dim * run.model.dim
    assert copies_bytes(ICE_10B) == 0
    assert copies_bytes(run) >= experts
    more = plan_memory(run).moments["core's backward"] - plan_memory(ICE_10B).moments["core's backward"]
    assert more == pytest.approx(1.05 * copies_bytes(run))
    kept = replace(ICE_10B, remat="dispatch")
    wide, narrow = (plan_memory(r).by_kind["loop states"] for r in (kept, replace(kept, fp8_dispatch=True)))
    assert 0.7 < narrow / wide < 0.8
