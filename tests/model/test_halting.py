import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import IceConfig, IceModel
from model.halting import Halting

CONFIG = IceConfig(act=True).scaled_down()


def run(probabilities: list[float], threshold: float) -> tuple[list[float], float]:
    """The weights of one token whose halting probabilities are given, and its ponder cost."""
    halting = Halting(IceConfig(act=True, act_threshold=threshold).scaled_down())
    torch.nn.init.zeros_(halting.weight)
    halting.requires_grad_(False)
    state = halting.start(torch.zeros(1, 1, CONFIG.dim))
    weights, spent = [], 0.0
    for loop, probability in enumerate(probabilities):
        torch.nn.init.constant_(halting.bias, torch.logit(torch.tensor(probability, dtype=torch.float64)).item())
        # A state that is 1 only in channel `loop`, so that the mix shows each loop's weight.
        h = torch.zeros(1, 1, CONFIG.dim)
        h[..., loop] = 1
        state = halting(state, h, loop, loop == len(probabilities) - 1)
        weights.append(float(state.spent_BS) - spent)
        spent = float(state.spent_BS)
    torch.testing.assert_close(state.mixed_BSD[0, 0, : len(weights)], torch.tensor(weights), atol=1e-6, rtol=0)
    return weights, float(state.depth_BS)


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=20), st.floats(0.5, 1.0))
def test_weights_sum_to_one_and_follow_the_rule(probabilities: list[float], threshold: float) -> None:
    weights, depth = run(probabilities, threshold)
    assert sum(weights) == pytest.approx(1.0, abs=1e-6)
    assert min(weights) >= -1e-6
    assert 1 - 1e-5 <= depth <= len(probabilities) + 1e-4
    assert depth == pytest.approx(sum((t + 1) * w for t, w in enumerate(weights)), abs=1e-4)


def test_halting_by_hand() -> None:
    assert run([0.2, 0.3, 0.6, 0.9], 0.99) == (pytest.approx([0.2, 0.3, 0.5, 0.0], abs=1e-6), pytest.approx(2.3))
    assert run([0.1, 0.2, 0.1], 0.99) == (pytest.approx([0.1, 0.2, 0.7], abs=1e-6), pytest.approx(2.6))
    assert run([0.995, 0.5], 0.99) == (pytest.approx([1.0, 0.0], abs=1e-6), pytest.approx(1.0))


def test_ponder_cost_lies_between_one_and_the_depth_and_can_be_lowered() -> None:
    model = IceModel(CONFIG)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 8))
    cost = model(ids, n_loops=6, return_output=True).ponder_cost
    assert 1 < cost < 6
    cost.backward()
    for parameter in model.core.halting.parameters():
        parameter.data -= 1.0 * parameter.grad
    assert model(ids, n_loops=6, return_output=True).ponder_cost < cost


def test_one_loop_halts_at_once() -> None:
    model = IceModel(CONFIG)
    output = model(torch.randint(0, CONFIG.vocab_size, (2, 8)), n_loops=1, return_output=True)
    assert output.ponder_cost == 1
