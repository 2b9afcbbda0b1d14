"""Generation at full depth: the cache against no cache, batches against each prompt alone, sampling, limits."""

from __future__ import annotations

import pytest
import torch
from amplified import amplified

from model import IceConfig, IceModel
from model.attention import Cache
from model.attention.mla import MultiHeadLatentAttention
from model.generation import GenerationOptions, Sampling, generate
from model.parameters import cache_bytes_per_token
from model.sampling import Uniforms, draw, probabilities

CONFIGS = {
    "gqa": IceConfig(recurrent_layers=2, qk_norm=True).scaled_down(),
    "mla": IceConfig(attn_type="mla", recurrent_layers=2).scaled_down(),
    "mla_low_rank_query": IceConfig(attn_type="mla", q_lora_rank=64).scaled_down(),
    "act": IceConfig(act=True).scaled_down(),
    "random_state": IceConfig(initial_state="random").scaled_down(),
    "moda_v2": IceConfig(attn_type="moda_v2").scaled_down(),
    "msrd": IceConfig(msrd_scales=(1, 2), sandwich_norm=True).scaled_down(),
    "gated": IceConfig(kv_policy="gated").scaled_down(),
    "window": IceConfig(sliding_window=8, full_attention_every=2).scaled_down(),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> IceModel:
    return lively(CONFIGS[request.param])


def lively(config: IceConfig) -> IceModel:
    """Updates and logits large enough that a wrong cache changes the chosen tokens."""
    torch.manual_seed(3)
    return amplified(config, logits=True).eval()


def prompt(model: IceModel, batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length))


@pytest.mark.parametrize("n_loops", [1, 3, 7])
def test_prefill_and_decode_equal_the_full_forward(model: IceModel, n_loops: int) -> None:
    ids = prompt(model, length=14)
    with torch.no_grad():
        expected = model(ids, n_loops)
        for sizes in ([9, 1, 1, 1, 1, 1], [4, 6, 1, 3], [14]):
            cache, pieces, start = Cache(), [], 0
            for size in sizes:
                pieces.append(model(ids[:, start : start + size], n_loops, cache=cache))
                start += size
            torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=3e-5, rtol=1e-4)
            assert cache.length == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_decoding_in_half_precision_stays_near_the_full_forward(attn_type: str, dtype: torch.dtype) -> None:
    config = IceConfig(attn_type=attn_type, n_experts=0).scaled_down()  # a flipped route is a different function
    model = IceModel(config).eval().to(dtype)
    ids, cache = prompt(model, length=12), Cache()
    with torch.no_grad():
        expected = model(ids)
        pieces = [model(part, cache=cache) for part in ids.split([6, 1, 1, 4], dim=1)]
    assert (torch.cat(pieces, dim=1) - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize("n_loops", [1, 4])
def test_generation_with_the_cache_equals_generation_without(model: IceModel, n_loops: int) -> None:
    ids = prompt(model)
    with_cache = model.generate(ids, 12, n_loops, temperature=0.0)
    without = ids
    with torch.no_grad():
        for _ in range(12):
            without = torch.cat((without, model(without, n_loops)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(with_cache, without)


# Prompts of unequal length


@torch.no_grad()
def test_padding_changes_no_logit(model: IceModel) -> None:
    """Prefill and decoding of a padded batch against each row alone, without padding and without a cache."""
    lengths, total = [9, 4, 13], 18
    rows = [prompt(model, 1, length + total - 13)[0] for length in lengths]
    padded = torch.stack([torch.nn.functional.pad(row, (total - len(row), 0), value=7) for row in rows])
    padding, cache = torch.tensor([total - len(row) for row in rows]), Cache.for_model(model.config)
    pieces = [model(part, cache=cache, padding=padding) for part in padded.split([13, 1, 1, 3], dim=1)]
    for row, logits in zip(rows, torch.cat(pieces, dim=1), strict=True):
        alone = model(row.unsqueeze(0))[0]
        torch.testing.assert_close(logits[-len(row) :], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_padded_token_is_seen_by_nobody() -> None:
    model = lively(CONFIGS["gqa"])
    ids, padding = prompt(model, 2, 9), torch.tensor([3, 0])
    other = ids.clone()
    other[0, :3] = (ids[0, :3] + 1) % model.config.vocab_size
    with_one, with_other = (model(each, padding=padding)[:, 3:] for each in (ids, other))
    torch.testing.assert_close(with_one, with_other, atol=1e-5, rtol=0)
    assert (model(ids)[0, 3:] - model(other)[0, 3:]).abs().max() > 1e-2


def test_prompts_of_unequal_length_are_continued_as_each_alone(model: IceModel) -> None:
    prompts = [prompt(model, 1, length)[0] for length in (9, 1, 13)]
    together = model.generate(prompts, 12, temperature=0.0)
    for row, ids in zip(together, prompts, strict=True):
        assert torch.equal(row, model.generate(ids.unsqueeze(0), 12, temperature=0.0)[0])


def test_a_list_ends_each_row_at_its_stop_token() -> None:
    model = lively(CONFIGS["gqa"])
    prompts = [prompt(model, 1, length)[0].tolist() for length in (9, 4)]
    free = generate(model, prompts, GenerationOptions(12, sampling=Sampling(0.0))).new_ids_BN
    stops = {int(free[0, 2]), int(free[1, 5])}
    first, second = model.generate(prompts, 12, temperature=0.0, stop_token_ids=stops)
    lengths = [next(i for i, token in enumerate(row.tolist()) if token in stops) + 1 for row in free]
    assert first.tolist() == prompts[0] + free[0, : lengths[0]].tolist()
    assert second.tolist() == prompts[1] + free[1, : lengths[1]].tolist()
    statistics = generate(
        model, prompts, GenerationOptions(12, sampling=Sampling(0.0), stop_token_ids=stops)
    ).statistics
    assert statistics.new_tokens == sum(lengths)
    assert statistics.passes == max(lengths)
    assert (statistics.mean_loops, statistics.tokens_per_pass, statistics.acceptance_rate) == (4, 1, None)


# The cache


@pytest.mark.parametrize("kv_policy", ["per_loop", "ring", "last"])
def test_the_cache_keeps_what_the_kv_policy_says(kv_policy: str) -> None:
    model = lively(CONFIGS["gqa"])
    ids = prompt(model)
    generated = model.generate(ids, 12, temperature=0.0, kv_policy=kv_policy)
    cache, expected = Cache.for_model(model.config, kv_policy=kv_policy), ids
    with torch.no_grad():
        unread = ids
        for _ in range(12):
            unread = model(unread, cache=cache)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, unread), dim=1)
    assert torch.equal(generated, expected)
    slots = {"per_loop": 4, "ring": model.config.kv_ring_size, "last": 1}[kv_policy]
    layers = model.config.prelude_layers + slots * model.config.recurrent_layers + model.config.coda_layers
    assert cache.bytes_per_token() == layers * 2 * model.config.n_kv_heads * model.config.head_dim * 4


def test_mla_caches_latent_and_rotary_key_and_decodes_without_expanding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(CONFIGS["mla"])
    config, cache = model.config, Cache.for_model(CONFIGS["mla"])
    expanded: list[int] = []
    plain = MultiHeadLatentAttention.expanded

    def counted(self: MultiHeadLatentAttention, *args: torch.Tensor) -> torch.Tensor:
        expanded.append(args[2].shape[2])
        return plain(self, *args)

    monkeypatch.setattr(MultiHeadLatentAttention, "expanded", counted)
    with torch.no_grad():
        model(prompt(model, length=9), cache=cache)
        layers = config.prelude_layers + 4 * config.recurrent_layers + config.coda_layers
        assert expanded == [9] * layers, "a prompt is read per head"
        model(prompt(model, length=1), cache=cache)
        assert len(expanded) == layers, "a decoded token must not expand the past"
    numbers = config.kv_lora_rank + config.qk_rope_head_dim
    assert cache.bytes_per_token() == layers * numbers * 4


def test_generation_reads_each_token_once() -> None:
    model = lively(CONFIGS["gqa"])
    lengths: list[int] = []
    model.embed.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model.generate(prompt(model, length=9), 5)
    assert lengths == [9, 1, 1, 1, 1]


def test_a_long_prompt_is_read_in_chunks(model: IceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4: the second row has whole chunks of padding, and the last chunk is not full."""
    prompts = [torch.randint(0, model.config.vocab_size, (length,)) for length in (14, 3)]
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    whole = generate(model, prompts, GenerationOptions(6, 3, Sampling(0.0)))
    monkeypatch.setattr("model.decoding.PROMPT_CHUNK", 4)
    chunks = generate(model, prompts, GenerationOptions(6, 3, Sampling(0.0)))
    assert torch.equal(chunks.new_ids_BN, whole.new_ids_BN)
    assert lengths == [14, 1, 1, 1, 1, 1, 4, 4, 4, 2, 1, 1, 1, 1, 1]


def test_cache_size_is_what_the_configuration_says() -> None:
    for config in CONFIGS.values():
        cache = Cache.for_model(config)
        with torch.no_grad():
            IceModel(config)(torch.zeros(3, 5, dtype=torch.int64), 3, cache=cache)
        assert cache.bytes_per_token() == cache_bytes_per_token(config, 3, bytes_per_number=4)


# Random numbers


def test_a_rows_draws_depend_on_no_other_row() -> None:
    model = lively(CONFIGS["gqa"])
    prompts = [prompt(model, 1, length)[0] for length in (9, 4, 6)]
    together = model.generate(prompts, 12, seed=40)
    for row, ids in enumerate(prompts):
        assert torch.equal(together[row], model.generate([ids], 12, seed=40 + row)[0])
    same = model.generate([prompts[0]] * 3, 12, seed=40)
    assert not torch.equal(same[0], same[1])


def test_asking_for_more_tokens_changes_none_of_the_first() -> None:
    model = lively(CONFIGS["gqa"])
    ids = prompt(model)
    few, many = (model.generate(ids, count, seed=3) for count in (5, 20))
    assert torch.equal(few, many[:, : few.shape[1]])


def test_same_seed_same_text_and_other_seed_other_text() -> None:
    model = lively(CONFIGS["gqa"])
    ids = prompt(model)
    first = model.generate(ids, 8, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, model.generate(ids, 8, seed=1))
    assert not torch.equal(first, model.generate(ids, 8, seed=2))
    drawn = [model.generate(ids, 8) for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(99)
    assert torch.equal(drawn[0], model.generate(ids, 8))


def test_stream_yields_what_generate_returns_and_calls_back() -> None:
    model = lively(CONFIGS["gqa"])
    ids = prompt(model)
    heard: list[torch.Tensor] = []
    whole = model.generate(ids, 8, seed=5, on_token=lambda new: heard.append(new.ids_B))
    tokens = model.stream(ids, 8, seed=5)
    first = next(tokens)
    assert tokens.statistics.passes == 1, "a stream must not run ahead"
    streamed = torch.stack([first.ids_B, *(new.ids_B for new in tokens)], dim=1)
    assert torch.equal(whole[:, 9:], streamed)
    assert torch.equal(torch.stack(heard, dim=1), streamed)


def test_stop_token_ends_a_sequence_and_then_the_batch() -> None:
    model = lively(CONFIGS["gqa"])
    ids = prompt(model)
    free = model.generate(ids, 12, temperature=0.0)[:, 9:]
    stops = {int(free[0, 2]), int(free[1, 5])}
    stopped = model.generate(ids, 12, temperature=0.0, stop_token_ids=stops)[:, 9:]
    firsts = [next(i for i, token in enumerate(row.tolist()) if token in stops) for row in free]
    assert stopped.shape[1] == max(firsts) + 1
    for row, first in enumerate(firsts):
        assert torch.equal(stopped[row, : first + 1], free[row, : first + 1])
        assert (stopped[row, first:] == free[row, first]).all()


def test_generation_leaves_the_mode_and_the_load_alone() -> None:
    model = lively(CONFIGS["gqa"]).train()
    model.generate(prompt(model), 3)
    assert model.training
    assert model.core.blocks[0].ffn.router.training
    assert model.core.expert_load.take().numel() == 0


@pytest.mark.parametrize(
    ("length", "kwargs", "message"),
    [
        (9, {"max_new_tokens": 60}, "max_new_tokens = 60: with 9 prompt tokens passes max_seq_len = 64"),
        (9, {"max_new_tokens": 65}, "max_new_tokens = 65: must be at most max_output_tokens = 64"),
        (9, {"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        (0, {"max_new_tokens": 4}, r"input_ids\[0\]: the prompt is empty"),
        (9, {"max_new_tokens": 4, "temperature": -1.0}, "temperature = -1.0: must be at least 0"),
        (9, {"max_new_tokens": 4, "top_k": 0}, "top_k = 0: must be at least 1"),
        (9, {"max_new_tokens": 4, "top_p": 0.0}, "top_p = 0.0: must be above 0"),
        (9, {"max_new_tokens": 4, "temperature": float("inf")}, "temperature = inf: must be at least 0"),
        (9, {"max_new_tokens": 4, "seed": -1}, "seed = -1: must be between 0"),
        (9, {"max_new_tokens": 4, "n_loops": 0}, "n_loops = 0: must be at least 1"),
        (9, {"max_new_tokens": 4, "kv_policy": "some"}, "kv_policy = some: must be one of per_loop, ring, last, gated"),
    ],
)
def test_limits_are_refused_with_a_reason(length: int, kwargs: dict[str, float], message: str) -> None:
    model = lively(CONFIGS["gqa"])
    with pytest.raises(ValueError, match=message):
        model.stream(prompt(model, length=length), **kwargs)  # before the first token is asked for


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "input_ids: no prompt"),
        ([[1, 2], []], r"input_ids\[1\]: the prompt is empty"),
        ([[1, 2], [256]], r"input_ids\[1\]: 256 is no token id; vocab_size = 256"),
        ([[-1, 2]], r"input_ids\[0\]: -1 is no token id"),
        ([[[1, 2]]], r"input_ids\[0\] = tensor of shape \(1, 2\): must be a row of token ids"),
        (torch.tensor([1, 2]), r"input_ids = tensor of shape \(2,\): must be \(batch, tokens\)"),
        ([[1] * 60, [1]], "max_new_tokens = 5: with 60 prompt tokens passes max_seq_len = 64"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lively(CONFIGS["gqa"]).stream(prompts, 5)


def test_a_cache_serves_one_depth_and_no_gradients() -> None:
    model = lively(CONFIGS["gqa"])
    ids, cache = prompt(model), Cache()
    with pytest.raises(ValueError, match="no_grad"):
        model(ids, cache=cache)
    with torch.no_grad():
        model(ids, 2, cache=cache)
        with pytest.raises(ValueError, match="n_loops = 3: this cache was filled with n_loops = 2"):
            model(ids, 3, cache=cache)


def frequencies(sampling: Sampling, weights: list[float], draws: int = 20000) -> torch.Tensor:
    logits = torch.tensor(weights).log().expand(draws, -1)
    ids = draw(probabilities(logits, sampling), torch.rand(draws, dtype=torch.float64))
    return torch.bincount(ids, minlength=len(weights)) / draws


def test_numbers_of_neighbouring_rows_and_places_are_uniform_and_unrelated() -> None:
    uniforms = Uniforms(Sampling(seed=0), 2000, 3, 2, torch.device("cpu"))
    numbers_XB = torch.stack([uniforms.at(place)[kind] for place in range(3) for kind in range(2)])
    torch.testing.assert_close(numbers_XB.mean(dim=1), torch.full((6,), 0.5, dtype=torch.float64), atol=0.03, rtol=0)
    correlations = torch.corrcoef(torch.cat((numbers_XB[:, :-1], numbers_XB[:, 1:])))  # each row, and its neighbour
    assert (correlations - torch.eye(12)).abs().max() < 0.1
    assert uniforms.at(0).min() >= 0
    assert uniforms.at(0).max() < 1


def test_sampling_follows_the_distribution_it_names() -> None:
    p = [0.5, 0.3, 0.15, 0.05]

    def close(actual: torch.Tensor, expected: list[float]) -> None:
        torch.testing.assert_close(actual, torch.tensor(expected) / sum(expected), atol=0.02, rtol=0)

    close(frequencies(Sampling(), p), p)
    close(frequencies(Sampling(temperature=0.5), p), [x**2 for x in p])
    close(frequencies(Sampling(top_k=2), p), [0.5, 0.3, 0, 0])
    close(frequencies(Sampling(top_p=0.75), p), [0.5, 0.3, 0, 0])
    close(frequencies(Sampling(top_p=0.81), p), [0.5, 0.3, 0.15, 0])
    close(frequencies(Sampling(top_p=0.01), p), [1, 0, 0, 0])
    close(frequencies(Sampling(temperature=0), p), [1, 0, 0, 0])
    close(frequencies(Sampling(top_k=99), p), p)
    close(frequencies(Sampling(top_k=3, top_p=0.8), p), [0.5, 0.3, 0, 0])
    close(frequencies(Sampling(temperature=1e-30), p), [1, 0, 0, 0])


def test_ties_leave_exactly_k_candidates() -> None:
    assert (probabilities(torch.zeros(1, 9), Sampling(top_k=4)) > 0).sum() == 4


def test_a_draw_never_hits_an_impossible_token_nor_leaves_the_vocabulary() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for uniform, expected in [(0.0, 1), (0.2999, 1), (0.3001, 3), (1 - 2**-53, 3)]:
        assert draw(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [expected]


def test_reading_a_prompt_computes_the_logits_of_its_last_token_only() -> None:
    model = IceModel(IceConfig().scaled_down()).eval()
    ids = torch.randint(0, 256, (2, 9))
    widths: list[int] = []
    model.head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    model.generate(ids, max_new_tokens=3, temperature=0)
    assert widths == [1, 1, 1]
    torch.testing.assert_close(model(ids, only_last=True), model(ids)[:, -1:], atol=1e-6, rtol=1e-5)
