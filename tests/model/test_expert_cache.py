"""AEC against a loop over tokens that states the rule in float64 and keeps its state wherever it likes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from amplified import amplified
from pydantic import ValidationError
from slow_reference import naive_route
from torch import nn

from model import IceConfig, IceModel
from model.attention import Cache
from model.expert_cache import ExpertCache
from model.expert_parallel import routed_output
from model.moe import MoELayer, Routes, plan_dispatch

PERMISSIVE = {"aec": True, "aec_confidence": 0.0, "aec_drift": 1e9, "aec_max_age": 1000}
SMALL = IceConfig(recurrent_layers=2, max_loop_iters=4).scaled_down()
T = 7


def with_fields(config: IceConfig, **fields: object) -> IceConfig:
    return IceConfig.model_validate(config.model_dump() | fields)


class NaiveCache:
    """The rule, one token at a time. ``reasons`` counts the tokens that exactly one condition kept from a reuse."""

    def __init__(self, config: IceConfig) -> None:
        self.config = config
        self.reasons: Counter[str] = Counter()
        self.computed = self.seen = 0

    def routed(self, layer: MoELayer, x: torch.Tensor, chosen: dict[int, float]) -> torch.Tensor:
        scores = self.scores(layer, x)
        total = sum(scores[expert] for expert in chosen) if self.config.route_norm else 1.0
        out = torch.zeros_like(x)
        for expert in chosen:
            gate, up = (layer.experts.gate_up_proj[expert].double() @ x).chunk(2)
            gated = layer.experts.down_proj[expert].double() @ (F.silu(gate) * up)
            out = out + self.config.route_scale * scores[expert] / total * gated
        return out

    def scores(self, layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
        logits = layer.router.weight.double() @ x
        return logits.sigmoid() if self.config.score_func == "sigmoid" else logits.softmax(-1)

    def __call__(
        self, layer: MoELayer, x_BSD: torch.Tensor, loop: int, carry: object
    ) -> tuple[torch.Tensor, tuple[()]]:
        config, rows = self.config, []
        if loop == 0:
            self.cached: dict[int, tuple[torch.Tensor, torch.Tensor, set[int], int]] = {}
            self.computed = self.seen = 0
        for token, x in enumerate(x_BSD.flatten(0, 1).double()):
            scores = self.scores(layer, x).detach()
            chosen = naive_route(
                scores,
                layer.router.e_score_correction_bias.double(),
                config.n_experts_per_tok,
                config.moe_n_groups,
                config.moe_topk_groups,
                config.route_norm,
                config.route_scale,
            )
            total = float(sum(scores[expert] for expert in chosen))
            confidence = total / len(chosen) if config.score_func == "sigmoid" else total
            broken = ["nothing cached"] * 2
            if token in self.cached:
                _, x_then, experts_then, loop_then = self.cached[token]
                conditions = {
                    "confidence": confidence > config.aec_confidence,
                    "experts": set(chosen) == experts_then,
                    "drift": float((x.detach() - x_then).norm()) < config.aec_drift * float(x_then.norm()),
                    "age": loop - loop_then <= config.aec_max_age,
                }
                broken = [name for name, holds in conditions.items() if not holds]
                if len(broken) == 1:
                    self.reasons.update(broken)
            if broken:
                self.cached[token] = (self.routed(layer, x, chosen), x.detach(), set(chosen), loop)
                self.computed += 1
            self.seen += 1
            rows.append(self.cached[token][0])
        out = torch.stack(rows).to(x_BSD.dtype).view_as(x_BSD)
        return (out + layer.shared_experts(x_BSD) if layer.has_shared_experts else out), ()

    def computed_share(self, carry: object) -> torch.Tensor:
        return torch.tensor(self.computed / self.seen)


def drifting_inputs(config: IceConfig, batch: int = 2, length: int = 24) -> list[torch.Tensor]:
    """T inputs whose tokens move between loops by a share of their length: 1e-3 for the first to 1 for the last."""
    moves = torch.logspace(-3, 0, batch * length).view(batch, length, 1)
    x = torch.randn(batch, length, config.dim)
    inputs = []
    for _ in range(T):
        inputs.append(x.clone().requires_grad_())
        x = x + moves * torch.randn_like(x)
    return inputs


def run(
    cache: ExpertCache | NaiveCache, layer: nn.Module, inputs: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, carry = [], ()
    for loop, x_BSD in enumerate(inputs):
        output, carry = cache(layer, x_BSD, loop, carry)
        outputs.append(output)
    return torch.stack(outputs), cache.computed_share(carry)


CASES = {
    "sigmoid": {"aec_confidence": 0.6, "aec_drift": 0.3},
    "sigmoid_without_shared": {"aec_confidence": 0.6, "aec_drift": 0.5, "n_shared_experts": 0},
    "softmax": {"score_func": "softmax", "aec_confidence": 0.4, "aec_drift": 0.3, "route_norm": False},
    "grouped": {"moe_n_groups": 4, "moe_topk_groups": 2, "aec_confidence": 0.55, "aec_drift": 0.4, "route_scale": 2.5},
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_share_and_gradients_match_a_loop_over_tokens(case: str) -> None:
    config = with_fields(SMALL, aec=True, aec_max_age=2, **CASES[case])
    layer = MoELayer(config)
    layer.router.weight.data.mul_(1.5)
    layer.router.e_score_correction_bias.uniform_(-0.1, 0.1)
    inputs = drifting_inputs(config)
    naive = NaiveCache(config)
    leaves = [*inputs, *layer.parameters()]

    actual, share = run(ExpertCache(config), layer, inputs)
    expected, expected_share = run(naive, layer, inputs)

    assert naive.reasons.keys() == {"confidence", "experts", "drift", "age"}, "a condition was never put to the test"
    assert 0.3 < float(share) < 0.9
    torch.testing.assert_close(share, expected_share)
    assert not share.requires_grad
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    direction = torch.randn_like(actual)
    for ours, theirs in zip(
        torch.autograd.grad((actual * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


class Float64Layer(nn.Module):
    """A stand-in for AutoEP's layer: its names, its habit of adding the shared experts, float64, dense experts."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        self.router = nn.Module()
        self.router.gate = nn.Linear(config.dim, config.n_experts, bias=False, dtype=torch.float64)
        self.router.register_buffer("e_score_correction_bias", torch.zeros(config.n_experts))
        shape = (config.n_experts, config.dim, config.dim)
        self.experts = nn.ParameterList([torch.randn(shape, dtype=torch.float64) / config.dim**0.5])
        self.shared_experts = nn.Linear(config.dim, config.dim, bias=False, dtype=torch.float64)
        self.top_k = config.n_experts_per_tok
        self.inputs: list[torch.Tensor] = []

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x_BSD)
        scores = self.router.gate(x_BSD).sigmoid()
        gates = scores * (scores >= scores.topk(self.top_k, dim=-1).values[..., -1:]).detach()
        out = torch.einsum("bse,edf,bsd->bsf", gates, self.experts[0], x_BSD).tanh()
        return out if self.shared_experts is None else out + self.shared_experts(x_BSD)


TINY = with_fields(SMALL, dim=8, n_experts=4, aec=True, aec_confidence=0.55, aec_drift=0.5, aec_max_age=2)


def test_gradients_through_reused_outputs_are_finite_differences() -> None:
    layer, cache = Float64Layer(TINY), ExpertCache(TINY)
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)

    def loops(x_BSD: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        """Each loop's input depends on the outputs before it, as in the model."""
        carry, state, outputs = (), x_BSD, []
        for loop in range(3):
            out, carry = cache(layer, state, loop, carry)
            state = state + 0.3 * out
            outputs.append(out)
        assert 0.4 < float(cache.computed_share(carry)) < 0.9
        return torch.stack(outputs)

    assert torch.autograd.gradcheck(loops, (x, *layer.parameters()), eps=1e-6, atol=1e-6)


def test_a_reused_output_is_the_same_tensor_and_its_gradient_goes_to_the_loop_that_computed_it() -> None:
    config = with_fields(SMALL, **PERMISSIVE, n_shared_experts=0)
    layer, cache = MoELayer(config), ExpertCache(config)
    layer.router.e_score_correction_bias[:2] = 10.0
    first, second = (torch.randn(1, 5, config.dim, requires_grad=True) for _ in range(2))
    output, carry = cache(layer, first, 0, ())
    reused, _ = cache(layer, second, 1, carry)
    assert torch.equal(reused, output)
    direction = torch.randn_like(reused)
    to_first, to_second = torch.autograd.grad((reused * direction).sum(), (first, second), retain_graph=True)
    assert torch.equal(to_first, torch.autograd.grad((output * direction).sum(), first)[0])
    assert not to_second.any()


@pytest.mark.parametrize("reusable", [0, 3], ids=["nothing_is_reused", "everything_is_reused"])
def test_the_layer_is_called_once_a_loop_in_one_graph_whatever_there_is_to_compute(reusable: int) -> None:
    """Under expert parallelism each call is a fixed number of collectives, forward and backward."""
    config = with_fields(TINY, **PERMISSIVE | {"aec_drift": 1e9 if reusable else 0.0})
    layer, cache = Float64Layer(config), ExpertCache(config)
    layer.router.e_score_correction_bias[:2] = 10.0
    x, carry = torch.rand(1, 5, 8, dtype=torch.float64, requires_grad=True), ()
    backwards: list[torch.Size] = []
    for loop in range(4):
        _, carry = cache(layer, x * (1 + loop), loop, carry)
        layer.inputs[loop].register_hook(lambda grad: backwards.append(grad.shape))
    expected = [(1, 5, 8), *[(1, 0 if reusable else 5, 8)] * 3]
    assert [tuple(given.shape) for given in layer.inputs] == expected
    assert all(given.requires_grad for given in layer.inputs)
    carry[0].sum().backward()
    assert sorted(map(tuple, backwards)) == sorted(expected)


def test_the_seam_gives_the_shared_experts_back_also_after_an_error() -> None:
    layer = Float64Layer(TINY)
    shared, names = layer.shared_experts, list(layer.state_dict())
    with pytest.raises(RuntimeError):
        routed_output(layer, torch.randn(3, 5, dtype=torch.float64))
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(routed_output(layer, x), (layer(x[None]) - shared(x[None]))[0])
    assert layer.shared_experts is shared
    assert list(layer.state_dict()) == names


@pytest.mark.parametrize("row_alignment", [1, 8])
def test_the_plain_layer_takes_no_tokens_and_gives_every_parameter_a_zero_gradient(
    row_alignment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.moe.row_alignment", lambda device, dtype: row_alignment)
    layer = MoELayer(SMALL)
    x = torch.randn(4, SMALL.dim, requires_grad=True)
    output = layer.routed(x[:0])
    assert output.shape == (0, SMALL.dim)
    output.sum().backward()
    assert not x.grad.any()
    for parameter in (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        assert not parameter.grad.any()


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_few_tokens_fit_in_the_rows_of_their_experts_and_need_no_rows_for_the_others(tokens: int) -> None:
    experts_NK = torch.arange(2 * tokens).view(tokens, 2)  # the worst case: every choice in a group of its own
    routes = Routes(torch.ones(tokens, 2), experts_NK, torch.bincount(experts_NK.flatten(), minlength=64))
    plan = plan_dispatch(routes, 8)
    assert plan.row_of_choice_NK.flatten().tolist() == list(range(0, 16 * tokens, 8))
    assert int(plan.offsets_E[-1]) == len(plan.token_of_row_R) == 16 * tokens


def test_an_input_that_did_not_move_at_all_is_computed_with_a_drift_of_zero() -> None:
    config = with_fields(SMALL, **PERMISSIVE | {"aec_drift": 0.0})
    x = torch.randn(1, 4, config.dim)
    _, share = run(ExpertCache(config), MoELayer(config), [x, x])
    assert share == 1


# ---- inside the model


def lively(config: IceConfig) -> IceModel:
    """Updates as large as the state, and a router that is sure of itself more often."""
    model = amplified(config)
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            parameter.data.mul_(2)
    return model


def ids_for(config: IceConfig, batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length))


def gradients(model: IceModel, ids: torch.Tensor, **kwargs: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(ids[:, :-1], return_output=True, **kwargs)
    loss = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach(), "logits": output.logits.detach(), "share": output.expert_share}


MODELS = {
    "gqa": with_fields(SMALL, aec=True, aec_confidence=0.6, aec_drift=0.45, aec_max_age=2),
    "mla_softmax_sandwich": with_fields(
        SMALL,
        attn_type="mla",
        score_func="softmax",
        sandwich_norm=True,
        aec=True,
        aec_confidence=0.3,
        aec_drift=0.6,
        aec_max_age=2,
    ),
    "multi_scale": with_fields(
        SMALL, msrd_scales=(1, 2), recurrent_layers=1, aec=True, aec_confidence=0.6, aec_drift=0.45, aec_max_age=1
    ),
}


@pytest.mark.parametrize("grad_loops", [None, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_matches_one_with_the_loop_over_tokens(name: str, grad_loops: int | None) -> None:
    config = MODELS[name]
    model = lively(config)
    ids = ids_for(config)
    actual = gradients(model, ids, n_loops=6, grad_loops=grad_loops)
    for module in model.modules():
        if isinstance(getattr(module, "expert_cache", None), ExpertCache):
            module.expert_cache = NaiveCache(config)
    expected = gradients(model, ids, n_loops=6, grad_loops=grad_loops)
    assert 0.3 < float(expected["share"]) < 0.95
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=2e-5, rtol=2e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_no_bit(name: str) -> None:
    config = MODELS[name]
    model = lively(config)
    ids = ids_for(config)
    for n_loops, grad_loops in ((1, None), (6, None), (6, 2)):
        stored = gradients(model, ids, n_loops=n_loops, grad_loops=grad_loops)
        stored_load = model.core.expert_load.take()
        model.set_remat("loop")
        recomputed = gradients(model, ids, n_loops=n_loops, grad_loops=grad_loops)
        model.set_remat("none")
        assert stored.keys() == recomputed.keys()
        assert all(torch.equal(stored[key], recomputed[key]) for key in stored)
        assert torch.equal(stored_load, model.core.expert_load.take())


@pytest.mark.parametrize(
    "never", [{"aec_confidence": 1.0}, {"aec_drift": 0.0}, {"aec_confidence": 1.0, "score_func": "softmax"}]
)
@pytest.mark.parametrize("shared_experts", [0, 1])
def test_thresholds_that_allow_no_reuse_change_no_bit(never: dict[str, object], shared_experts: int) -> None:
    # With as many experts chosen as there are, softmax probabilities add up to 1, give or take a rounding.
    structure = {"n_shared_experts": shared_experts, "n_experts_per_tok": 8 if "score_func" in never else 2}
    config = with_fields(SMALL, **PERMISSIVE | structure | never)
    plain = with_fields(config, aec=False)
    model, reference = lively(config), lively(plain)
    reference.load_state_dict(model.state_dict())
    ids = ids_for(config)
    actual, expected = (gradients(each, ids, n_loops=4) for each in (model, reference))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert actual["share"] == 1
    assert torch.equal(model.core.expert_load.take(), reference.core.expert_load.take())


def always_the_same_experts(config: IceConfig) -> IceModel:
    model = lively(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[[1, 4]] = 10.0
    return model


@pytest.mark.parametrize("max_age", [1, 2, 5])
def test_share_and_load_count_what_was_computed(max_age: int) -> None:
    config = with_fields(SMALL, **PERMISSIVE | {"aec_max_age": max_age})
    model = always_the_same_experts(config).train()
    output = model(ids_for(config, batch=3, length=5), n_loops=7, return_output=True)
    computing = [loop % (max_age + 1) == 0 for loop in range(7)]
    assert float(output.expert_share) == pytest.approx(sum(computing) / 7)
    load = model.core.expert_load.take()
    assert load.shape == (7, 2, 8)
    for loop, computes in enumerate(computing):
        assert load[loop].sum(-1).tolist() == [15 * 2 * computes] * 2


def test_a_backward_in_which_nothing_was_computed_still_reaches_every_parameter() -> None:
    """A rank that left a parameter out would leave the others waiting for it."""
    config = with_fields(SMALL, **PERMISSIVE)
    model = always_the_same_experts(config)
    for policy in ("none", "loop"):
        model.set_remat(policy)
        found = gradients(model, ids_for(config), n_loops=4, grad_loops=2)
        assert float(found["share"]) == pytest.approx(0.25)
        for name, _ in model.named_parameters():
            assert name in found
            routed = ".ffn.router." in name or ".ffn.experts." in name
            assert found[name].any() != routed, name


@pytest.mark.parametrize("name", MODELS)
def test_decoding_with_a_cache_is_the_full_forward(name: str) -> None:
    config = MODELS[name]
    model = lively(config).eval()
    ids = ids_for(config, length=14)
    with torch.no_grad():
        full = model(ids, n_loops=6, return_output=True)
        cache, pieces, shares = Cache(), [], []
        for piece in ids.split([6, 3, *[1] * 5], dim=1):
            output = model(piece, n_loops=6, cache=cache, return_output=True)
            pieces.append(output.logits)
            shares.append(float(output.expert_share) * piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), full.logits, atol=2e-5, rtol=1e-3)
    assert sum(shares) / 14 == pytest.approx(float(full.expert_share), abs=1e-6)
    assert 0.3 < float(full.expert_share) < 0.95


def test_a_trained_models_weights_fit_with_and_without() -> None:
    plain, cached = IceModel(SMALL), IceModel(with_fields(SMALL, **PERMISSIVE))
    assert list(plain.state_dict()) == list(cached.state_dict())
    assert IceModel(SMALL)(ids_for(SMALL), return_output=True).expert_share == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_trains(dtype: torch.dtype) -> None:
    model = lively(MODELS["gqa"]).to(dtype)
    found = gradients(model, ids_for(model.config), n_loops=4)
    assert found["logits"].dtype == dtype
    assert found["share"].dtype == torch.float32
    assert all(torch.isfinite(value).all() for value in found.values())


def test_what_is_not_a_number_is_computed_again() -> None:
    config = with_fields(SMALL, **PERMISSIVE)
    layer, cache = MoELayer(config), ExpertCache(config)
    layer.router.e_score_correction_bias[:2] = 10.0
    x = torch.randn(1, 4, config.dim)
    _, carry = cache(layer, x, 0, ())
    broken = x.clone()
    broken[0, 2, 0] = float("nan")
    _, carry = cache(layer, broken, 1, carry)
    assert float(cache.computed_share(carry)) == pytest.approx((4 + 1) / 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aec_confidence": 1.5}, "aec_confidence"),
        ({"aec_confidence": -0.1}, "aec_confidence"),
        ({"aec_drift": -0.1}, "aec_drift"),
        ({"aec_max_age": 0}, "aec_max_age"),
        ({"n_experts": 0}, "aec = true: n_experts = 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        with_fields(SMALL, **{"aec": True} | fields)
