import math

import pytest
import torch
from amplified import amplified
from hypothesis import given, settings
from hypothesis import strategies as st

from model import IceConfig, IceModel
from model.attention import Cache, Memory, attention_mask, causal_attention
from model.attention.mlca import PooledSlot, Pooling
from model.parameters import cache_bytes
from model.scoring import log_probabilities

SMALL = IceConfig(n_experts=0, recurrent_layers=2, mlca_window=128, mlca_levels=2).scaled_down()
STRUCTURES = {
    "gqa": SMALL,
    "mla": IceConfig(n_experts=0, attn_type="mla", mlca_window=128).scaled_down(),
    "moda": IceConfig(n_experts=0, attn_type="moda_v2", mlca_window=128).scaled_down(),
    "gated": IceConfig(n_experts=0, kv_policy="gated", mlca_window=128).scaled_down(),
    "gated_mla": IceConfig(n_experts=0, attn_type="mla", kv_policy="gated", mlca_window=128).scaled_down(),
    "ring": IceConfig(n_experts=0, kv_policy="ring", mlca_window=128).scaled_down(),
}


def with_fields(config: IceConfig, **fields: object) -> IceConfig:
    return IceConfig.model_validate(config.model_dump() | fields)


def lively(config: IceConfig) -> IceModel:
    return amplified(config, logits=True).eval()


@torch.no_grad()
def decode(model: IceModel, ids: torch.Tensor, sizes: list[int], cache: Cache, **kwargs: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part, cache=cache, **kwargs) for part in ids.split(sizes, dim=1)], dim=1)


# The idea once more, as slowly as possible: a list of entries, each a list of the positions it stands for.


def naive_entries(tokens: int, window: int, levels: int) -> list[list[int]]:
    """Entries when the oldest ``tokens`` are pooled: pairs move up, oldest first, when a level overflows."""
    shelves: list[list[list[int]]] = [[] for _ in range(levels)]
    largest = 2**levels  # tokens of an entry of the last level that is not merged any more

    def merged(entries: list[list[int]]) -> list[list[int]]:
        """Neighbours of equal size become one, as in a binary counter, unless they are of the largest size."""
        out: list[list[int]] = []
        for entry in entries:
            out.append(entry)
            while len(out) > 1 and len(out[-2]) == len(out[-1]) < largest:
                newer = out.pop()
                out[-1] = out[-1] + newer
        return out

    def put(entry: list[int], level: int) -> None:
        nonlocal largest
        shelf = shelves[level]
        shelf.append(entry)
        if level < levels - 1:
            if len(shelf) > window:
                put(shelf.pop(0) + shelf.pop(0), level + 1)
            return
        on_shelf = sum(len(entry) for entry in shelf)
        # Room is left for a remainder of one entry of each smaller size.
        while on_shelf / largest > max(1, window - math.log2(largest / 2**levels)):
            largest *= 2
        shelves[level] = merged(shelf)

    for first in range(0, tokens, 2):
        put([first, first + 1], 0)
    return [entry for shelf in reversed(shelves) for entry in shelf]


@given(window=st.integers(1, 9), levels=st.integers(1, 4), pairs=st.integers(0, 600))
@settings(max_examples=80, deadline=None)
def test_entries_are_those_of_pairs_moving_up_one_by_one(window: int, levels: int, pairs: int) -> None:
    spans = Pooling(window, levels).spans(2 * pairs)
    expected = naive_entries(2 * pairs, window, levels)
    assert spans == [len(entry) for entry in expected]
    assert [position for entry in expected for position in entry] == list(range(2 * pairs))
    assert len(spans) <= levels * window + max(0, math.ceil(math.log2(2 * pairs + 1)) - window)


def naive_memory(
    rows: torch.Tensor, start: int, pooling: Pooling, rewindable: int, padding: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (B, heads, P, width) and log counts (B, P) of what is pooled before position ``start``, in float64."""
    pooled = 0
    while start - (pooled + pooling.block) >= pooling.window - 1 + rewindable:
        pooled += pooling.block
    entries = naive_entries(pooled, pooling.window, pooling.levels)
    means = torch.zeros(len(rows), rows.shape[1], len(entries), rows.shape[3], dtype=torch.float64)
    logs = torch.full((len(rows), len(entries)), -math.inf, dtype=torch.float64)
    for b, pad in enumerate(padding):
        for p, entry in enumerate(entries):
            real = [position for position in entry if position >= pad]
            if real:
                means[b, :, p] = sum(rows[b, :, position].double() for position in real) / len(real)
                logs[b, p] = math.log(len(real))
    return means, logs


@settings(max_examples=50, deadline=None)
@given(
    window=st.integers(1, 10),
    levels=st.integers(1, 3),
    rewindable=st.integers(0, 3),
    padding=st.none() | st.tuples(st.integers(0, 30), st.integers(0, 30)),
    sizes=st.lists(st.sampled_from([1, 1, 2, 3, 7, 25]), min_size=1, max_size=30),
    seed=st.integers(0, 9),
)
def test_a_slot_holds_the_float64_means_after_any_appends(
    window: int, levels: int, rewindable: int, padding: tuple[int, int] | None, sizes: list[int], seed: int
) -> None:
    pooling = Pooling(window, levels)
    cache = Cache(rewindable=rewindable, pooling=pooling)
    cache.padding_B = None if padding is None else torch.tensor(padding)
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, heads, sum(sizes), width, generator=generator) for heads, width in ((2, 3), (1, 4)))
    slot = cache.slot("core", 0)
    for size in sizes:
        start, end = cache.length, cache.length + size
        slot.append(
            *(torch.randn_like(rows[:, :, start:end]) for rows in (keys, values))
        )  # a loop that shares the slot
        memory = slot.append(keys[:, :, start:end], values[:, :, start:end])
        for rows, held in zip((keys, values), memory.tensors, strict=True):
            means, logs = naive_memory(rows, start, pooling, rewindable, list(padding or (0, 0)))
            pooled = means.shape[2]
            torch.testing.assert_close(held[:, :, :pooled].double(), means, atol=1e-5, rtol=1e-5)
            exact = held.shape[2] - pooled
            assert exact >= min(window - 1 + size + rewindable, end)
            assert torch.equal(held[:, :, pooled:], rows[:, :, end - exact : end])
        if memory.pooled_bias_BP is None:
            assert logs.shape[1] == 0
        else:
            torch.testing.assert_close(memory.pooled_bias_BP.double().expand_as(logs), logs, atol=1e-6, rtol=1e-6)
        cache.length = end


def test_memory_stays_within_window_times_levels_at_a_hundred_windows_and_more() -> None:
    pooling = Pooling(window=16, levels=3)
    cache = Cache(pooling=pooling)
    slot, token, entries = cache.slot("core", 0), torch.zeros(1, 2, 1, 4), 0
    for _ in range(200 * 16):
        memory = slot.append(token)
        cache.length += 1
        entries = max(entries, memory.tensors[0].shape[2])
        assert slot.bytes_used() <= pooling.most_rows() * 2 * 4 * 4
    assert memory.pooled_bias_BP is not None
    assert memory.pooled_bias_BP.exp().sum().item() == pytest.approx(cache.length - (entries_exact := 18) + 1, abs=4)
    assert entries <= 4 * 16 + entries_exact // 4
    assert slot.bytes_per_token() == 0


@pytest.mark.parametrize("padding", [None, [3, 0]])
def test_attention_over_identical_keys_and_values_within_entries_is_exact(padding: list[int] | None) -> None:
    # One key and value for each run of 8 tokens: every entry of at most 8 tokens averages equal rows.
    pooling = Pooling(window=8, levels=3)
    keys, values = (torch.randn(2, 2, 20, 4).repeat_interleave(8, dim=2)[:, :, :101] for _ in range(2))
    queries = torch.randn(2, 4, 101, 4)
    padding_B = None if padding is None else torch.tensor(padding)
    exact_mask = attention_mask(101, Memory((keys, values)), None, padding_B)
    exact = causal_attention(queries, keys, values, 0.7, exact_mask)
    cache = Cache(pooling=pooling)
    cache.padding_B = padding_B
    slot = cache.slot("core", 0)
    for start, size in [(0, 5), (5, 30), *((i, 1) for i in range(35, 101))]:
        new = slice(start, start + size)
        memory = slot.append(keys[:, :, new], values[:, :, new])
        mask = attention_mask(size, memory, None, padding_B, start)
        pooled = causal_attention(queries[:, :, new], *memory.tensors, 0.7, mask)
        torch.testing.assert_close(pooled, exact[:, :, new], atol=1e-5, rtol=1e-5)
        cache.length += size
    assert isinstance(slot, PooledSlot)
    assert max(slot._spans) == 8


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_text_that_fits_the_window_is_decoded_exactly(structure: str) -> None:
    config = with_fields(STRUCTURES[structure], mlca_window=24)
    exact = with_fields(config, mlca_window=None)
    model = lively(config)
    ids = torch.randint(0, config.vocab_size, (2, 24))
    for sizes in ([10] + [1] * 14, [1, 20, 3]):
        expected = decode(model, ids, sizes, Cache.for_model(exact))
        assert torch.equal(decode(model, ids, sizes, Cache.for_model(config)), expected)
        longer = torch.cat((ids, ids), dim=1)
        pooled, whole = (
            decode(model, longer, [*sizes, *[1] * 24], Cache.for_model(kind))[:, 24:] for kind in (config, exact)
        )
        assert pooled.isfinite().all()
        assert 1e-3 < (pooled - whole).norm() / whole.norm() < 1


def test_every_layer_and_loop_without_a_window_is_pooled() -> None:
    config = with_fields(SMALL, sliding_window=5, full_attention_every=3)
    cache = Cache.for_model(config)
    decode(lively(config), torch.randint(0, 256, (1, 40)), [1] * 40, cache)
    kinds = {key: type(slot).__name__ for key, slot in cache._slots.items()}
    full = {("core", number % 2, number // 2) for number in range(8) if number % 3 == 2}
    assert {key for key, kind in kinds.items() if kind == "PooledSlot"} == full
    assert len(kinds) == 10


@pytest.mark.parametrize("structure", STRUCTURES)
def test_padding_weighs_nothing(structure: str) -> None:
    config = STRUCTURES[structure]
    model, ids = lively(config), torch.randint(0, config.vocab_size, (2, 60))
    padding = torch.tensor([7, 30])
    cache = Cache.for_model(config)
    sizes = [34] + [1] * 26
    together = decode(model, ids, sizes, cache, padding=padding)
    other_ids = ids.clone()
    for row, pad in enumerate(padding.tolist()):
        other_ids[row, :pad] = (other_ids[row, :pad] + 1) % config.vocab_size
    other = decode(model, other_ids, sizes, Cache.for_model(config), padding=padding)
    alone = decode(model, ids[1:], sizes, Cache.for_model(config), padding=padding[1:])
    for row, pad in enumerate(padding.tolist()):
        assert torch.equal(together[row, pad:], other[row, pad:])
    torch.testing.assert_close(together[1, 30:], alone[0, 30:], atol=5e-5, rtol=1e-4)


def test_a_rewind_finds_its_tokens_exact() -> None:
    cache = Cache(pooling=Pooling(window=6, levels=2), rewindable=4)
    slot, rows = cache.slot("core", 0), torch.randn(1, 1, 300, 2)
    for start in range(0, 290, 3):
        for step in range(4):  # four tokens that will be forgotten
            slot.append(torch.zeros(1, 1, 1, 2))
            cache.length = start + step + 1
        cache.rewind(start)
        (held,) = slot.append(rows[:, :, start : start + 3]).tensors
        exact = min(start, 5) + 3
        assert torch.equal(held[:, :, -exact:], rows[:, :, start + 3 - exact : start + 3])
        cache.length = start + 3


@pytest.mark.parametrize("chunk", [1, 1000])
def test_half_precision_loses_no_token_in_a_long_mean(chunk: int) -> None:
    cache, slowly_growing = Cache(pooling=Pooling(window=4, levels=1)), 1 + torch.arange(2002.0) / 2000
    slot, rows = cache.slot("core", 0), slowly_growing.view(1, 1, -1, 1)
    for part in rows.split([*[chunk] * (2000 // chunk), 2], dim=2):
        memory = slot.append(part.bfloat16())
        cache.length += part.shape[2]
    assert memory.pooled_bias_BP is not None
    spans = [round(count) for count in memory.pooled_bias_BP.exp()[0].tolist()]
    expected = torch.stack([part.mean() for part in slowly_growing[: sum(spans)].split(spans)])
    torch.testing.assert_close(memory.tensors[0][0, 0, : len(spans), 0].float(), expected, atol=2**-6, rtol=0)
    assert max(spans) == 1024


def test_bytes_are_bounded_as_the_configuration_says() -> None:
    for structure, config in STRUCTURES.items():
        says = cache_bytes(config, 4, bytes_per_number=4)
        assert says.per_token == 0
        longer = with_fields(config, max_seq_len=400)
        cache = Cache.for_model(longer)
        most = 0.0
        model = IceModel(longer)
        with torch.no_grad():
            model(torch.zeros(3, 300, dtype=torch.int64), cache=cache)
            for _ in range(20):
                model(torch.zeros(3, 1, dtype=torch.int64), cache=cache)
                most = max(most, cache.bytes_used() / 3)
        assert cache.bytes_per_token() == 0, structure
        assert 0.7 * says.constant <= most <= says.constant, structure


@pytest.mark.parametrize("structure", ["gqa", "mla", "gated"])
def test_scores_of_a_text_that_fits_are_those_of_the_plain_forward(structure: str) -> None:
    config = STRUCTURES[structure]
    model, ids = lively(with_fields(config, mlca_window=40)).train(), torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        plain = model(ids[:, :-1], 3).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    for chunk in (1, 7, 100):
        torch.testing.assert_close(log_probabilities(model, ids, 3, chunk=chunk), plain, atol=1e-4, rtol=1e-4)
    assert model.training


def test_scoring_a_text_longer_than_its_memory_pools_and_stays_finite() -> None:
    config = with_fields(SMALL, max_seq_len=1000)
    model, ids = lively(config), torch.randint(0, 256, (1, 1000))
    fine, coarse = (log_probabilities(model, ids, 2, chunk=chunk) for chunk in (8, 50))
    assert fine.shape == (1, 999)
    assert fine.isfinite().all()
    torch.testing.assert_close(fine[:, :8], coarse[:, :8], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(fine, coarse, atol=1e-2)
    for message, bad_ids, chunk in (("1 ids", ids[:, :1], 8), ("chunk = 0", ids, 0)):
        with pytest.raises(ValueError, match=message):
            log_probabilities(model, bad_ids, chunk=chunk)
