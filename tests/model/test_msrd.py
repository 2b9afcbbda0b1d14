import math

import pytest
import torch
from amplified import amplified

from model import IceConfig, IceModel
from model.depth import DepthPlan
from model.loop import LoopedCore

CONFIG = IceConfig(msrd_scales=(1, 2, 4), recurrent_layers=2, qk_norm=True).scaled_down()


def lively(config: IceConfig) -> IceModel:
    return amplified(config, uneven=("fusion",))


def captured_core_call(model: IceModel, ids: torch.Tensor, **kwargs: object) -> dict:
    seen: dict = {"runs": []}
    model.core.register_forward_hook(lambda module, args, output: seen.update(args=args, output=output))
    for core in model.core.scales:
        core.register_forward_hook(lambda module, args, output: seen["runs"].append((args[2].n_loops, output)))
    seen["result"] = model(ids, return_output=True, **kwargs)
    return seen


@pytest.mark.parametrize("n_loops", [1, 3, 8, 9])
def test_each_scale_runs_its_share_of_the_loops_from_the_same_input(n_loops: int) -> None:
    model = lively(CONFIG).eval()
    ids = torch.randint(0, CONFIG.vocab_size, (2, 10))
    seen = captured_core_call(model, ids, n_loops=n_loops)
    assert [loops for loops, _ in seen["runs"]] == [max(1, math.ceil(n_loops / s)) for s in (1, 2, 4)]
    e, context, _ = seen["args"]
    for core, (loops, output) in zip(model.core.scales, list(seen["runs"]), strict=True):
        assert torch.equal(core(e, context, DepthPlan(loops)).h_BSD, output.h_BSD)


def test_fusion_is_a_softmax_over_scales_for_each_token() -> None:
    model = lively(CONFIG).eval()
    ids = torch.randint(0, CONFIG.vocab_size, (2, 10))
    seen = captured_core_call(model, ids, n_loops=6)
    e, fusion = seen["args"][0].double(), model.core.fusion
    states = [output.h_BSD.double() for _, output in seen["runs"]]
    for b in range(2):
        for s in range(10):
            scores = []
            for k, state in enumerate(states):
                h = state[b, s]
                normed = h / (h.pow(2).mean() + CONFIG.norm_eps).sqrt() * fusion.norm.weight.double()
                score = normed @ fusion.state_weight[k].double() + e[b, s] @ fusion.input_weight[k].double()
                scores.append(score + fusion.bias[k].double())
            gates = torch.stack(scores).softmax(0)
            expected = sum(gate * state[b, s] for gate, state in zip(gates, states, strict=True))
            torch.testing.assert_close(seen["output"].h_BSD[b, s].double(), expected, atol=1e-5, rtol=1e-4)


def test_starts_as_the_mean_of_the_scales() -> None:
    model = IceModel(CONFIG).eval()
    seen = captured_core_call(model, torch.randint(0, 256, (1, 7)), n_loops=4)
    mean = torch.stack([output.h_BSD for _, output in seen["runs"]]).mean(0)
    torch.testing.assert_close(seen["output"].h_BSD, mean)


def test_each_sequence_has_its_own_depth_at_every_scale() -> None:
    model = lively(CONFIG)
    ids = torch.randint(0, CONFIG.vocab_size, (4, 9))
    depths = torch.tensor([1, 6, 3, 5])
    together = model(ids, n_loops=6, sequence_loops=depths)
    for row, depth in enumerate(depths.tolist()):
        alone = model(ids[row : row + 1], n_loops=depth)
        torch.testing.assert_close(together[row : row + 1], alone, atol=2e-5, rtol=1e-4)


def test_loads_of_all_scales_are_counted_in_their_own_rows() -> None:
    model = IceModel(CONFIG)
    model(torch.randint(0, 256, (2, 8)), n_loops=5)
    load = model.core.expert_load.take()
    assert load.shape == (5, 3 * 2, CONFIG.n_experts)
    per_choice = 2 * 8 * CONFIG.n_experts_per_tok
    runs = torch.tensor([[loop < math.ceil(5 / s) for s in (1, 1, 2, 2, 4, 4)] for loop in range(5)])
    assert torch.equal(load.sum(-1), runs * per_choice)


def test_states_read_on_the_way_are_those_of_a_shallower_model() -> None:
    for config in (CONFIG, IceConfig(act=True).scaled_down(), IceConfig(recurrent_layers=2).scaled_down()):
        model = lively(config).eval()
        ids = torch.randint(0, 256, (2, 9))
        output = model(ids, 6, read_loops=(1, 4), return_output=True)
        for index, depth in enumerate((1, 4)):
            torch.testing.assert_close(output.read_logits_NBSV[index], model(ids, depth), atol=2e-5, rtol=1e-4)
        assert output.states_NBSD.shape == (3, 2, 9, config.dim)
        torch.testing.assert_close(output.logits, model(ids, 6), atol=0, rtol=0)


def test_one_scale_is_a_single_core_without_fusion() -> None:
    model = IceModel(IceConfig(msrd_scales=(1,)).scaled_down())
    assert isinstance(model.core, LoopedCore)
    assert not any("fusion" in name for name, _ in model.named_parameters())


def test_spectral_radius_is_the_largest_of_all_scales() -> None:
    model = IceModel(CONFIG)
    torch.nn.init.constant_(model.core.scales[2].injection.log_A, -5.0)
    radii = [core.injection.decay().max().item() for core in model.core.scales]
    assert model.get_spectral_radius() == max(radii) == radii[2] > radii[0]
