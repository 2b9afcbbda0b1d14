from typing import Any

import pytest
import torch
from amplified import amplified
from hypothesis import given, settings
from hypothesis import strategies as st

from model import IceConfig, IceModel
from model.attention import Cache, Memory
from model.attention.slot import most_rows
from model.parameters import cache_bytes, cache_bytes_per_token

PLAIN = IceConfig(recurrent_layers=2, n_experts=0).scaled_down()
MLA = IceConfig(attn_type="mla", n_experts=0).scaled_down()
WINDOWED = IceConfig(recurrent_layers=2, n_experts=0, sliding_window=128).scaled_down()
PATTERN = IceConfig(recurrent_layers=2, n_experts=0, sliding_window=128, full_attention_every=3).scaled_down()
STRUCTURES = {
    "gqa": PLAIN,
    "mla": MLA,
    "moda": IceConfig(attn_type="moda_v2", n_experts=0).scaled_down(),
    "windowed": WINDOWED,
    "windowed_mla": IceConfig(attn_type="mla", n_experts=0, sliding_window=128).scaled_down(),
    "pattern": PATTERN,
    "msrd": IceConfig(n_experts=0, msrd_scales=(1, 2, 4)).scaled_down(),
    "gated": IceConfig(n_experts=0, recurrent_layers=2, kv_policy="gated").scaled_down(),
    "gated_mla_msrd": IceConfig(n_experts=0, attn_type="mla", kv_policy="gated", msrd_scales=(1, 2)).scaled_down(),
}


def with_fields(config: IceConfig, **fields: object) -> IceConfig:
    return IceConfig.model_validate(config.model_dump() | fields)


def lively(config: IceConfig) -> IceModel:
    """Updates, logits and differences between loops so large that a wrong row of the past cannot hide."""
    return amplified(config, logits=True, uneven=("gate.weight",)).eval()


def ids_for(config: IceConfig, batch: int = 2, length: int = 30) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length))


@torch.no_grad()
def decode(
    model: IceModel, ids: torch.Tensor, sizes: list[int], cache: Any, n_loops: int = 4, **kwargs: Any
) -> torch.Tensor:
    pieces = [model(part, n_loops, cache=cache, **kwargs) for part in ids.split(sizes, dim=1)]
    return torch.cat(pieces, dim=1)


class RememberedTokenByToken:
    """In the place of a cache: every token keeps a row of every loop.

    A past one is read in the latest loop that agrees with the reader's modulo ``ring``.
    """

    def __init__(self, ring: int) -> None:
        self.ring, self.length, self.rows = ring, 0, {}  # type: ignore[var-annotated]

    def fix_depth(self, n_loops: int) -> None:
        pass

    def slot(self, part: str, layer: int, loop: int, window: int | None) -> "RememberedSlot":
        return RememberedSlot(self, part, layer, loop)


class RememberedSlot:
    def __init__(self, cache: RememberedTokenByToken, part: str, layer: int, loop: int) -> None:
        self.cache, self.place, self.loop = cache, (part, layer), loop

    @property
    def length(self) -> int:
        return self.cache.length

    def append(self, *tensors: torch.Tensor) -> Memory:
        rows, start = self.cache.rows, self.length
        for i in range(tensors[0].shape[2]):
            rows.setdefault((*self.place, start + i), {})[self.loop] = [tensor[:, :, i] for tensor in tensors]
        past = []
        for position in range(start):
            by_loop = rows[(*self.place, position)]
            past.append(by_loop[max(loop for loop in by_loop if (loop - self.loop) % self.cache.ring == 0)])
        return Memory(
            tuple(
                torch.cat((*(row[i].unsqueeze(2) for row in past), tensor), dim=2) for i, tensor in enumerate(tensors)
            )
        )


@pytest.mark.parametrize("sizes", [[9, 1, 1, 1], [4, 6, 2]])
@pytest.mark.parametrize(("ring", "n_loops"), [(1, 3), (2, 5)])
@pytest.mark.parametrize("structure", ["gqa", "mla", "moda", "msrd"])
def test_a_ring_shows_past_tokens_in_the_latest_loop_of_the_same_slot(
    structure: str, ring: int, n_loops: int, sizes: list[int]
) -> None:
    config = with_fields(STRUCTURES[structure], kv_policy="ring", kv_ring_size=ring)
    model = lively(config)
    ids = ids_for(config, length=12)
    expected = decode(model, ids, sizes, RememberedTokenByToken(ring), n_loops)
    torch.testing.assert_close(
        decode(model, ids, sizes, Cache.for_model(config), n_loops), expected, atol=3e-5, rtol=1e-4
    )
    per_loop = decode(model, ids, sizes, Cache.for_model(config, kv_policy="per_loop"), n_loops)
    assert torch.equal(per_loop[:, : sizes[0]], expected[:, : sizes[0]])  # one forward sees itself in its own loop
    assert (per_loop[:, sizes[0] :] - expected[:, sizes[0] :]).abs().max() > 1e-2


def test_a_ring_as_large_as_the_depth_is_per_loop_to_the_bit_and_one_of_one_is_last() -> None:
    for structure in ("gqa", "mla", "windowed"):
        ring4, ring1 = (with_fields(STRUCTURES[structure], kv_policy="ring", kv_ring_size=size) for size in (4, 1))
        model = lively(ring4)
        ids, sizes = ids_for(ring4, length=16), [9] + [1] * 7
        per_loop = decode(model, ids, sizes, Cache.for_model(ring4, kv_policy="per_loop"))
        assert torch.equal(decode(model, ids, sizes, Cache.for_model(ring4)), per_loop)
        last = decode(model, ids, sizes, Cache.for_model(ring4, kv_policy="last"))
        assert torch.equal(decode(model, ids, sizes, Cache.for_model(ring1)), last)
        assert not torch.equal(last, per_loop)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_decoding_equals_the_full_forward(structure: str) -> None:
    config = STRUCTURES[structure]
    model, ids = lively(config), ids_for(config)
    with torch.no_grad():
        expected = model(ids, 4)
    for sizes in ([30], [18] + [1] * 12, [3, 14, 1, 1, 9, 2]):
        for cache in (Cache.for_model(config), Cache()):
            torch.testing.assert_close(decode(model, ids, sizes, cache), expected, atol=5e-5, rtol=1e-4)


PADDED = [
    (structure, policy) for structure in ("gqa", "mla", "msrd") for policy in ("per_loop", "ring", "last", "gated")
]


@pytest.mark.parametrize(
    ("structure", "policy"), [*PADDED, ("moda", "ring"), ("windowed", "last"), ("pattern", "per_loop")]
)
def test_left_padding_changes_no_row(structure: str, policy: str) -> None:
    config = with_fields(STRUCTURES[structure], kv_policy=policy)
    model = lively(config)
    padding, length = torch.tensor([0, 5, 12]), 17
    ids = ids_for(config, batch=3, length=length + 4)
    together = decode(model, ids, [length] + [1] * 4, Cache.for_model(config), padding=padding)
    for row, pad in enumerate(padding.tolist()):
        alone = decode(model, ids[row : row + 1, pad:], [length - pad] + [1] * 4, Cache.for_model(config))
        torch.testing.assert_close(together[row : row + 1, pad:], alone, atol=5e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    window=st.none() | st.integers(1, 6),
    rewindable=st.integers(0, 3),
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(1, 2)), min_size=1, max_size=30),
)
def test_a_slot_shows_what_its_window_spans_after_any_appends_and_rewinds(
    window: int | None, rewindable: int, steps: list[tuple[int, int, int]]
) -> None:
    cache = Cache(rewindable=rewindable)
    slot, truth = cache.slot("core", 0, 0, window), torch.zeros(1, 2, 0, 3)
    longest = 0
    for new, back, appends in steps:
        start = cache.length
        for _ in range(appends):  # loops that share the slot write the same place again
            rows = torch.randn(1, 2, new, 3)
            (seen,) = slot.append(rows).tensors
            truth = torch.cat((truth[:, :, :start], rows), dim=2)
            assert torch.equal(seen, truth[:, :, 0 if window is None else max(start - window + 1, 0) :])
            assert torch.equal(slot.newest(new)[0], rows)
        cache.length = start + new
        longest = max(longest, cache.length)
        target = cache.length - back
        if target < max(longest - rewindable, 0):
            with pytest.raises(ValueError, match=f"length = {target}: this cache of {cache.length} tokens"):
                cache.rewind(target)
        else:
            cache.rewind(target)
            truth = truth[:, :, :target]


def test_a_windowed_slot_is_bounded_however_it_is_fed() -> None:
    for rewindable, chunk in ((0, 1), (3, 1), (0, 5)):
        cache = Cache(rewindable=rewindable)
        slot = cache.slot("core", 0, 0, 8)
        for _ in range(400):
            slot.append(torch.zeros(1, 2, chunk, 4))
            cache.length += chunk
        rows = slot.bytes_used() // (2 * 4 * 4)
        assert rows == most_rows(8, rewindable) if chunk == 1 else rows <= most_rows(8, rewindable) + chunk


def test_a_rewound_cache_goes_on_as_if_it_had_never_gone_further() -> None:
    for structure in ("gqa", "mla", "pattern", "gated"):
        config = STRUCTURES[structure]
        model, ids = lively(config), ids_for(config)
        expected = decode(model, ids, [12] + [1] * 18, Cache.for_model(config))
        cache = Cache.for_model(config, rewindable=3)
        pieces = [decode(model, ids[:, :12], [12], cache)]
        for start in range(12, 30, 2):
            decode(model, ids[:, :3], [1, 2], cache)
            cache.rewind(start)
            pieces.append(decode(model, ids[:, start : start + 2], [2], cache))
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=5e-5, rtol=1e-4)


def test_a_cache_serves_other_depths_only_where_they_fill_its_slots() -> None:
    config = with_fields(STRUCTURES["msrd"], kv_policy="ring", kv_ring_size=2)  # the scale of 4 runs ceil(T / 4) loops
    model, ids = lively(config), ids_for(config, length=6)
    last = Cache.for_model(config, kv_policy="last")
    assert decode(model, ids[:, :3], [3], last, 4).isfinite().all()
    assert decode(model, ids[:, 3:], [3], last, 1).isfinite().all()
    ring = Cache.for_model(config)
    assert decode(model, ids[:, :3], [3], ring, 7).isfinite().all()
    assert decode(model, ids[:, 3:5], [2], ring, 5).isfinite().all()
    with pytest.raises(ValueError, match="n_loops = 4: this cache was filled with n_loops = 5"):
        decode(model, ids[:, 5:], [1], ring, 4)


def test_policies_that_cannot_be_are_refused() -> None:
    gated = STRUCTURES["gated"]
    for config, policy in ((PLAIN, "gated"), (gated, "per_loop"), (gated, "last")):
        with pytest.raises(ValueError, match=f"kv_policy = {policy}: this model was trained with {'kv_policy'} ="):
            Cache.for_model(config, kv_policy=policy)
    assert Cache.for_model(gated, kv_policy="gated").loop_slots is None
    with pytest.raises(ValueError, match="kv_policy = all: must be one of per_loop, ring, last, gated"):
        Cache.for_model(PLAIN, kv_policy="all")
    with pytest.raises(ValueError, match=r"kv_policy = ring: 2 slots of 2 recurrent_layers .*full_attention_every = 3"):
        Cache.for_model(PATTERN, kv_policy="ring")
    assert Cache.for_model(with_fields(PATTERN, full_attention_every=4), kv_policy="ring").loop_slots == 2


@pytest.mark.parametrize("policy", ["per_loop", "ring", "last"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_bytes_are_what_the_configuration_says(structure: str, policy: str) -> None:
    config = STRUCTURES[structure]
    if config.kv_policy == "gated":
        policy = "gated"
    if structure == "pattern" and policy != "per_loop":
        config = with_fields(config, full_attention_every=2)
    model, ids = IceModel(config), torch.zeros(3, 31, dtype=torch.int64)
    for n_loops in (1, 5):
        cache = Cache.for_model(config, kv_policy=policy)
        decode(model, ids, [30, 1], cache, n_loops)
        says = cache_bytes(config, n_loops, bytes_per_number=4, kv_policy=policy)
        assert cache.bytes_per_token() == says.per_token == cache_bytes_per_token(config, n_loops, 4, policy)
        assert 31 * says.per_token <= cache.bytes_used() / 3 - says.constant <= 1.25 * 31 * says.per_token
