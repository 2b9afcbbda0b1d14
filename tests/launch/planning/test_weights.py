"""The plan's weights are the model's: names and shapes, for every variant and for any combination of ideas."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.planning.weights import PARTS, active_parameters, model_weights
from model import IceConfig
from model.parameters import count_parameters, meta_model
from model.variants import VARIANTS


def assert_same_weights(config: IceConfig) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}
    planned = list(model_weights(config).weights())
    assert {weight.name: weight.shape for weight in planned} == expected
    assert len(planned) == len(expected)
    assert {weight.name for weight in planned if weight.expert} == {
        name for name in expected if ".experts." in name and "shared" not in name
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_every_variant_are_the_models(variant: str) -> None:
    config = VARIANTS[variant]()
    assert_same_weights(config)
    count = count_parameters(config)
    assert model_weights(config).total == count.total
    assert active_parameters(config) == count.active
    assert set(model_weights(config).by_part()) <= set(PARTS)


ATTENTIONS: list[dict[str, Any]] = [
    {"attn_type": "gqa", "qk_norm": True},
    {"attn_type": "gqa", "kv_policy": "gated"},
    {"attn_type": "moda_v2", "n_kv_heads": 4},
    {"attn_type": "mla", "q_lora_rank": 24},
    {"attn_type": "mla", "q_lora_rank": None, "kv_policy": "gated"},
]


@settings(max_examples=40)
@given(
    attention=st.sampled_from(ATTENTIONS),
    layers=st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(0, 2)),
    scales=st.sampled_from([(1,), (1, 2), (1, 2, 4)]),
    experts=st.sampled_from([0, 4, 8]),
    shared=st.integers(0, 2),
    rank=st.sampled_from([0, 3]),
    state=st.sampled_from(["input", "random", "learned"]),
    switches=st.fixed_dictionaries({key: st.booleans() for key in ("sandwich_norm", "act", "slu", "tie_embeddings")}),
)
def test_weights_of_any_configuration_are_the_models(
    attention: dict[str, Any],
    layers: tuple[int, int, int],
    scales: tuple[int, ...],
    experts: int,
    shared: int,
    rank: int,
    state: str,
    switches: dict[str, bool],
) -> None:
    prelude, recurrent, coda = layers
    values = VARIANTS["ice_tiny"]().scaled_down().model_dump() | {
        "qk_norm": False,
        "prelude_layers": prelude,
        "recurrent_layers": recurrent,
        "coda_layers": coda,
        "msrd_scales": scales,
        "n_experts": experts,
        "n_shared_experts": shared,
        "lora_rank": rank,
        "initial_state": state,
        **attention,
        **switches,
    }
    assert_same_weights(IceConfig.model_validate(values))
