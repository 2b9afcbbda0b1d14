import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from amplified import amplified

from model import IceConfig, IceModel, LoopedOutput
from model.step_embedding import LoopStepEmbedding

SMALL = IceConfig(recurrent_layers=2, qk_norm=True).scaled_down()
STRUCTURES = {
    "gqa_moe": SMALL,
    "mla_moe": IceConfig(attn_type="mla", q_lora_rank=64, moe_n_groups=8, moe_topk_groups=4).scaled_down(),
    "dense": IceConfig(n_experts=0).scaled_down(),
    "act": IceConfig(act=True, score_func="softmax").scaled_down(),
    "tied": IceConfig(tie_embeddings=True, n_shared_experts=0).scaled_down(),
    "learned_state": IceConfig(initial_state="learned").scaled_down(),
    "random_state": IceConfig(initial_state="random").scaled_down(),
    "msrd": IceConfig(msrd_scales=(1, 2, 4)).scaled_down(),
    "msrd_act": IceConfig(msrd_scales=(1, 3), act=True).scaled_down(),
    "gdlora": IceConfig(recurrent_layers=2, lora_rank=16).scaled_down(),
    "sandwich": IceConfig(sandwich_norm=True).scaled_down(),
    "sliding_window": IceConfig(sliding_window=64, full_attention_every=2).scaled_down(),
    "yarn": IceConfig(rope_scaling_factor=4.0, rope_original_seq_len=1024).scaled_down(),
    "core_only": IceConfig(prelude_layers=0, coda_layers=0).scaled_down(),
}


def with_fields(config: IceConfig, **fields: object) -> IceConfig:
    return IceConfig.model_validate(config.model_dump() | fields)


def ids_for(config: IceConfig, batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length))


def gradients(model: IceModel, ids: torch.Tensor, **kwargs: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(ids[:, :-1], return_output=True, **kwargs)
    loss = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten()) + 0.01 * output.ponder_cost
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_trains_every_parameter(structure: str) -> None:
    config = STRUCTURES[structure]
    model = IceModel(config)
    ids = ids_for(config, batch=4, length=32)
    logits = model(ids)
    assert logits.shape == (4, 32, config.vocab_size)
    found = gradients(model, ids)
    missing = {name for name, _ in model.named_parameters()} - found.keys()
    assert not missing
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("n_loops", [1, 3, 7])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_checkpointing_changes_no_bit(structure: str, n_loops: int) -> None:
    config = STRUCTURES[structure]
    model = amplified(config)
    ids = ids_for(config)
    for grad_loops in (None, 2):
        torch.manual_seed(7)
        stored = gradients(model, ids, n_loops=n_loops, grad_loops=grad_loops)
        stored_load = model.core.expert_load.take()
        model.set_remat("loop")
        torch.manual_seed(7)
        recomputed = gradients(model, ids, n_loops=n_loops, grad_loops=grad_loops)
        recomputed_load = model.core.expert_load.take()
        model.set_remat("none")
        assert stored.keys() == recomputed.keys()
        assert all(torch.equal(stored[name], recomputed[name]) for name in stored)
        assert torch.equal(stored_load, recomputed_load)


def test_checkpointing_stores_less() -> None:
    model = amplified(SMALL)
    ids = ids_for(SMALL, length=40)
    stored_bytes = {}
    for policy in ("none", "loop"):
        model.set_remat(policy)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, n_loops=6).sum().backward()
        stored_bytes[policy] = sum(seen.values())
    assert stored_bytes["loop"] < 0.6 * stored_bytes["none"]


def test_loop_is_the_formula() -> None:
    model = amplified(SMALL).eval()
    ids = ids_for(SMALL)
    captured: dict[str, Any] = {}
    model.prelude_norm.register_forward_hook(lambda module, args, output: captured.update(e=output))
    core = model.core
    core.register_forward_hook(lambda module, args, output: captured.update(h=output.h_BSD, context=args[1]))
    model(ids, n_loops=5)

    e, site = captured["e"], captured["context"].site("core", 0)
    decay, drive = core.injection()
    h = e
    for loop in range(5):
        u = core.norm(h + e) + core.step_embedding(loop)
        stream = u
        for block in core.blocks:
            attended = stream + block.attention(block.attention_norm(stream), site)[0]
            stream = attended + block.ffn(block.ffn_norm(attended))
        h = decay * h + drive * e + (stream - u)
    torch.testing.assert_close(captured["h"], h, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("structure", ["gqa_moe", "act"])
def test_truncated_backpropagation_is_the_gradient_with_earlier_states_constant(structure: str) -> None:
    config = STRUCTURES[structure]
    model = amplified(config)
    ids = ids_for(config)
    actual = gradients(model, ids, n_loops=5, grad_loops=2)

    # The same loss, with every quantity of the first three loops detached by hand.
    step, halting = model.core._step, model.core.halting

    def step_without_early_gradients(*args: Any) -> Any:
        h, carries = step(*args)
        return (h.detach() if args[6] < 3 else h), carries

    model.core._step = step_without_early_gradients
    if halting is not None:
        plain = type(halting).forward

        def detached(state, h, loop, last):  # type: ignore[no-untyped-def]
            new = plain(halting, state, h, loop, last)
            return type(new)(*(field.detach() for field in new)) if loop < 3 else new

        halting.forward = detached
    expected = gradients(model, ids, n_loops=5)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-4, msg=name)
    full = gradients(amplified(config), ids, n_loops=5)
    assert any(not torch.allclose(actual[name], full[name]) for name in actual)


def test_truncation_longer_than_the_loop_is_no_truncation() -> None:
    model = amplified(SMALL)
    ids = ids_for(SMALL)
    full, longer = gradients(model, ids, n_loops=3), gradients(model, ids, n_loops=3, grad_loops=9)
    assert all(torch.equal(full[name], longer[name]) for name in full)


@pytest.mark.parametrize("structure", ["gqa_moe", "mla_moe", "act", "dense"])
def test_each_sequence_stops_at_its_own_depth(structure: str) -> None:
    config = STRUCTURES[structure]
    model = amplified(config)
    ids = ids_for(config, batch=4)
    depths = torch.tensor([1, 5, 3, 9])
    together = model(ids, n_loops=5, sequence_loops=depths, return_output=True)
    residuals = []
    for row, depth in enumerate(depths.clamp_max(5).tolist()):
        alone = model(ids[row : row + 1], n_loops=depth, return_output=True)
        torch.testing.assert_close(together.logits[row : row + 1], alone.logits, atol=2e-5, rtol=1e-4)
        residuals.append(alone.loop_residual)
    torch.testing.assert_close(together.loop_residual, torch.stack(residuals).mean(), atol=1e-5, rtol=1e-4)


def test_residual_is_the_last_loops_relative_change() -> None:
    model = amplified(SMALL).eval()
    ids = ids_for(SMALL)
    states: list[torch.Tensor] = []
    model.core.register_forward_hook(lambda module, args, output: states.append(output.h_BSD))
    output = model(ids, n_loops=4, return_output=True)
    model(ids, n_loops=3)
    expected = ((states[0] - states[1]).norm(dim=-1) / states[0].norm(dim=-1)).mean()
    assert isinstance(output, LoopedOutput)
    assert not output.loop_residual.requires_grad
    assert output.ponder_cost == 0
    torch.testing.assert_close(output.loop_residual, expected.detach())


def test_default_depth_is_max_loop_iters_and_deeper_is_possible() -> None:
    model = amplified(SMALL).eval()
    ids = ids_for(SMALL)
    assert torch.equal(model(ids), model(ids, n_loops=SMALL.max_loop_iters))
    deep = model(ids, n_loops=64)
    assert torch.isfinite(deep).all()


def test_state_stays_bounded_at_any_depth() -> None:
    model = amplified(SMALL).eval()
    torch.nn.init.constant_(model.core.injection.log_A, -math.inf)
    torch.nn.init.constant_(model.core.injection.log_dt, -math.inf)
    norms: list[float] = []
    model.core.register_forward_hook(lambda module, args, output: norms.append(output.h_BSD.norm(dim=-1).max().item()))
    with torch.no_grad():
        for depth in (256, 1024):
            model(ids_for(SMALL, batch=1, length=4), n_loops=depth)
    assert norms[1] < 1.5 * norms[0]
    assert model.get_spectral_radius() <= 1 - 2**-7


def test_step_embedding_is_distinct_and_bounded_for_every_loop() -> None:
    step = LoopStepEmbedding(64)
    vectors = torch.stack([step(loop) for loop in range(300)])
    assert vectors.abs().max() <= step.gain.abs().max()
    distances = torch.cdist(vectors, vectors) + 100 * torch.eye(300)
    assert distances.min() > 1e-4


def test_random_initial_state_differs_in_training_and_is_fixed_in_evaluation() -> None:
    config = STRUCTURES["random_state"]
    model = amplified(config)
    ids = ids_for(config)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_load_is_counted_per_loop_and_layer() -> None:
    model = amplified(SMALL)
    chosen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for layer, block in enumerate(model.core.blocks):
        block.ffn.router.register_forward_hook(
            lambda module, args, routes, layer=layer: chosen[layer].append(routes.experts_NK)
        )
    model(ids_for(SMALL), n_loops=3, grad_loops=1)
    load = model.core.expert_load.take()
    assert load.shape == (3, 2, SMALL.n_experts)
    for layer, choices in chosen.items():
        for loop, experts in enumerate(choices):
            assert load[loop, layer].tolist() == torch.bincount(experts.flatten(), minlength=8).tolist()


def test_load_adds_up_over_forwards_of_different_depths() -> None:
    model = IceModel(SMALL)
    for depth in (1, 4, 2):
        model(ids_for(SMALL, batch=1, length=5), n_loops=depth)
    per_loop = model.core.expert_load.take().sum(dim=(1, 2))
    one = 5 * SMALL.n_experts_per_tok * SMALL.recurrent_layers
    assert per_loop.tolist() == [3 * one, 2 * one, one, one]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", ["gqa_moe", "mla_moe", "act", "learned_state"])
def test_half_precision_trains_and_stays_near_fp32(structure: str, dtype: torch.dtype) -> None:
    config = with_fields(STRUCTURES[structure], n_experts=0)  # a flipped route is a different function
    model = IceModel(config)
    ids = ids_for(config)
    with torch.no_grad():
        expected = model(ids)
    model.to(dtype)
    found = gradients(model, ids)
    assert found["head.weight"].dtype == dtype
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    with torch.no_grad():
        assert (model(ids).float() - expected).norm() < 0.05 * expected.norm()


def test_tied_head_is_the_embeddings_parameter() -> None:
    model = IceModel(STRUCTURES["tied"])
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_loops": 0}, "n_loops = 0: must be at least 1"),
        ({"grad_loops": 0}, "grad_loops = 0: must be at least 1"),
    ],
)
def test_depths_below_one_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IceModel(SMALL)(ids_for(SMALL), **kwargs)


def test_sequences_longer_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens: more than max_seq_len = 64"):
        IceModel(SMALL)(ids_for(SMALL, length=65))


def test_unknown_checkpointing_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="remat = full: must be one of none, loop, routes, dispatch, sqrt"):
        IceModel(SMALL).set_remat("full")
