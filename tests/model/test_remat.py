"""Every policy gives the same bits; each stores what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from amplified import amplified
from stored_bytes import LiveBytes, StoredBytes, stored_bytes

from model import IceConfig, IceModel, remat
from model.remat import checkpointed, keep, segments
from model.remat.tape import Playing, Tape

SMALL = IceConfig(recurrent_layers=2, tie_embeddings=True).scaled_down()
STRUCTURES: dict[str, IceConfig] = {
    "experts": SMALL,
    "act": IceConfig(act=True).scaled_down(),
    "aec": IceConfig(aec=True, aec_confidence=0.3, aec_drift=0.5, attn_type="mla").scaled_down(),
    "all_at_once": IceConfig(
        attn_type="moda_v2",
        n_kv_heads=16,
        msrd_scales=(1, 2),
        act=True,
        slu=True,
        aec=True,
        aec_confidence=0.3,
        aec_drift=0.5,
        lora_rank=4,
        moe_n_groups=4,
        moe_topk_groups=2,
    ).scaled_down(),
    "gated_loops": IceConfig(kv_policy="gated").scaled_down(),
    "dense": IceConfig(n_experts=0, initial_state="random").scaled_down(),
}
WAYS: dict[str, tuple[Any, ...]] = {
    "none_but_blocks": ("none", "block", False),
    "loop": ("loop", None, False),
    "routes": ("routes", "none", False),
    "dispatch": ("dispatch", None, False),
    "sqrt": ("sqrt", None, False),
    "loop_offloaded": ("loop", None, True),
    "routes_offloaded": ("routes", None, True),
    "sqrt_offloaded": ("sqrt", None, True),
}
PLANS: dict[str, dict[str, Any]] = {
    "all_loops": {"n_loops": 5},
    "truncated": {"n_loops": 7, "grad_loops": 3},
    "own_depths_and_reads": {
        "n_loops": 6,
        "grad_loops": 4,
        "sequence_loops": torch.tensor([3, 6]),
        "read_loops": (1, 4, 5),
    },
    "one_loop": {"n_loops": 1},
}


def everything(model: IceModel, ids: torch.Tensor, **plan: Any) -> dict[str, torch.Tensor]:
    """Loss, measurements and gradients of a step, and the load it counted."""
    model.zero_grad()
    torch.manual_seed(7)
    if model.config.slu and plan["n_loops"] > 2:
        plan = plan | {"probe_loop": 2}
    output = model(ids[:, :-1], targets=ids[:, 1:], return_output=True, **plan)
    loss = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten()) + 0.01 * output.ponder_cost
    if output.read_logits_NBSV is not None:
        loss = loss + output.read_logits_NBSV.square().mean() + output.states_NBSD.square().mean()
    if output.probe is not None:
        loss = loss + output.probe.benefit_logits_HBS.square().mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    load = {"load": model.core.expert_load.take()}
    measured = {"loss": loss.detach(), "residual": output.loop_residual, "share": output.expert_share}
    return found | load | measured


@pytest.mark.parametrize(
    ("structure", "plan"),
    [("experts", plan) for plan in PLANS if plan != "own_depths_and_reads"]
    + [(structure, "own_depths_and_reads") for structure in STRUCTURES],
)
def test_every_policy_gives_the_bits_of_keeping_everything(structure: str, plan: str) -> None:
    config = STRUCTURES[structure]
    model = amplified(config)
    ids = torch.randint(0, config.vocab_size, (2, 12))
    expected = everything(model, ids, **PLANS[plan])
    for way, (policy, once, offload) in WAYS.items():
        model.set_remat(policy, once, offload)
        got = everything(model, ids, **PLANS[plan])
        assert got.keys() == expected.keys(), way
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), f"{way}: {name}"


@pytest.mark.parametrize("way", [way for way in WAYS if way != "none_but_blocks"])
def test_a_retained_graph_can_be_walked_twice(way: str) -> None:
    model = amplified(SMALL)
    policy, once, offload = WAYS[way]
    model.set_remat(policy, once, offload)
    ids = torch.randint(0, SMALL.vocab_size, (2, 12))
    parameters = list(model.parameters())
    loss = model(ids, n_loops=5).square().mean()
    first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    load = model.core.expert_load.take()
    second = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert model.core.expert_load.take().sum() == 0 < load.sum()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("policy", "times"), [("loop", 2), ("routes", 1), ("dispatch", 1), ("sqrt", 3)])
def test_routing_is_decided_again_only_where_nothing_was_kept(
    policy: remat.RematPolicy, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import model.moe

    calls: list[str] = []
    for name in ("select_experts", "plan_dispatch"):
        original = getattr(model.moe, name)

        def counting(*args: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(model.moe, name, counting)
    ice = amplified(IceConfig().scaled_down())
    ice.set_remat(policy)
    loops = 9
    ice(torch.zeros(1, 4, dtype=torch.int64), n_loops=loops).sum().backward()
    # sqrt: the last of three segments is not recomputed as such, and of the others not what comes after the last
    # loop's start.
    expected = loops * times if policy != "sqrt" else 2 * loops + 2 * 2
    assert calls.count("select_experts") == calls.count("plan_dispatch") == expected


def stored(model: IceModel, n_loops: int, **plan: Any) -> StoredBytes:
    ids = torch.randint(0, model.config.vocab_size, (2, 24))
    return stored_bytes(lambda: model(ids, n_loops=n_loops, **plan).sum())


def state_bytes(config: IceConfig) -> int:
    return 2 * 24 * config.dim * 4


@pytest.mark.parametrize("structure", ["experts", "dense", "mla"])
def test_loop_stores_one_state_a_loop_and_nothing_else(structure: str) -> None:
    config = IceConfig(attn_type="mla").scaled_down() if structure == "mla" else STRUCTURES[structure]
    model = amplified(config)
    model.set_remat("loop")
    by_depth = {n: stored(model, n) for n in (1, 2, 5, 16)}
    for n, bytes_of in by_depth.items():
        assert bytes_of.device - by_depth[1].device == (n - 1) * state_bytes(config)
        assert bytes_of.tape == bytes_of.host == 0


def test_truncated_loops_store_nothing() -> None:
    model = amplified(SMALL)
    model.set_remat("loop")
    few, many = (stored(model, n, grad_loops=3).device for n in (5, 50))
    assert few == many


def test_sqrt_at_64_loops_stores_at_most_035_of_loop() -> None:
    model = amplified(SMALL)
    grown = {}
    for policy in ("loop", "sqrt"):
        model.set_remat(policy)  # type: ignore[arg-type]
        grown[policy] = stored(model, 64).device - stored(model, 1).device
    assert grown["loop"] == 63 * state_bytes(SMALL)
    # 7 later segment starts, 7 later loop starts in the last segment; and a number a token, of what has not moved yet.
    assert grown["sqrt"] == 14 * state_bytes(SMALL) + 2 * 24 * 4
    assert grown["sqrt"] <= 0.35 * grown["loop"]


def test_routes_adds_indices_only() -> None:
    model = amplified(SMALL)
    model.set_remat("routes")
    one, nine = stored(model, 1), stored(model, 9)
    assert nine.device - one.device == 8 * state_bytes(SMALL)
    choices, experts = 2 * 24 * SMALL.n_experts_per_tok, SMALL.n_experts
    # int32 each: the experts, where each choice's row lies, which token a row is; counts and ends by expert.
    assert one.tape == SMALL.recurrent_layers * 4 * (3 * choices + 2 * experts)
    assert nine.tape == 9 * one.tape


def test_offloaded_states_leave_the_device_and_are_freed_after_the_backward() -> None:
    model = amplified(SMALL)
    model.set_remat("loop", offload=True)
    by_depth = {n: stored(model, n) for n in (1, 2, 9)}
    # The first loop starts from e, which all loops share and which stays.
    assert [bytes_of.host for bytes_of in by_depth.values()] == [n * state_bytes(SMALL) for n in (0, 1, 8)]
    assert len({bytes_of.device for bytes_of in by_depth.values()}) == 1
    assert all(bytes_of.host_afterwards == 0 for bytes_of in by_depth.values())


def test_what_a_loop_hands_on_is_kept_once_however_many_loops_see_it() -> None:
    config = IceConfig(attn_type="moda_v2", n_kv_heads=16, moda_history_window=3).scaled_down()
    model = amplified(config)
    keys_and_values = 2 * config.n_kv_heads * config.head_dim * 2 * 24 * 4
    for offload in (False, True):
        model.set_remat("loop", offload=offload)
        three, nine = (stored(model, n) for n in (3, 9))
        grown = nine.host - three.host if offload else nine.device - three.device
        assert grown == 6 * (state_bytes(config) + keys_and_values)


@pytest.mark.parametrize("way", ["none", *WAYS])
def test_the_counters_account_for_all_memory_that_a_loop_takes(way: str) -> None:
    """What is alive after a forward grows by what the graph, the tapes and the host copies are counted to hold."""
    model = amplified(SMALL)
    if way in WAYS:
        model.set_remat(*WAYS[way])
    alive, counted = {}, {}
    for n_loops in (2, 6):
        with LiveBytes() as live:
            loss = model(torch.zeros(2, 24, dtype=torch.int64), n_loops=n_loops).sum()
        alive[n_loops] = live.now
        del loss
        counted[n_loops] = sum(stored(model, n_loops)[:3])
    model.core.expert_load.take()
    rounding = 4 * 4 * SMALL.recurrent_layers * SMALL.n_experts * 8  # the load's own counts, of 4 more loops
    assert 0 <= (alive[6] - alive[2]) - (counted[6] - counted[2]) <= rounding + 1024, (alive, counted)


def test_a_tape_replays_in_order_from_the_start_each_time_and_only_its_kinds() -> None:
    tape, answers = Tape(frozenset({"routes"})), iter(range(100))

    def ask() -> tuple[int, torch.Tensor, int]:
        number = keep("routes", lambda: next(answers))
        indices = keep("routes", lambda: torch.tensor([next(answers), 7]))
        return number, indices, keep("dispatch", lambda: next(answers))

    assert keep("routes", lambda: next(answers)) == 0  # no tape: an ordinary call
    with Playing(tape, replaying=False):
        first = ask()
    replay = Playing(tape, replaying=True)
    for dispatched in (4, 5):
        with replay:
            again = ask()
        assert again[0] == first[0] == 1
        assert torch.equal(again[1], first[1])
        assert again[1].dtype == torch.int64
        assert again[2] == dispatched  # not kept: asked again
    assert [tensor.dtype for tensor in tape.tensors()] == [torch.int32]


def test_nested_tapes_do_not_disturb_each_other() -> None:
    answers = iter(range(2, 100))

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x * keep("routes", lambda: next(answers))

    def outer(x: torch.Tensor) -> torch.Tensor:
        x = inner(x)
        x = checkpointed(inner, x.sin(), kinds=frozenset({"routes"}))
        return inner(x.sin())

    x = torch.ones(2, requires_grad=True)
    y = checkpointed(outer, x, kinds=frozenset({"routes"}))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    by_hand = (((x * 2).sin() * 3).sin() * 4).sum()
    assert torch.equal(gradient, torch.autograd.grad(by_hand, x)[0])


@pytest.mark.parametrize("loops", [range(1), range(2), range(3, 12), range(64), range(7, 57)])
def test_segments_are_all_loops_in_runs_of_the_square_root(loops: range) -> None:
    parts = segments(loops, nested=True)
    assert [loop for part in parts for loop in part] == list(loops)
    longest = max(map(len, parts))
    assert (longest - 1) ** 2 < len(loops) <= longest**2
    assert len(parts) <= longest
    assert segments(loops, nested=False) == [loops]


def test_what_cannot_be_is_refused() -> None:
    model = IceModel(SMALL)
    with pytest.raises(ValueError, match="remat = full: must be one of none, loop, routes, dispatch, sqrt"):
        model.set_remat("full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="remat_once = loop: must be one of none, block"):
        model.set_remat("loop", "loop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="remat_offload = true: remat = none"):
        model.set_remat("none", offload=True)
