import pytest
import torch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from slow_reference import moe_loop, naive_route
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from model import IceConfig
from model.expert_load import ExpertLoad
from model.moe import MoELayer, Router, plan_dispatch

BASE = IceConfig(n_experts=16, n_experts_per_tok=3, dim=32, n_heads=4, expert_dim=24)
ROUTINGS = {
    "sigmoid": {},
    "softmax": {"score_func": "softmax"},
    "softmax_unnormalised": {"score_func": "softmax", "route_norm": False},
    "scaled": {"route_scale": 2.5},
    "grouped": {"moe_n_groups": 4, "moe_topk_groups": 2, "route_scale": 2.5},
    "grouped_softmax": {"score_func": "softmax", "moe_n_groups": 8, "moe_topk_groups": 3, "route_norm": False},
}


def config_for(routing: str, **fields: object) -> IceConfig:
    return IceConfig.model_validate(BASE.model_dump() | ROUTINGS[routing] | fields)


def biased_layer(config: IceConfig) -> MoELayer:
    layer = MoELayer(config)
    layer.router.e_score_correction_bias.uniform_(-0.3, 0.3)
    return layer


def sorted_routes(gates: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = experts.argsort(dim=-1)
    return gates.gather(1, order), experts.gather(1, order)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routes_match_a_loop_over_tokens(routing: str) -> None:
    config = config_for(routing)
    router = biased_layer(config).router
    x = torch.randn(40, config.dim)
    routes = router(x)
    logits = x.double() @ router.weight.detach().double().T
    scores = logits.sigmoid() if config.score_func == "sigmoid" else logits.softmax(-1)
    for token in range(40):
        expected = naive_route(
            scores[token],
            router.e_score_correction_bias.double(),
            config.n_experts_per_tok,
            config.moe_n_groups,
            config.moe_topk_groups,
            config.route_norm,
            config.route_scale,
        )
        actual = dict(zip(routes.experts_NK[token].tolist(), routes.gates_NK[token].tolist(), strict=True))
        assert actual == pytest.approx(expected, rel=1e-5)
    assert routes.tokens_per_expert_E.tolist() == torch.bincount(routes.experts_NK.flatten(), minlength=16).tolist()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_router_matches_deepspeeds(routing: str) -> None:
    config = config_for(routing)
    ours = biased_layer(config).router
    grouped = config.moe_n_groups > 1
    theirs = TokenChoiceTopKRouter(
        config.dim,
        config.n_experts,
        config.moe_n_groups if grouped else None,
        config.moe_topk_groups if grouped else None,
        config.n_experts_per_tok,
        config.score_func,
        config.route_norm,
        config.route_scale,
        gate_bias=False,
    )
    theirs.gate.weight.data.copy_(ours.weight.data)
    x = torch.randn(50, config.dim)
    routes, (gates, experts, counts) = ours(x), theirs(x, ours.e_score_correction_bias)
    actual, expected = sorted_routes(routes.gates_NK, routes.experts_NK), sorted_routes(gates, experts)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0])
    assert routes.tokens_per_expert_E.tolist() == counts.tolist()


@pytest.mark.parametrize("routing", ["sigmoid", "grouped"])
def test_layer_matches_transformers_deepseek_v3(routing: str) -> None:
    config = config_for(routing, n_shared_experts=2)
    ours = biased_layer(config)
    theirs = hf.DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=config.dim,
            moe_intermediate_size=config.expert_dim,
            n_routed_experts=config.n_experts,
            num_experts_per_tok=config.n_experts_per_tok,
            n_shared_experts=2,
            n_group=config.moe_n_groups,
            topk_group=config.moe_topk_groups,
            norm_topk_prob=config.route_norm,
            routed_scaling_factor=config.route_scale,
        )
    )
    gate, up = ours.shared_experts.gate_up_proj.weight.chunk(2)
    theirs.load_state_dict(
        {
            "gate.weight": ours.router.weight,
            "gate.e_score_correction_bias": ours.router.e_score_correction_bias,
            "experts.gate_up_proj": ours.experts.gate_up_proj,
            "experts.down_proj": ours.experts.down_proj,
            "shared_experts.gate_proj.weight": gate,
            "shared_experts.up_proj.weight": up,
            "shared_experts.down_proj.weight": ours.shared_experts.down_proj.weight,
        }
    )
    x = torch.randn(2, 17, config.dim)
    _, their_gates, their_experts = theirs.gate(x)
    routes = ours.router(x.flatten(0, 1))
    actual = sorted_routes(routes.gates_NK, routes.experts_NK)
    expected = sorted_routes(their_gates, their_experts)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("row_alignment", [1, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_layer_and_gradients_match_a_loop_over_experts(
    routing: str, row_alignment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.moe.row_alignment", lambda device, dtype: row_alignment)
    config = config_for(routing, n_shared_experts=0)
    layer = biased_layer(config)
    # One expert that nobody may choose: an empty group must neither fail nor leave its gradient undefined.
    layer.router.e_score_correction_bias[5] = -100.0
    x = torch.randn(2, 19, config.dim, requires_grad=True)
    direction = torch.randn(2, 19, config.dim)

    output = layer(x)
    parameters = [layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj]
    actual = torch.autograd.grad((output * direction).sum(), [x, *parameters])

    wide = [tensor.detach().double().requires_grad_() for tensor in (x, *parameters)]
    logits = wide[0].flatten(0, 1) @ wide[1].T
    scores = logits.sigmoid() if config.score_func == "sigmoid" else logits.softmax(-1)
    experts = layer.router(x.flatten(0, 1)).experts_NK
    gates = scores.gather(1, experts)
    if config.route_norm:
        gates = gates / gates.sum(-1, keepdim=True)
    reference = moe_loop(wide[0].flatten(0, 1), gates * config.route_scale, experts, wide[2], wide[3]).view_as(wide[0])
    expected = torch.autograd.grad((reference * direction.double()).sum(), wide)

    torch.testing.assert_close(output.double(), reference, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
    assert actual[2][5].abs().max() == 0


def test_selection_bias_moves_the_choice_but_not_the_gate() -> None:
    config = config_for("sigmoid", route_norm=False)
    router = Router(config)
    x = torch.randn(30, config.dim)
    router.e_score_correction_bias[7] = 10.0
    routes = router(x)
    assert (routes.experts_NK == 7).any(dim=1).all()
    score = (x @ router.weight.T).sigmoid()[:, 7]
    torch.testing.assert_close(routes.gates_NK[routes.experts_NK == 7], score)


@pytest.mark.parametrize("alignment", [1, 8, 16])
def test_dispatch_gives_every_choice_its_own_row_in_its_experts_group(alignment: int) -> None:
    routes = biased_layer(BASE).router(torch.randn(37, BASE.dim))
    plan = plan_dispatch(routes, alignment)
    rows = plan.row_of_choice_NK
    assert rows.unique().numel() == rows.numel()
    assert torch.equal(plan.token_of_row_R[rows], torch.arange(37)[:, None].expand_as(rows))
    ends = plan.offsets_E[routes.experts_NK]
    starts = torch.cat((torch.zeros(1), plan.offsets_E[:-1]))[routes.experts_NK]
    assert ((rows >= starts) & (rows < ends)).all()
    assert (plan.offsets_E % alignment == 0).all()
    assert int(plan.offsets_E[-1]) <= len(plan.token_of_row_R)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    layer = biased_layer(BASE)
    x = torch.randn(2, 16, BASE.dim).to(dtype)
    layer.load_state_dict({name: value.to(dtype).float() for name, value in layer.state_dict().items()})
    expected = layer(x.float())
    output = layer.to(dtype)(x)
    assert output.dtype == dtype
    assert (output.float() - expected).norm() < 0.02 * expected.norm()


def test_load_counts_only_while_training_and_enabled() -> None:
    layer = MoELayer(BASE, load_layer=1)
    load = layer.router.expert_load = ExpertLoad(n_layers=2, n_experts=16)
    x = torch.randn(1, 10, BASE.dim)
    load.begin_loop(2)
    layer(x)
    layer(x)
    with load.recomputing():
        layer(x)
    layer.eval()(x)
    layer.train()
    load.enabled = False
    layer(x)
    counts = load.take()
    assert counts.shape == (3, 2, 16)
    assert counts.dtype == torch.int64
    assert counts[2, 1].sum() == counts.sum() == 2 * 10 * BASE.n_experts_per_tok
    assert load.take().shape == (0, 2, 16)
