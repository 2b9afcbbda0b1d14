"""The families beside Ice: Apex, RR-SLM and the plain core, against float64 references and by their properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from amplified import amplified
from family_reference import apex, refine
from pydantic import ValidationError

from model import ApexModel, IceConfig, IceModel, RefinementController, apex_base, apex_small, rrslm_1_5m, rrslm_800m
from model.apex_core import ScoreSchedule
from model.calibration import Calibration, brier_score, expected_calibration_error, fit_calibration
from model.generation import Adaptive
from model.loop import LoopedCore
from model.parameters import count_parameters
from model.spiral_memory import SpiralMemory
from pretrain.losses import refinement_terms


def small(core: str, **fields: Any) -> IceConfig:
    base = {"core": core, "n_experts": 0, "recurrent_layers": 2, "memory_slots": 3, "max_loop_iters": 3}
    return IceConfig.model_validate(base | fields).scaled_down()


FAMILIES = {
    "apex": small("apex", sliding_window=128, full_attention_every=4, coda_layers=0, n_kv_heads=2),
    "refine": small("refine", qk_norm=True, convergence_eps=0.25),
    "plain": small("plain"),
}


def ids_for(config: IceConfig, batch: int = 2, length: int = 14) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length))


def captured_core(model: IceModel, ids: torch.Tensor, n_loops: int) -> tuple[torch.Tensor, Any]:
    """What the core was given and what it gave, in float64."""
    seen: dict[str, Any] = {}
    model.core.register_forward_hook(lambda module, args, output: seen.update(e=args[0], output=output))
    with torch.no_grad():
        model.double()(ids, n_loops)
    return seen["e"], seen["output"]


def test_refinement_is_the_formula() -> None:
    config = FAMILIES["refine"]
    model = amplified(config, uneven=("gate_bias",)).eval()
    e, output = captured_core(model, ids_for(config), 5)
    for row in range(len(e)):
        expected, given = refine(model.core, e[row], config, 5)
        torch.testing.assert_close(output.h_BSD[row], expected, atol=2e-5, rtol=2e-5)
        assert output.loops_used_BS[row].tolist() == given
    assert output.loops_used_BS.unique().numel() > 1, "positions must differ for the count to be tested"


def test_apex_is_the_formula() -> None:
    config = FAMILIES["apex"]
    model = amplified(config, uneven=("score_weight", "slot_shift", "rate_logit", "gate_bias")).eval()
    e, output = captured_core(model, ids_for(config), 3)
    for row in range(len(e)):
        read, logits, inconsistency = apex(model.core, e[row], config, 3)
        torch.testing.assert_close(output.h_BSD[row], read, atol=5e-5, rtol=5e-5)
        judged, hoped = output.refinement.judged_TBS2[:, row], output.refinement.hoped_TBS[:, row]
        torch.testing.assert_close(judged.double(), logits, atol=5e-5, rtol=5e-5)
        torch.testing.assert_close(hoped, judged[..., 0])
        torch.testing.assert_close(output.refinement.consistency_BS[row].double(), inconsistency, atol=5e-5, rtol=5e-5)


def test_one_plain_loop_is_a_transformer() -> None:
    config = FAMILIES["plain"]
    model = amplified(config).eval()
    e, output = captured_core(model, ids_for(config), 1)
    from model.attention import SequenceContext, rope_tables

    context = SequenceContext(rope_tables(config, 0, e.shape[1], e.device))
    x = e
    for layer, block in enumerate(model.core.blocks):
        attended = x + block.attention(block.attention_norm(x), context.site("core", layer))[0]
        x = attended + block.ffn(block.ffn_norm(attended))
    torch.testing.assert_close(output.h_BSD, x, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_position_sees_a_later_token(family: str) -> None:
    config = FAMILIES[family]
    model = amplified(config, uneven=("gate_bias", "slot_shift", "score_weight")).double().eval()
    ids = ids_for(config)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    depths = (1, 2, 3)
    with torch.no_grad():
        one, other = (model(each, 3, read_loops=depths, return_output=True) for each in (ids, changed))
    before = slice(0, 9)
    assert torch.equal(one.logits[:, before], other.logits[:, before])
    assert torch.equal(one.read_logits_NBSV[:, :, before], other.read_logits_NBSV[:, :, before])
    assert not torch.equal(one.logits[:, 9:], other.logits[:, 9:])
    if one.refinement is not None:
        assert torch.equal(one.refinement.judged_TBS2[:, :, before], other.refinement.judged_TBS2[:, :, before])
        assert not torch.equal(one.refinement.judged_TBS2[:, :, 10:], other.refinement.judged_TBS2[:, :, 10:])
    if one.loops_used_BS is not None:
        assert torch.equal(one.loops_used_BS[:, before], other.loops_used_BS[:, before])


def all_gradients(model: IceModel, ids: torch.Tensor, n_loops: int) -> dict[str, torch.Tensor]:
    """Gradients of everything the output can be trained by."""
    model.zero_grad()
    probe = {"probe_loop": 1} if model.config.core == "apex" else {}
    targets = ids[:, 1:]
    output = model(ids[:, :-1], n_loops, targets=targets, return_output=True, **probe)
    loss = output.losses_BS.mean()
    if output.refinement is not None:
        terms = refinement_terms(output.refinement, output.step_probe, targets, 0.0)
        loss = loss + terms["verification_loss"] + terms["verifier_loss"] + terms["consistency_loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns_and_recomputation_changes_no_bit(family: str) -> None:
    config = FAMILIES[family]
    model = amplified(config, uneven=("gate_bias", "slot_shift", "score_weight"))
    ids = ids_for(config)
    stored = all_gradients(model, ids, 4)
    assert stored.keys() == {"loss", *(name for name, _ in model.named_parameters())}
    assert all((gradient != 0).any() for gradient in stored.values())
    for policy, offload in (("loop", False), ("sqrt", False), ("routes", True)):
        model.set_remat(policy, offload=offload)  # type: ignore[arg-type]
        recomputed = all_gradients(model, ids, 4)
        assert all(torch.equal(stored[name], recomputed[name]) for name in stored), policy


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_through_a_cache_is_the_whole_forward(family: str) -> None:
    config = FAMILIES[family]
    model = amplified(config, logits=True, uneven=("gate_bias", "slot_shift", "score_weight")).double().eval()
    ids = ids_for(config, length=5)
    written = model.generate(ids, 12, 3, temperature=0.0)
    with torch.no_grad():
        expected = model(written[:, :-1], 3).argmax(-1)[:, 4:]
    assert torch.equal(written[:, 5:], expected)


def count_steps(model: IceModel) -> list[int]:
    """Which loops the core runs from now on."""
    core, loops = model.core, []
    assert isinstance(core, LoopedCore)
    step = core._step

    def counted(*args: Any) -> Any:
        loops.append(args[-1])
        return step(*args)

    core._step = counted  # type: ignore[method-assign]
    return loops


def test_refinement_ends_early_only_where_nobody_waits_and_with_the_same_result() -> None:
    model = amplified(small("refine", convergence_eps=0.9))
    ids = ids_for(model.config)
    loops = count_steps(model)
    trained = model(ids, 30)
    assert loops == list(range(30))
    model.eval()
    with torch.enable_grad():
        model(ids, 30)
    assert len(loops) == 60
    with torch.no_grad():
        evaluated = model(ids, 30)
    assert len(loops) < 75
    assert torch.equal(trained, evaluated)


def test_no_eps_no_convergence() -> None:
    model = amplified(small("refine")).eval()
    with torch.no_grad():
        output = model(ids_for(model.config), 7, return_output=True)
    assert (output.loops_used_BS == 7).all()


def test_only_measured_correctness_moves_the_verifier() -> None:
    """Else a verifier that always says 1 would win the term that asks for high scores."""
    config = FAMILIES["apex"]
    model = amplified(config, uneven=("score_weight",))
    ids = ids_for(config)
    targets = ids[:, 1:]
    output = model(ids[:, :-1], 3, targets=targets, probe_loop=2, return_output=True)
    terms = refinement_terms(output.refinement, output.step_probe, targets, 0.0)
    of_verifier = [p for name, p in model.named_parameters() if "verifier" in name]
    others = [p for name, p in model.named_parameters() if "verifier" not in name]

    def moved(loss: torch.Tensor, parameters: list[Any]) -> bool:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients)

    rest = output.losses_BS.mean() + terms["verification_loss"] + terms["consistency_loss"]
    assert not moved(rest, of_verifier)
    assert moved(terms["verification_loss"], others)
    assert moved(terms["verifier_loss"], of_verifier)
    assert not moved(terms["verifier_loss"], others)


def test_refinement_terms_are_the_formulas_over_counted_tokens() -> None:
    config = FAMILIES["apex"]
    model = amplified(config).eval()
    ids = ids_for(config)
    targets = ids[:, 1:].clone()
    targets[0, 3:7] = -100
    output = model(ids[:, :-1], 3, targets=targets, probe_loop=1, read_loops=(1, 2), return_output=True)
    terms = refinement_terms(output.refinement, output.step_probe, targets, 0.02)
    counted = targets != -100
    losses = [
        F.cross_entropy(each.flatten(0, 1), targets.flatten(), reduction="none") for each in output.read_logits_NBSV
    ]
    right = [(each.argmax(-1) == targets)[counted].float() for each in output.read_logits_NBSV]
    first, second = (each.view_as(targets)[counted] for each in losses)
    judged = output.refinement.judged_TBS2[:, counted]
    correctness = [F.binary_cross_entropy(judged[step, :, 0].sigmoid(), right[step]) for step in (0, 1)]
    benefit = F.binary_cross_entropy(judged[0, :, 1].sigmoid(), (first - second > 0.02).float())
    torch.testing.assert_close(terms["verifier_loss"], sum(correctness) / 2 + benefit)
    verification = -output.refinement.hoped_TBS[:, counted].sigmoid().log().mean()
    torch.testing.assert_close(terms["verification_loss"], verification)
    torch.testing.assert_close(terms["consistency_loss"], output.refinement.consistency_BS[counted].mean())
    brier = torch.stack([(judged[step, :, 0].sigmoid() - right[step]) ** 2 for step in (0, 1)]).mean()
    torch.testing.assert_close(terms["verifier_brier"], brier)


def test_slots_wind_at_their_own_speed_and_stay_bounded() -> None:
    config = FAMILIES["apex"]
    memory = SpiralMemory(config)
    parts = [torch.randn(2, 5, config.dim) for _ in range(4)]
    slots = start = memory.start(parts[0])
    sizes = []
    invariant = parts[3]
    for _ in range(200):
        slots, invariant = memory(slots, *parts[:3], torch.ones(2, 5), invariant)
        sizes.append(slots.abs().max().item())
    assert max(sizes) < 1.1 * max(start.abs().max().item(), 10.0)
    once, _ = memory(start, *parts[:3], torch.ones(2, 5), parts[3])
    moved = (once - start).norm(dim=-1).mean(dim=(0, 1)) / (slots - start).norm(dim=-1).mean(dim=(0, 1))
    assert moved.tolist() == sorted(moved.tolist(), reverse=True)
    torch.testing.assert_close(invariant, parts[2], atol=1e-3, rtol=1e-3)  # what all steps agree on


def test_steps_follow_the_score() -> None:
    model = ApexModel(FAMILIES["apex"]).eval()
    ids = ids_for(model.config, length=6)
    loops = count_steps(model)
    for threshold, steps in ((0.0, 1), (1.0, 3)):
        loops.clear()
        model.generate(ids, 4, 3, temperature=0.0, decoding=Adaptive(threshold))
        assert loops == [*range(3), *(list(range(steps)) * 3)], threshold  # the prompt is read at full depth
    torch.nn.init.constant_(model.core.verifier.output_bias, -3.0)
    loops.clear()
    model.generate(ids, 2, 3, temperature=0.0, decoding=Adaptive(0.9, gain_threshold=0.5))
    assert loops == [0, 1, 2, 0], "a low score, and no step promises anything"


def test_a_batch_given_steps_by_score_writes_what_each_sequence_would_alone() -> None:
    model = amplified(FAMILIES["apex"], logits=True, uneven=("output_weight",)).double().eval()
    ids = ids_for(model.config, batch=3, length=6)
    decoding = Adaptive(0.5)
    together = model.generate(ids, 8, 3, temperature=0.0, decoding=decoding)
    alone = [model.generate(row.unsqueeze(0), 8, 3, temperature=0.0, decoding=decoding) for row in ids]
    assert torch.equal(together, torch.cat(alone))


def test_the_controller_shows_every_step() -> None:
    model = ApexModel(FAMILIES["apex"])
    ids = ids_for(model.config, length=6)
    result, scores, history = RefinementController(model, threshold=1.0).run(ids, max_new_tokens=5)
    assert result.shape == (2, 11)
    assert torch.equal(result[:, :6], ids)
    assert [record.step for record in history] == [1, 2, 3]
    assert [score.item() for score in scores] == [pytest.approx(r.scores_BS.mean().item()) for r in history]
    assert all((record.scores_BS >= 0).all() and (record.scores_BS <= 1).all() for record in history)
    assert torch.equal(history[-1].next_ids_BS[:, 5:-1], result[:, 6:]), "the last step's words are the result"
    assert model.training
    sure = RefinementController(model, calibration=Calibration(0.0, 9.0)).run(ids[0], max_new_tokens=1)
    assert sure.scores[0] > 0.99
    with pytest.raises(ValueError, match="core = plain: only core = apex"):
        RefinementController(IceModel(FAMILIES["plain"]))
    with pytest.raises(ValueError, match="threshold = 2"):
        ScoreSchedule(2)


def test_calibration_finds_what_bent_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    true_logits = 2 * torch.randn(20_000, generator=generator)
    outcomes = torch.rand(20_000, generator=generator) < true_logits.sigmoid()
    stated = (true_logits - 0.7) / 0.4  # too sure, and shifted
    found = fit_calibration(stated, outcomes)
    assert found.scale == pytest.approx(0.4, abs=0.03)
    assert found.shift == pytest.approx(0.7, abs=0.05)
    assert expected_calibration_error(stated.sigmoid(), outcomes) > 0.1
    assert expected_calibration_error(found.apply(stated), outcomes) < 0.02
    assert brier_score(found.apply(stated), outcomes) < brier_score(stated.sigmoid(), outcomes)


def test_always_saying_one_is_as_wrong_as_the_error_rate() -> None:
    outcomes = torch.tensor([1, 1, 1, 0])
    assert brier_score(torch.ones(4), outcomes) == expected_calibration_error(torch.ones(4), outcomes) == 0.25
    all_right = fit_calibration(torch.tensor([0.1, 2.0]), torch.tensor([1, 1]))
    assert all(map(torch.isfinite, map(torch.tensor, all_right)))


def test_sizes_are_what_their_names_say() -> None:
    assert count_parameters(rrslm_1_5m()).total == pytest.approx(1.5e6, rel=0.05)
    assert count_parameters(rrslm_800m()).total == pytest.approx(800e6, rel=0.05)
    config = apex_small()
    stated = (config.dim, config.prelude_layers, config.recurrent_layers, config.n_heads, config.n_kv_heads)
    assert stated == (512, 2, 4, 8, 2)
    assert (config.sliding_window, config.max_loop_iters, config.vocab_size) == (128, 3, 32000)
    assert [config.window(layer) for layer in range(8)] == [128, 128, 128, None] * 2
    assert count_parameters(apex_base()).total > 3 * count_parameters(config).total


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"core": "apex", "msrd_scales": [1, 2]}, r"msrd_scales = \(1, 2\): only core = ice has it, not core = apex"),
        ({"core": "refine", "act": True}, "act = True: only core = ice has it"),
        ({"core": "plain", "lora_rank": 4}, "lora_rank = 4: only core = ice"),
        ({"core": "apex", "attn_type": "mla"}, "attn_type = mla: core = apex reads its memory with grouped heads"),
        ({"core": "apex", "sandwich_norm": True}, "sandwich_norm = true: core = apex has none"),
        ({"convergence_eps": 0.1}, "convergence_eps = 0.1: only core = refine"),
    ],
)
def test_what_a_family_does_not_have_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        IceConfig.model_validate(fields)


def test_apex_model_is_apex() -> None:
    with pytest.raises(ValueError, match="core = ice: ApexModel needs core = apex"):
        ApexModel(IceConfig().scaled_down())
    with pytest.raises(ValueError, match="dim: give a configuration or fields, not both"):
        ApexModel(FAMILIES["apex"], dim=64)
    with torch.device("meta"):
        assert ApexModel(max_loop_iters=5).config == apex_small(max_loop_iters=5)
