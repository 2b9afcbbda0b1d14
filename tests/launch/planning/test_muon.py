"""Muon in the plan: against the optimizer's own iteration and choice of matrices, and what follows on many ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.planning.gathering import Placement
from launch.planning.gpus import GPUS
from launch.planning.memory import plan_memory
from launch.planning.muon import chunks, flops_in_turn, hidden, newton_schulz_flops, passing_bytes, shard_elements
from launch.planning.roofline import step_time
from launch.planning.run import planned_run
from launch.planning.search import evaluate, remedies
from launch.planning.weights import model_weights
from launch.settings import load_settings
from model import IceConfig
from model.parameters import meta_model
from model.variants import VARIANTS
from pretrain.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[3]
ICE_50B = planned_run(load_settings(TrainingConfig, ROOT / "configs" / "ice_50b.json"), 128, 2)
SMALL = VARIANTS["ice_tiny"]().scaled_down().model_dump()


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (5, 24, 64)])
def test_newton_schulz_costs_what_torch_counts(shape: tuple[int, ...]) -> None:
    from deepspeed.runtime.zero.muon.original_muon import zeropower_via_gram_newtonschulz

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        zeropower_via_gram_newtonschulz(torch.randn(shape), steps=5)
    stacked = shape[0] if len(shape) == 3 else 1
    assert counter.get_total_flops() == stacked * newton_schulz_flops(*shape[-2:])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_type": "mla", "qk_norm": False, "q_lora_rank": 48, "lora_rank": 8, "slu": True},
        {"kv_policy": "gated", "msrd_scales": (1, 2), "sandwich_norm": True, "act": True, "initial_state": "learned"},
        {"n_experts": 0},
    ],
)
def test_muons_matrices_are_the_optimizers(changes: dict[str, object]) -> None:
    from pretrain.muon import is_muons

    config = IceConfig.model_validate(SMALL | changes)
    expected = {name for name, parameter in meta_model(config).named_parameters() if is_muons(name, parameter)}
    assert {weight.name for weight in model_weights(config).weights() if hidden(weight)} == expected


@pytest.mark.parametrize("by_shape", [False, True])
def test_chunks_hold_every_matrix_once_and_no_more_than_a_bucket(by_shape: bool) -> None:
    config, placement, bucket = ICE_50B.model, Placement(128, 8), 500_000_000
    found = chunks(config, placement, bucket, by_shape)
    assert sum(chunk.elements for chunk in found) == sum(
        placement.local_elements(weight) for weight in model_weights(config).weights() if hidden(weight)
    )
    assert all(chunk.elements <= bucket or len(chunk.stacks) == 1 for chunk in found)
    assert {chunk.owners for chunk in found} == {128, 16}


def test_momentum_in_the_dtype_replaces_two_moments_in_fp32() -> None:
    run = replace(ICE_50B, muon=True)
    saved = plan_memory(ICE_50B).moments["core's backward"] - plan_memory(run).moments["core's backward"]
    assert saved == pytest.approx(6 * shard_elements(run))
    assert 0.9 < shard_elements(run) * 128 / model_weights(run.model).total < 1


def test_newton_schulz_and_its_gathers_are_waited_for_in_the_step() -> None:
    run = replace(ICE_50B, muon=True)
    plain, with_muon = (step_time(r, GPUS["h100"]).by_resource for r in (ICE_50B, run))
    assert with_muon["optimizer"] - plain["optimizer"] > flops_in_turn(run) / GPUS["h100"].bf16_flops
    assert with_muon["parameter traffic"] >= plain["parameter traffic"]
    assert with_muon["arithmetic"] == plain["arithmetic"]


def test_handing_a_rounds_results_to_every_rank_outgrows_a_gpu_on_a_large_cluster() -> None:
    run = replace(ICE_50B, muon=True)
    assert passing_bytes(replace(run, ranks=1024)) > 6 * passing_bytes(run)
    assert evaluate(ICE_50B, GPUS["h100"]) is not None
    assert evaluate(run, GPUS["h100"]) is None
    assert 'optim.kind = "adamw"' in remedies(run, GPUS["h100"])
    assert evaluate(replace(run, ranks=16), GPUS["b200"]) is not None
