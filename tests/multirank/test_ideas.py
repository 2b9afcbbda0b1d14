"""Every idea of the architecture, on ZeRO-3 with expert parallelism, against plain torch in one process.

And the seven sizes in miniature: same structure, two steps on two ranks.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import rank_jobs
import torch
from rank_pool import RankPool
from scenarios import BASE, LENGTH, VOCABULARY, Step, reference, settings
from test_engine import assert_same_training

from model.variants import VARIANTS

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(400)]

IDEAS: dict[str, dict[str, dict[str, Any]]] = {
    "msrd": {"model": {"msrd_scales": [1, 2, 4], "recurrent_layers": 1}},
    "gdlora": {"model": {"lora_rank": 4}},
    "act": {"model": {"act": True}, "loop": {"ponder_weight": 0.05}},
    "cdl": {"loop": {"cdl": {"margin_weight": 0.3, "contrastive_weight": 0.1}}},
    "sandwich_norm_and_qk_norm": {"model": {"sandwich_norm": True, "qk_norm": True}},
    "sliding_window": {"model": {"sliding_window": 5, "full_attention_every": 2}},
    "moda_v2": {"model": {"attn_type": "moda_v2", "moda_history_window": 2, "n_kv_heads": 4, "qk_norm": True}},
    "gated_loops": {"model": {"kv_policy": "gated", "kv_gate_window": 4}},
    "slu": {"model": {"slu": True}, "loop": {"depth_benefit_margin": 0.0}},
    "aec": {"model": {"aec": True, "aec_confidence": 0.3, "aec_drift": 0.5}},
    "all_at_once": {
        "model": {
            "attn_type": "moda_v2",
            "n_kv_heads": 4,
            "msrd_scales": [1, 2],
            "lora_rank": 4,
            "aec": True,
            "aec_confidence": 0.3,
            "aec_drift": 0.5,
            "act": True,
            "slu": True,
            "sandwich_norm": True,
        },
        "loop": {"cdl": {}},
    },
    "learned_first_state": {"model": {"initial_state": "learned"}},
    "mla_with_yarn": {
        "model": {
            "attn_type": "mla",
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "rope_scaling_factor": 4.0,
            "rope_original_seq_len": 8,
        }
    },
}
# Norms around each sublayer magnify rounding: the one-process reference itself, with its batch cut into single
# documents, differs by 1.7e-5 in the second step and 7.2e-5 in the third.
TOLERANCES = {"sandwich_norm_and_qk_norm": 1e-4}
STEPS = [Step(3, shallow=2), Step(5, grad_loops=2, shallow=3), Step(2, shallow=1)]


@pytest.mark.parametrize("idea", IDEAS)
def test_every_idea_trains_on_ranks_as_in_one_process(two_ranks: RankPool, idea: str) -> None:
    sections = copy.deepcopy(IDEAS[idea])
    sections.setdefault("loop", {}).update(remat="loop", min_loops=2)
    # The reference in one process has whole logits.
    sections["parallel"] = {"expert_parallel_size": 2, "micro_batch_size": 2, "loss_chunk_tokens": 7}
    values = settings(**sections)
    trace = two_ranks.run(rank_jobs.train, values=values, steps=STEPS)[0]
    expected = reference(values, STEPS)
    assert_same_training(trace, expected, whole_logits=False, tolerance=TOLERANCES.get(idea, 1e-5))
    for name in expected.gradients[0]:
        assert any((gradients[name] != 0).any() for gradients in expected.gradients), f"{name} learns nothing"


def test_each_scale_is_a_leaf_gathered_once_whatever_the_depth(two_ranks: RankPool) -> None:
    values = settings(model=IDEAS["msrd"]["model"], parallel={"expert_parallel_size": 2})
    by_depth = two_ranks.run(rank_jobs.traffic_by_depth, values=values, depths=[1, 8])[0]
    assert by_depth[1]["parameter_gather"] == by_depth[8]["parameter_gather"]
    without = two_ranks.run(rank_jobs.traffic_by_depth, values=values, depths=[8], leaf=False)[0]
    more = without[8]["parameter_gather"].sent_bytes
    assert more > 1.5 * by_depth[8]["parameter_gather"].sent_bytes, (without, by_depth)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "ice_tiny"])
def test_each_size_in_miniature_trains_two_steps_on_two_ranks(two_ranks: RankPool, variant: str) -> None:
    model = VARIANTS[variant]().scaled_down().model_dump(mode="json")
    model.update(vocab_size=VOCABULARY, max_seq_len=LENGTH, max_output_tokens=LENGTH)
    values = copy.deepcopy(BASE)
    values["model"] = model
    values["parallel"].update(expert_parallel_size=2, micro_batch_size=2)
    values["loop"].update(remat="loop", min_loops=2)
    steps = [Step(4, shallow=1), Step(4, shallow=2)]
    trace = two_ranks.run(rank_jobs.train, values=values, steps=steps)[0]
    assert_same_training(trace, reference(values, steps))
    assert all(torch.isfinite(weight).all() for weight in trace.weights.values())
