import pytest
from pydantic import ValidationError

from model import IceConfig, IceModel


def test_specifications_example_works() -> None:
    config = IceConfig(attn_type="mla", kv_lora_rank=512, dim=2048, n_heads=16)
    assert config.qk_head_dim == 192
    assert config.rope_dim == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 7, "n_kv_heads": 2, "dim": 56}, "n_heads = 7: must be a multiple of n_kv_heads = 2"),
        ({"dim": 2056}, "dim = 2056: must be a multiple of n_heads = 16"),
        ({"dim": 2052}, "dim = 2052: must be a multiple of 8"),
        ({"dim": 48}, r"head_dim \(dim / n_heads\) = 3: must be even"),
        ({"attn_type": "mla", "qk_rope_head_dim": 5}, "qk_rope_head_dim = 5: must be even"),
        ({"attn_type": "mla", "qk_norm": True}, "qk_norm = true: only gqa and moda_v2"),
        ({"expert_dim": 100}, "expert_dim = 100: must be a multiple of 8"),
        ({"moe_n_groups": 5}, "n_experts = 64: must be a multiple of moe_n_groups = 5"),
        ({"moe_n_groups": 64}, "moe_n_groups = 64: leaves 1 expert in a group"),
        ({"moe_topk_groups": 2}, "moe_topk_groups = 2: must be at most moe_n_groups = 1"),
        ({"moe_n_groups": 32, "n_experts_per_tok": 3}, "n_experts_per_tok = 3: must be at most 2"),
        ({"n_experts_per_tok": 65}, "n_experts_per_tok = 65: must be at most 64"),
        ({"n_experts_per_tok": 1}, "route_norm = true: with n_experts_per_tok = 1 the one gate is always 1"),
        ({"act_threshold": 1.5}, "less than or equal to 1"),
        ({"attn_type": "linear"}, "'gqa', 'mla' or 'moda_v2'"),
        ({"attn_type": "moda_v2", "n_kv_heads": 2}, "n_kv_heads = 2: attn_type = moda_v2 spreads 3 RoPE resolutions"),
        ({"no_such_key": 4}, "Extra inputs are not permitted"),
        ({"msrd_scales": []}, r"msrd_scales = \[\]: must begin with 1"),
        ({"msrd_scales": [2, 4]}, r"msrd_scales = \[2, 4\]: must begin with 1"),
        ({"msrd_scales": [1, 4, 2]}, r"msrd_scales = \[1, 4, 2\]: must begin with 1 and increase"),
        ({"msrd_scales": [1, 1]}, "must begin with 1 and increase"),
        ({"lora_rank": -1}, "greater than or equal to 0"),
        ({"aec": True, "n_experts": 0}, "aec = true: n_experts = 0"),
        ({"full_attention_every": 2}, "full_attention_every = 2: sliding_window is not set"),
        ({"rope_scaling_factor": 4.0}, "rope_scaling_factor = 4.0: rope_original_seq_len must say"),
        ({"rope_scaling_factor": 0.5}, "greater than or equal to 1"),
        ({"kv_policy": "gated", "attn_type": "moda_v2"}, "kv_policy = gated: moda_v2 has its own way"),
        (
            {"kv_policy": "ring", "sliding_window": 8, "full_attention_every": 3},
            "kv_policy = ring: 2 slots of 1 recurrent_layers",
        ),
        ({"kv_policy": "gated", "sliding_window": 8}, "kv_policy = gated: brings its own window"),
    ],
)
def test_contradictions_are_refused_by_key_and_value(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        IceConfig.model_validate(fields)


def test_dense_core_ignores_expert_fields() -> None:
    config = IceConfig(n_experts=0, expert_dim=100).scaled_down()
    names = [name for name, _ in IceModel(config).named_parameters()]
    assert not any("router" in name or "experts" in name for name in names)


def test_config_is_frozen_and_survives_json() -> None:
    config = IceConfig(attn_type="mla", act=True)
    with pytest.raises(ValidationError):
        config.dim = 3
    assert IceConfig.model_validate_json(config.model_dump_json()) == config


def test_scaled_down_keeps_the_structure() -> None:
    config = IceConfig(
        attn_type="mla",
        q_lora_rank=1536,
        moe_n_groups=8,
        moe_topk_groups=4,
        n_shared_experts=0,
        coda_layers=0,
        act=True,
        tie_embeddings=True,
        score_func="softmax",
        initial_state="learned",
    )
    small = config.scaled_down()
    for field in (
        "attn_type",
        "n_shared_experts",
        "coda_layers",
        "act",
        "tie_embeddings",
        "score_func",
        "initial_state",
    ):
        assert getattr(small, field) == getattr(config, field)
    assert small.q_lora_rank is not None
    assert small.moe_n_groups > small.moe_topk_groups > 1
    assert small.scaled_down() == small
