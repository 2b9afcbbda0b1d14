"""SLU: depth heads, adaptive depth, and lossless speculative decoding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from amplified import amplified

from model import IceConfig, IceModel
from model.adaptive_depth import AdaptiveDepth
from model.attention import Cache
from model.generation import (
    FULL_DEPTH,
    Adaptive,
    Decoding,
    Generation,
    GenerationOptions,
    Prompts,
    Sampling,
    Speculative,
    generate,
)
from model.sampling import draw, probabilities
from model.speculation import DepthHeads
from model.speculative_decoding import Draft, settle

IDEAS: dict[str, dict[str, object]] = {
    "gqa": {"recurrent_layers": 2, "qk_norm": True},
    "mla": {"attn_type": "mla"},
    "moda_v2": {"attn_type": "moda_v2"},
    "msrd": {"msrd_scales": (1, 2)},
    "sandwich": {"sandwich_norm": True},
    "act": {"act": True},
    "window": {"sliding_window": 8, "full_attention_every": 2},
    "gated": {"kv_policy": "gated"},
    "lora_aec": {"lora_rank": 4, "aec": True},
}
CONFIGS = {name: IceConfig(slu=True, **fields).scaled_down() for name, fields in IDEAS.items()}
GREEDY = Sampling(temperature=0.0)


class FickleHeads(DepthHeads):
    """Heads whose opinion changes with every input, state and loop."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def propose(self, e_BSD: torch.Tensor, loops: Sequence[int]) -> torch.Tensor:
        return torch.stack([(3 * e_BSD.sum(dim=-1) + loop).sin() for loop in loops])

    def verify(self, e_BSD: torch.Tensor, h_BSD: torch.Tensor, loop: int) -> torch.Tensor:
        return (h_BSD[..., :4].sum(dim=-1) + 2 * loop).sin()


def lively(config: IceConfig) -> IceModel:
    """Updates and logits large enough that a wrong cache changes tokens, and heads by which depths differ."""
    torch.manual_seed(3)
    model = amplified(config, logits=True).eval()
    if config.slu:
        model.depth_heads = FickleHeads()
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> IceModel:
    return lively(CONFIGS[request.param])


def prompts_of(model: IceModel, *lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, model.config.vocab_size, (length,)) for length in lengths]


def continued(
    model: IceModel, prompts: Prompts, decoding: Decoding, new: int = 9, sampling: Sampling = GREEDY, **options: object
) -> Generation:
    return generate(model, prompts, GenerationOptions(new, sampling=sampling, decoding=decoding, **options))


# The heads


def test_heads_are_their_formula_at_any_depth() -> None:
    heads = DepthHeads(CONFIGS["gqa"]).double()
    e, h = torch.randn(2, 3, 64, dtype=torch.float64), torch.randn(2, 3, 64, dtype=torch.float64)
    for loop in (1, 7, 300):
        half = 16
        angles = [loop * 1000.0 ** -(i / half) for i in range(half)]
        phi = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
        normed = h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        for head, x, actual in zip(
            (heads.predictor, heads.verifier), (e, torch.cat((e, normed), dim=-1)), heads(e, h, loop), strict=True
        ):
            hidden = x @ head.input.weight.T + head.loops.weight @ phi + head.loops.bias
            expected = (hidden * hidden.sigmoid()) @ head.output.weight[0] + head.output.bias
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_heads_learn_which_tokens_gain_from_which_loop() -> None:
    heads = DepthHeads(CONFIGS["gqa"])
    optimizer = torch.optim.Adam(heads.parameters(), lr=5e-3)
    for step in range(100):
        e, h, loop = torch.randn(4, 32, 64), torch.randn(4, 32, 64), step % 4 + 1
        # The input alone says that a token with a positive first channel needs 3 loops; the state, which needs any.
        gains = torch.stack(((e[..., 0] > 0) & (loop < 3), h[..., 0] > 0)).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(heads(e, h, loop), gains)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.4
    probe = torch.randn(1, 64, 64)
    needy = probe[0, :, 0] > 0.5
    worth = heads.propose(probe, (1, 2, 4))[:, 0] > 0
    assert worth[:2, needy].float().mean() > 0.9
    assert worth[2].float().mean() < 0.1


# The controller


class TableHeads(DepthHeads):
    """Heads that say what a table says: probabilities (T - 1, B, S) of the predictor and of the verifier."""

    def __init__(self, proposals: torch.Tensor, verdicts: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.proposals, self.verdicts = proposals, verdicts

    def propose(self, e_BSD: torch.Tensor, loops: Sequence[int]) -> torch.Tensor:
        return self.proposals[[loop - 1 for loop in loops]].logit()

    def verify(self, e_BSD: torch.Tensor, h_BSD: torch.Tensor, loop: int) -> torch.Tensor:
        return self.verdicts[loop - 1].logit()


@pytest.mark.parametrize("n_loops", [1, 2, 6])
def test_a_token_runs_its_proposal_and_then_as_long_as_the_verifier_asks(n_loops: int) -> None:
    proposals, verdicts = torch.rand(2, 6, 3, 40).unbind()
    controller = AdaptiveDepth(TableHeads(proposals, verdicts), threshold=0.4)
    controller.start(torch.zeros(3, 40, 8), n_loops)
    for loop in range(1, n_loops):
        controller.continues(loop, torch.zeros(3, 40, 8))
    for row, token in itertools.product(range(3), range(40)):
        depth = 1
        while depth < n_loops and proposals[depth - 1, row, token] >= 0.4:
            depth += 1
        while depth < n_loops and verdicts[depth - 1, row, token] >= 0.4:
            depth += 1
        assert controller.loops_BS[row, token] == depth


def test_a_sequence_nobody_reads_any_more_holds_up_no_other() -> None:
    controller = AdaptiveDepth(TableHeads(torch.ones(3, 2, 1), torch.ones(3, 2, 1)), threshold=0.5)
    controller.ended_B = torch.tensor([True, False])
    controller.start(torch.zeros(2, 1, 8), 4)
    for loop in range(1, 4):
        controller.continues(loop, torch.zeros(2, 1, 8))
    assert controller.loops_BS.tolist() == [[1], [4]]


@torch.no_grad()
def test_a_tokens_logits_are_those_of_a_forward_of_its_own_depth(model: IceModel) -> None:
    ids = torch.randint(0, model.config.vocab_size, (24, 1))
    controller = AdaptiveDepth(model.depth_heads, threshold=0.5)
    logits = model(ids, 4, controller=controller)
    depths = controller.loops_BS[:, 0].tolist()
    assert len(set(depths)) > 1
    for row, depth in enumerate(depths):
        torch.testing.assert_close(logits[row], model(ids[row : row + 1], depth)[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("idea", ["gqa", "act"])
def test_the_verifier_sees_while_decoding_the_states_it_is_trained_on(idea: str) -> None:
    model = lively(CONFIGS[idea])
    seen: list[torch.Tensor] = []

    class Watching(AdaptiveDepth):
        def continues(self, loop: int, h_BSD: torch.Tensor) -> torch.Tensor:
            seen.append(h_BSD)
            return super().continues(loop, h_BSD)

    ids = torch.randint(0, model.config.vocab_size, (2, 5))
    model(ids, 4, controller=Watching(model.depth_heads, threshold=0.0))
    trained_on = model(ids, 4, read_loops=(1, 2, 3), return_output=True).states_NBSD[:3]
    torch.testing.assert_close(torch.stack(seen), trained_on)


@torch.no_grad()
@pytest.mark.parametrize("kv_policy", ["per_loop", "ring", "last"])
def test_in_skipped_loops_a_token_is_remembered_by_its_last_one(kv_policy: str) -> None:
    model = lively(CONFIGS["gqa"])
    ids = torch.randint(0, model.config.vocab_size, (8, 6))
    cache = Cache.for_model(model.config, kv_policy=kv_policy)
    model(ids[:, :5], 4, cache=cache)
    controller = AdaptiveDepth(model.depth_heads, threshold=0.5)
    model(ids[:, 5:], 4, cache=cache, controller=controller)
    assert len(set(controller.loops_BS[:, 0].tolist())) > 1
    cache.length -= 1  # what the latest forward appended is what a slot calls its newest rows
    for row, depth in enumerate(controller.loops_BS[:, 0].tolist()):
        # The sequence alone, at exactly that depth: loops 0 ... depth - 1 of the same token.
        alone = Cache.for_model(model.config)
        model(ids[row : row + 1, :5], 4, cache=alone)
        if kv_policy != "per_loop":
            alone = Cache.for_model(model.config, kv_policy=kv_policy)
            model(ids[row : row + 1, :5], 4, cache=alone)
        with_one_depth = AdaptiveDepth(TableHeads(torch.ones(3, 1, 1), torch.zeros(3, 1, 1)), 0.5)
        with_one_depth.heads.proposals[depth - 1 :] = 0
        model(ids[row : row + 1, 5:], 4, cache=alone, controller=with_one_depth)
        assert with_one_depth.loops_BS.tolist() == [[depth]]
        alone.length -= 1
        slots = {"per_loop": 4, "ring": model.config.kv_ring_size, "last": 1}[kv_policy]
        for layer, loop in itertools.product(range(2), range(slots)):
            together = cache.slot("core", layer, loop).newest(1)[0][row]
            torch.testing.assert_close(together, alone.slot("core", layer, loop).newest(1)[0][0], atol=1e-5, rtol=1e-4)
        if kv_policy == "per_loop":
            rows = [alone.slot("core", 0, loop).newest(1)[0] for loop in range(4)]
            assert all(torch.equal(rows[loop], rows[depth - 1]) for loop in range(depth, 4))
            assert not any(torch.equal(rows[loop], rows[depth - 1]) for loop in range(depth - 1))


def test_adaptive_batches_of_unequal_prompts_equal_each_prompt_alone(model: IceModel) -> None:
    prompts = prompts_of(model, 9, 4, 13)
    together = continued(model, prompts, Adaptive())
    for row, prompt in enumerate(prompts):
        alone = continued(model, [prompt], Adaptive())
        assert torch.equal(together.new_ids_BN[row], alone.new_ids_BN[0])
        assert torch.equal(together.loops_BN[row], alone.loops_BN[0])
    assert together.loops_BN[:, 0].tolist() == [4, 4, 4], "the prompt is read at full depth"
    assert len(together.loops_BN.unique()) > 1


def test_loops_reported_are_loops_run() -> None:
    model = lively(CONFIGS["gqa"])
    steps: list[int] = []
    model.core.step_embedding.register_forward_hook(lambda module, args, output: steps.append(args[0]))
    result = continued(model, prompts_of(model, 5), Adaptive())
    assert len(steps) == int(result.loops_BN.sum())
    assert result.statistics.mean_loops == pytest.approx(result.loops_BN.float().mean().item())


def test_a_threshold_of_zero_is_full_depth(model: IceModel) -> None:
    prompts = prompts_of(model, 7, 3)
    adaptive, full = (continued(model, prompts, decoding) for decoding in (Adaptive(0.0), FULL_DEPTH))
    assert torch.equal(adaptive.new_ids_BN, full.new_ids_BN)
    assert torch.equal(adaptive.loops_BN, full.loops_BN)


# Speculative decoding


def test_greedy_speculation_equals_full_depth_token_for_token(model: IceModel) -> None:
    prompts = prompts_of(model, 9, 4, 13)
    full = continued(model, prompts, FULL_DEPTH)
    for decoding in (Speculative(3, 1), Speculative(1, 2), Speculative(4, 3, threshold=0.5)):
        speculative = continued(model, prompts, decoding)
        assert torch.equal(speculative.new_ids_BN, full.new_ids_BN)
    alone = continued(model, prompts[:1], Speculative(3, 1))
    assert torch.equal(alone.new_ids_BN[0], full.new_ids_BN[0])


def test_some_drafts_are_accepted_and_some_are_not() -> None:
    """Otherwise the equalities above would say little."""
    rates = [
        continued(lively(CONFIGS[name]), [[1, 2, 3]], Speculative(3, 1), new=24).statistics.acceptance_rate
        for name in ("gqa", "mla", "msrd")
    ]
    assert all(rate is not None and 0.1 < rate < 0.95 for rate in rates)


def test_drafts_of_full_depth_are_all_accepted_and_save_passes() -> None:
    model = lively(CONFIGS["gqa"])
    result = continued(model, prompts_of(model, 9, 4), Speculative(4, draft_loops=4), new=16)
    statistics = result.statistics
    assert statistics.acceptance_rate == 1
    assert (statistics.passes, statistics.draft_passes) == (4, 12)  # the prompt's token, then 5 a round
    assert statistics.tokens_per_pass == 4


def test_speculation_reads_each_verified_token_once_at_full_depth() -> None:
    model = lively(CONFIGS["gqa"])
    read: list[tuple[int, int]] = []
    model.core.register_forward_pre_hook(
        lambda module, args: read.append((args[0].shape[1], args[2].n_loops))  # length, depth
    )
    result = continued(model, prompts_of(model, 9), Speculative(3, 1), new=20)
    deep = [length for length, depth in read if depth == 4]
    assert deep[0] == 9
    assert all(length <= 4 for length in deep[1:])
    assert all(length == 1 for length, depth in read if depth == 1)
    assert len(deep) == result.statistics.passes
    assert len(read) - len(deep) == result.statistics.draft_passes


def test_a_stop_token_inside_a_round_ends_the_sequence_there() -> None:
    model = lively(CONFIGS["gqa"])
    prompts = prompts_of(model, 9, 4, 6)
    free = continued(model, prompts, FULL_DEPTH).new_ids_BN
    for place in range(0, 6, 2):
        stops = {int(free[0, place]), int(free[1, 3]), int(free[2, 7])}
        full, speculative = (
            continued(model, prompts, decoding, stop_token_ids=stops) for decoding in (FULL_DEPTH, Speculative(4, 1))
        )
        assert torch.equal(full.new_ids_BN, speculative.new_ids_BN)
        assert torch.equal(full.lengths_B, speculative.lengths_B)
        assert [len(a) for a in full.sequences()] == [len(b) for b in speculative.sequences()]


def test_an_ended_sequence_holds_up_no_other() -> None:
    model = lively(CONFIGS["gqa"])
    prompts = prompts_of(model, 9, 4)
    free = continued(model, prompts, FULL_DEPTH, new=20).new_ids_BN
    stop = int(free[0, 0])
    assert stop not in free[1].tolist()
    both, alone = (
        continued(model, rows, Speculative(4, 1), new=20, stop_token_ids={stop}) for rows in (prompts, prompts[1:])
    )
    assert both.lengths_B.tolist() == [1, 20]
    assert both.statistics.passes == alone.statistics.passes


def test_speculation_goes_up_to_the_last_place_of_the_context() -> None:
    model = lively(CONFIGS["gqa"])
    prompt = prompts_of(model, 40)
    full, speculative = (continued(model, prompt, decoding, new=24) for decoding in (FULL_DEPTH, Speculative(7, 2)))
    assert torch.equal(full.new_ids_BN, speculative.new_ids_BN)


@torch.no_grad()
def test_a_draft_leaves_the_cache_as_it_was() -> None:
    model = lively(CONFIGS["msrd"])
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    cache, untouched = (Cache.for_model(model.config, rewindable=4) for _ in range(2))
    for each in (cache, untouched):
        model(ids[:, :8], 4, cache=each)
    with cache.drafting():
        for place in range(4):
            model(torch.randint(0, 256, (2, 1)), place % 2 + 1, cache=cache)
    assert cache.length == 8
    assert torch.equal(model(ids[:, 8:], 4, cache=cache), model(ids[:, 8:], 4, cache=untouched))
    with cache.drafting(), pytest.raises(ValueError, match="n_loops = 5: a draft is at most as deep as its cache, 4"):
        model(ids[:, :1], 5, cache=cache)
    with pytest.raises(ValueError, match="n_loops = 2: this cache was filled with n_loops = 4"):
        model(ids[:, :1], 2, cache=cache)


# Speculative sampling


def chi_square_is_plausible(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Pearson's statistic within five standard deviations; outcomes expected less than five times count as one."""
    assert counts[expected == 0].sum() == 0, "an impossible outcome occurred"
    common = expected >= 5
    observed = torch.cat((counts[common], counts[~common].sum().unsqueeze(0))).double()
    wanted = torch.cat((expected[common], expected[~common].sum().unsqueeze(0))).double().clamp_min(1e-9)
    degrees = len(wanted) - 1
    statistic = ((observed - wanted).square() / wanted).sum().item()
    assert statistic < degrees + 5 * math.sqrt(2 * degrees), f"chi-square {statistic:.0f} of {degrees}"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=5), Sampling(top_p=0.8)])
def test_a_settled_token_is_distributed_as_the_full_depth_says(sampling: Sampling) -> None:
    draws = 100_000
    p = probabilities(torch.randn(1, 8) * 2, sampling).expand(draws, -1)
    q = probabilities(torch.randn(1, 8) * 2, sampling).expand(draws, -1)
    uniforms = torch.rand(3, draws, dtype=torch.float64)
    draft = Draft(draw(q, uniforms[0]), q, torch.zeros(draws))
    ids, accepted = settle(p, draft, uniforms[1], uniforms[2])
    chi_square_is_plausible(torch.bincount(ids, minlength=8), draws * p[0])
    overlap = torch.minimum(p[0], q[0]).sum()  # Leviathan et al. 2023, corollary 3.6
    torch.testing.assert_close(accepted.float().mean(), overlap, atol=0.01, rtol=0)
    assert torch.equal(ids[accepted], draft.ids_B[accepted])


def test_a_draft_from_the_same_distribution_is_always_accepted() -> None:
    p = probabilities(torch.randn(1000, 50), Sampling(top_k=7))
    draft = Draft(draw(p, torch.rand(1000, dtype=torch.float64)), p, torch.zeros(1000))
    almost_one = torch.full((1000,), 1 - 2**-53, dtype=torch.float64)
    ids, accepted = settle(p, draft, almost_one, almost_one)
    assert accepted.all()
    assert torch.equal(ids, draft.ids_B)


SMALL_VOCABULARY = IceConfig(
    vocab_size=3,
    dim=16,
    max_seq_len=8,
    max_loop_iters=2,
    prelude_layers=0,
    coda_layers=0,
    n_heads=2,
    n_kv_heads=1,
    ffn_dim=16,
    n_experts=0,
)


def text_probabilities(model: IceModel, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    """The exact probability of every continuation by 3 tokens, (V, V, V), from full forwards without a cache."""
    size = model.config.vocab_size
    with torch.no_grad():
        triples = torch.tensor([[*prompt, *rest] for rest in itertools.product(range(size), repeat=3)])
        logits = model(triples)[:, len(prompt) - 1 : -1]
    each = torch.stack([probabilities(logits[:, place], sampling) for place in range(3)], dim=1)
    chosen = each.gather(2, triples[:, len(prompt) :].unsqueeze(2)).squeeze(2).double()
    return chosen.prod(dim=1).view(size, size, size)


def test_speculative_sampling_draws_texts_with_their_exact_probabilities() -> None:
    sampling = Sampling(temperature=1.2, top_p=0.999)
    model = lively(SMALL_VOCABULARY)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "head.weight")):
            parameter.data.mul_(3)  # so that one loop and two disagree
    prompt, rows, calls = [1, 2], 6, 120
    counts, rates = torch.zeros(3, 3, 3), []
    for call in range(calls):
        seeded = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=rows * call)
        result = continued(model, [prompt] * rows, Speculative(2, 1), new=3, sampling=seeded)
        counts.index_put_(tuple(result.new_ids_BN.T), torch.ones(rows), accumulate=True)
        rates.append(result.statistics.acceptance_rate or 0.0)
    assert 0.3 < sum(rates) / calls < 0.8, "drafts must be neither mostly right nor mostly wrong"
    expected = text_probabilities(model, prompt, sampling)
    torch.testing.assert_close(expected.sum(), torch.ones((), dtype=torch.float64), atol=1e-5, rtol=0)
    chi_square_is_plausible(counts.flatten(), rows * calls * expected.flatten())


class TableModel(torch.nn.Module):
    """In the place of a model: the next token's distribution is a row of a table, another one for each depth."""

    def __init__(self, tables: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.config, self.tables = SMALL_VOCABULARY, tables
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids_BS: torch.Tensor, n_loops: int, cache: Cache, **others: object) -> torch.Tensor:
        cache.fix_depth(n_loops)
        cache.length += ids_BS.shape[1]
        return self.tables[n_loops].log()[ids_BS]


def test_speculative_sampling_is_exact_however_wrong_the_drafts_are() -> None:
    full = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.3, 0.4, 0.3]])
    shallow = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    model, rows, calls = TableModel({2: full, 1: shallow}), 3, 900
    counts, passes = torch.zeros(3, 3, 3, 3), set()
    for call in range(calls):
        result = continued(model, [[0]] * rows, Speculative(2, 1), new=4, sampling=Sampling(seed=rows * call))
        counts.index_put_(tuple(result.new_ids_BN.T), torch.ones(rows), accumulate=True)
        passes.add(result.statistics.passes)
    assert passes == {2, 3, 4}, "rounds that commit 1, 2 and 3 tokens"
    expected = torch.einsum("a,ab,bc,cd->abcd", full[0], full, full, full)
    chi_square_is_plausible(counts.flatten(), rows * calls * expected.flatten())


def test_same_seed_same_speculation() -> None:
    model = lively(CONFIGS["gqa"])
    prompts = prompts_of(model, 5, 8)
    first, again, other = (
        continued(model, prompts, Speculative(3, 1), sampling=Sampling(seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.new_ids_BN, again.new_ids_BN)
    assert not torch.equal(first.new_ids_BN, other.new_ids_BN)


# What is refused


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"decoding": Adaptive()}, r"threshold = 0.5: this model has no depth heads to ask \(slu = false\)"),
        ({}, {"decoding": Speculative(threshold=0.2)}, "threshold = 0.2: this model has no depth heads"),
        ({}, {"decoding": Speculative(2, 5)}, "draft_loops = 5: must be at most n_loops = 4"),
        ({}, {"decoding": Speculative(), "kv_policy": "ring"}, "kv_policy = ring: tokens verified together"),
        ({}, {"decoding": Speculative(), "kv_policy": "last"}, "kv_policy = last: tokens verified together"),
        ({"mlca_window": 8}, {"decoding": Speculative()}, "mlca_window = 8: tokens verified together"),
    ],
)
def test_what_a_model_or_cache_cannot_do_is_refused(
    fields: dict[str, object], options: dict[str, object], message: str
) -> None:
    model = IceModel(IceConfig(**fields).scaled_down())
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2]], GenerationOptions(4, **options))


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Adaptive, {"threshold": 1.5}, "threshold = 1.5: must be between 0 and 1"),
        (Speculative, {"draft_tokens": 0}, "draft_tokens = 0: must be at least 1"),
        (Speculative, {"draft_loops": 0}, "draft_loops = 0: must be at least 1"),
        (Speculative, {"threshold": -1.0}, "threshold = -1.0: must be between 0 and 1"),
    ],
)
def test_values_without_a_meaning_are_refused(kind: type, value: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**value)
