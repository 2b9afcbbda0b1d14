import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from amplified import amplified
from slow_reference import naive_rope
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import IceConfig, IceModel
from model.attention import (
    Cache,
    Carry,
    GroupedQueryAttention,
    MoDAv2Attention,
    SequenceContext,
    Site,
    attention_mask,
    build_attention,
    joint_softmax,
    rope_tables,
)
from model.attention.causal import Memory
from model.attention.flash_kernels import CpuFlash, CudaEfficient, CudaFlash, FlashKernel, FlashResult, flash_kernel
from model.attention.joint_softmax import joint_attention, written_out
from model.attention.moda import heads_of_resolution
from model.parameters import cache_bytes_per_token

SMALL = IceConfig(attn_type="moda_v2", qk_norm=True, recurrent_layers=2).scaled_down()


def with_fields(config: IceConfig, **fields: object) -> IceConfig:
    return IceConfig.model_validate(config.model_dump() | fields)


# Two query heads to a key head, four key heads over three resolutions.
GROUPED = with_fields(SMALL, n_heads=8)
SLIDING = with_fields(GROUPED, sliding_window=3, full_attention_every=3)


def site(config: IceConfig, length: int, window: int | None = None, padding: torch.Tensor | None = None) -> Site:
    rope = rope_tables(config, 0, length, torch.device("cpu"))
    return SequenceContext(rope, padding_B=padding).site("core", 0, window=window)


def run_loops(attention: MoDAv2Attention, inputs: list[torch.Tensor], where: Site) -> list[torch.Tensor]:
    """What the layer writes in each loop, given what it reads in each."""
    carry: Carry = ()
    outputs = []
    for x in inputs:
        output, carry = attention(x, where, carry)
        outputs.append(output)
    return outputs


# --- the layer against its definition


def naive_moda(
    attention: MoDAv2Attention,
    config: IceConfig,
    inputs: list[torch.Tensor],
    window: int | None = None,
    padding: list[int] | None = None,
) -> list[torch.Tensor]:
    """Loops over loops, sequences, heads, positions, keys and history, in float64."""
    batch, length, _ = inputs[0].shape
    heads, keys, width = config.n_heads, config.n_kv_heads, config.head_dim
    scale = (0.1 * math.log(config.rope_scaling_factor) + 1) ** 2 / math.sqrt(width)
    weight = attention.qkv_proj.weight.double()
    past: list[tuple[torch.Tensor, torch.Tensor]] = []
    outputs = []
    for x in inputs:
        rows = (x.double() @ weight.T).view(batch, length, heads + 2 * keys, width)
        q, k, v = rows[:, :, :heads], rows[:, :, heads : heads + keys], rows[:, :, heads + keys :]
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = (
                part / (part.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight.double()
                for part, norm in ((q, attention.q_norm), (k, attention.k_norm))
            )
        turned_q, turned_k = torch.zeros_like(q), torch.zeros_like(k)
        for g in range(keys):
            theta = config.rope_theta * (1, 2, 4)[3 * g // keys]
            turned_k[:, :, g] = naive_rope(k[:, :, g].clone(), list(range(length)), theta)
            for h in range(g * heads // keys, (g + 1) * heads // keys):
                turned_q[:, :, h] = naive_rope(q[:, :, h].clone(), list(range(length)), theta)
        out = torch.zeros_like(q)
        for b in range(batch):
            for h in range(heads):
                g = h * keys // heads
                for p in range(length):
                    first = 0 if window is None else max(0, p - window + 1)
                    seen = [i for i in range(first, p + 1) if i == p or padding is None or i >= padding[b]]
                    pairs = [(turned_k[b, i, g], v[b, i, g]) for i in seen]
                    pairs += [(pk[b, p, g], pv[b, p, g]) for pk, pv in past[-config.moda_history_window :]]
                    exponentials = [math.exp(scale * float(turned_q[b, p, h] @ key)) for key, _ in pairs]
                    for e, (_, value) in zip(exponentials, pairs, strict=True):
                        out[b, p, h] += e / sum(exponentials) * value
        past.append((turned_k, v))
        outputs.append(out.flatten(2) @ attention.o_proj.weight.double().T)
    return outputs


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize(
    ("fields", "window", "padding"),
    [
        ({"moda_history_window": 1}, None, None),
        ({"n_heads": 8, "moda_history_window": 2}, None, None),
        ({"n_heads": 8, "moda_history_window": 9, "qk_norm": False}, None, None),
        ({"n_heads": 16, "n_kv_heads": 16}, 3, None),
        ({"n_heads": 8}, None, [0, 3]),
        ({"n_heads": 8}, 2, [4, 0]),
        ({"n_heads": 8, "rope_scaling_factor": 4.0, "rope_original_seq_len": 1_000_000}, None, None),
    ],
)
def test_layer_is_loops_over_positions_heads_and_history(
    fields: dict[str, object], window: int | None, padding: list[int] | None, backend: SDPBackend
) -> None:
    config = with_fields(SMALL, **fields)
    attention = MoDAv2Attention(config)
    if attention.q_norm is not None and attention.k_norm is not None:
        torch.nn.init.uniform_(attention.q_norm.weight, 0.5, 2)
        torch.nn.init.uniform_(attention.k_norm.weight, 0.5, 2)
    inputs = [torch.randn(2, 5, config.dim) for _ in range(4)]
    where = site(config, 5, window, None if padding is None else torch.tensor(padding))
    # In the last case YaRN leaves these few positions' angles alone and only raises the logits.
    with torch.no_grad(), sdpa_kernel(backend):
        actual = run_loops(attention, inputs, where)
        expected = naive_moda(attention, config, inputs, window, padding)
    for ours, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-4)


def test_without_history_and_with_one_resolution_it_is_gqa_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IceConfig, "rope_resolutions", property(lambda config: (1.0, 1.0, 1.0)))
    moda, gqa = MoDAv2Attention(GROUPED), GroupedQueryAttention(with_fields(GROUPED, attn_type="gqa"))
    gqa.load_state_dict(moda.state_dict())
    x = torch.randn(2, 7, GROUPED.dim)
    tables = rope_tables(GROUPED, 0, 7, x.device)
    one = SequenceContext(tables._replace(cos=tables.cos[:1], sin=tables.sin[:1]))
    assert torch.equal(moda(x, site(GROUPED, 7))[0], gqa(x, one.site("core", 0))[0])


@pytest.mark.parametrize("window", [1, 2, 3])
def test_history_ends_at_the_window(window: int) -> None:
    config = with_fields(GROUPED, moda_history_window=window)
    attention = MoDAv2Attention(config)
    inputs = [torch.randn(1, 4, config.dim, requires_grad=True) for _ in range(5)]
    run_loops(attention, inputs, site(config, 4))[-1].sum().backward()
    reached = [x.grad is not None and bool(x.grad.abs().sum() > 0) for x in inputs]
    assert reached == [False] * (4 - window) + [True] * (window + 1)


def test_history_is_of_the_same_position_only() -> None:
    attention = MoDAv2Attention(GROUPED)
    inputs = [torch.randn(1, 4, GROUPED.dim, requires_grad=True) for _ in range(3)]
    run_loops(attention, inputs, site(GROUPED, 4))[-1][:, 2].sum().backward()
    for earlier in inputs[:2]:
        assert earlier.grad is not None
        assert earlier.grad.abs().sum(-1).bool().tolist() == [[False, False, True, False]]
    assert inputs[2].grad is not None
    assert inputs[2].grad.abs().sum(-1).bool().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("n_kv_heads", [3, 4, 6])
def test_each_head_group_turns_at_its_own_resolution(n_kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_fields(SMALL, n_heads=12, n_kv_heads=n_kv_heads, dim=96)
    attention = MoDAv2Attention(config)
    attention.o_proj = torch.nn.Identity()
    inputs = [torch.randn(1, 9, config.dim) for _ in range(2)]
    before = run_loops(attention, inputs, site(config, 9))[-1].unflatten(-1, (12, -1))
    group = [3 * (h * n_kv_heads // 12) // n_kv_heads for h in range(12)]
    assert set(group) == {0, 1, 2}
    for changed in range(3):
        factors = tuple(64.0 if r == changed else 2.0**r for r in range(3))
        monkeypatch.setattr(IceConfig, "rope_resolutions", property(lambda config, factors=factors: factors))
        after = run_loops(attention, inputs, site(config, 9))[-1].unflatten(-1, (12, -1))
        moved = [not torch.equal(before[..., h, :], after[..., h, :]) for h in range(12)]
        assert moved == [group[h] == changed for h in range(12)]


def test_heads_of_resolution_covers_every_head_once() -> None:
    assert heads_of_resolution(GROUPED) == ((0, 4), (1, 2), (2, 2), (0, 2), (1, 1), (2, 1))


# --- the joint softmax


def tensors(
    heads: int, groups: int, queries: int, keys: int, history: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """q, k, v, then ``history`` pairs of k' and v'."""
    shapes = [(heads, queries), (groups, keys), (groups, keys)] + 2 * history * [(groups, queries)]
    return [torch.randn(2, h, length, 4, dtype=dtype, requires_grad=True) for h, length in shapes]


def mask_for(queries: int, keys: int, window: int | None, padding: list[int] | None) -> torch.Tensor | None:
    padding_B = None if padding is None else torch.tensor(padding)
    memory = Memory((torch.empty(2, 1, keys, 1),))
    return attention_mask(queries, memory, window, padding_B, past=keys - queries)


# heads, key heads, queries, keys, history, window, padding
CASES = {
    "one_head": (1, 1, 4, 4, 1, None, None),
    "grouped": (4, 2, 4, 4, 3, None, None),
    "one_key_head": (3, 1, 3, 3, 2, None, None),
    "decode": (4, 2, 1, 6, 2, None, None),
    "one_token": (2, 2, 1, 1, 2, None, None),
    "chunk": (4, 2, 3, 5, 2, None, None),
    "window": (4, 2, 5, 5, 2, 2, None),
    "padding": (4, 2, 4, 4, 1, None, [0, 2]),
    "window_and_padding": (2, 1, 5, 5, 2, 3, [3, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_joint_softmax_gradients_match_finite_differences(case: str) -> None:
    heads, groups, queries, keys, history, window, padding = CASES[case]
    mask = mask_for(queries, keys, window, padding)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        assert isinstance(flash_kernel(q, k, v, mask), CpuFlash)
        return joint_attention(q, k, v, own, 0.7, mask)

    assert torch.autograd.gradcheck(attend, tensors(heads, groups, queries, keys, history), fast_mode=True)


@pytest.mark.parametrize("case", [*CASES, "long"])
def test_fused_joint_softmax_equals_the_written_out_one(case: str) -> None:
    heads, groups, queries, keys, history, window, padding = CASES.get(case, (4, 2, 150, 150, 2, 70, [9, 0]))
    mask = mask_for(queries, keys, window, padding)
    inputs = tensors(heads, groups, queries, keys, history)
    outputs, gradients = [], []
    for attend in (joint_attention, written_out):
        output = attend(*inputs[:3], tuple(inputs[3:]), 0.7, mask)
        outputs.append(output)
        gradients.append(
            torch.autograd.grad((output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum(), inputs)
        )
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("attend", [joint_attention, written_out])
def test_the_larger_score_wins_without_overflow(attend: Callable[..., torch.Tensor]) -> None:
    q, _, v, _, own_v = (x.detach().float() for x in tensors(1, 1, 1, 1, 1))
    # Scores of +-1e4: exp() of either overflows or vanishes in fp32.
    towards, away = q * (1e4 / q.pow(2).sum()), -q * (1e4 / q.pow(2).sum())
    torch.testing.assert_close(attend(q, towards, v, (away, own_v), 1.0), v)
    torch.testing.assert_close(attend(q, away, v, (towards, own_v), 1.0), own_v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_joined_in_fp32(dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors(4, 2, 40, 40, 3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    # Scores of about 6: rounded to half precision they would be off by several eps, and the weights with them.
    output = joint_attention(*inputs[:3], tuple(inputs[3:]), 3.0)
    reference = written_out(*exact[:3], tuple(exact[3:]), 3.0)
    eps = torch.finfo(dtype).eps
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), reference, atol=eps, rtol=eps)
    found, expected = torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(reference.sum(), exact)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, atol=20 * eps, rtol=20 * eps)


def test_constant_history_gets_no_gradient_and_changes_no_other() -> None:
    inputs = tensors(4, 2, 5, 5, 2)
    constant = [*inputs[:3], inputs[3].detach(), inputs[4], inputs[5], inputs[6].detach()]
    everything = torch.autograd.grad(joint_attention(*inputs[:3], tuple(inputs[3:]), 0.7).sum(), inputs)
    wanted = [x for x in constant if x.requires_grad]
    some = torch.autograd.grad(joint_attention(*constant[:3], tuple(constant[3:]), 0.7).sum(), wanted)
    assert all(torch.equal(a, everything[i]) for a, i in zip(some, (0, 1, 2, 4, 5), strict=True))


def test_nothing_of_size_sequence_squared_and_no_copy_of_history_is_stored() -> None:
    attention = MoDAv2Attention(with_fields(GROUPED, moda_history_window=8))
    length, loops = 96, 6
    stored: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def stored_after(n_loops: int) -> int:
        stored.clear()
        inputs = [torch.randn(1, length, GROUPED.dim) for _ in range(n_loops)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run_loops(attention, inputs, site(GROUPED, length))  # the outputs, and so the graph, are dropped
        assert max(stored.values()) < 4 * length**2 * GROUPED.n_heads
        return sum(stored.values())

    # Storage that grows with the number of loops only, not with loops x history.
    first, second, third = stored_after(2), stored_after(loops), stored_after(2 * loops - 2)
    assert third - second == second - first


class PaddedFlash(CpuFlash):
    """Returns the logsumexp as the memory-efficient CUDA kernel does: rows padded to 32 with infinity."""

    def forward(self, *args: object) -> FlashResult:  # type: ignore[override]
        result = super().forward(*args)  # type: ignore[arg-type]
        padding = -result.lse_BHS.shape[-1] % 32
        return result._replace(lse_BHS=F.pad(result.lse_BHS, (0, padding), value=math.inf))

    def backward(self, *args: object) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        *rest, result = args
        assert isinstance(result, FlashResult)
        assert isinstance(rest[1], torch.Tensor)
        length = rest[1].shape[-2]
        assert result.lse_BHS.shape[-1] % 32 == 0
        assert torch.isposinf(result.lse_BHS[..., length:]).all()
        own_layout = result.lse_BHS[..., :length].transpose(1, 2).contiguous().transpose(1, 2)
        return super().backward(*rest, result._replace(lse_BHS=own_layout))  # type: ignore[arg-type]


def test_a_padded_logsumexp_keeps_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(4, 2, 5, 5, 2)
    expected = torch.autograd.grad(written_out(*inputs[:3], tuple(inputs[3:]), 0.7).sum(), inputs)
    monkeypatch.setattr(joint_softmax, "flash_kernel", lambda *args: PaddedFlash())
    actual = torch.autograd.grad(joint_attention(*inputs[:3], tuple(inputs[3:]), 0.7).sum(), inputs)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "dtype", "masked"),
    [
        (CudaFlash(), torch.bfloat16, False),
        (CudaEfficient(), torch.float32, False),
        (CudaEfficient(), torch.bfloat16, True),
    ],
)
def test_cuda_kernels_are_called_as_their_schemas_say(
    kernel: FlashKernel, dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes only: the meta device runs torch's own shape functions of the CUDA operators."""
    monkeypatch.setattr(joint_softmax, "flash_kernel", lambda *args: kernel)
    q = torch.empty(2, 4, 37, 16, dtype=dtype, device="meta", requires_grad=True)
    k, v, *own = (torch.empty(2, 2, 37, 16, dtype=dtype, device="meta", requires_grad=True) for _ in range(6))
    mask = torch.zeros(2, 1, 37, 37, device="meta") if masked else None
    output = joint_attention(q, k, v, tuple(own), 0.5, mask)
    assert (output.shape, output.dtype) == (q.shape, dtype)
    output.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v, *own))


def test_where_no_kernel_applies_scores_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, *own = (x.detach() for x in tensors(4, 2, 5, 5, 2))
    assert isinstance(flash_kernel(q, k, v), CpuFlash)
    channels_apart = q.transpose(-2, -1).contiguous().transpose(-2, -1)
    assert flash_kernel(channels_apart, k, v) is None
    assert flash_kernel(*(x.to("meta") for x in (q, k, v))) is None
    with sdpa_kernel(SDPBackend.MATH):
        assert flash_kernel(q, k, v) is None
    expected = joint_attention(q, k, v, tuple(own), 0.7)
    torch.testing.assert_close(joint_attention(channels_apart, k, v, tuple(own), 0.7), expected)
    monkeypatch.setattr(joint_softmax, "written_out", lambda *args: pytest.fail("written out"))
    joint_attention(q, k, v, tuple(own), 0.7)


# --- the model


def gradients(model: IceModel, ids: torch.Tensor, **kwargs: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = F.cross_entropy(model(ids[:, :-1], **kwargs).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {
        "loss": loss.detach()
    }


def test_specifications_example_works() -> None:
    config = IceConfig(attn_type="moda_v2", moda_history_window=8, dim=2048, n_heads=16)
    attention = build_attention(config.scaled_down())
    assert isinstance(attention, MoDAv2Attention)
    assert config.moda_history_window == 8


@pytest.mark.parametrize("fields", [{}, {"msrd_scales": (1, 2)}, {"sandwich_norm": True, "n_experts": 0}])
def test_every_parameter_is_trained(fields: dict[str, object]) -> None:
    model = IceModel(with_fields(GROUPED, **fields))
    found = gradients(model, torch.randint(0, 256, (4, 33)))
    assert {name for name, _ in model.named_parameters()} == found.keys() - {"loss"}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if ".attention" in name)


@torch.no_grad()
def test_the_core_hands_the_layer_as_many_loops_as_the_window_says() -> None:
    model, longer = amplified(GROUPED).eval(), IceModel(with_fields(GROUPED, moda_history_window=3)).eval()
    longer.load_state_dict(model.state_dict())
    ids = torch.randint(0, 256, (2, 8))
    # Windows of two and three loops part in the fourth.
    assert all(torch.equal(model(ids, loops), longer(ids, loops)) for loops in (1, 2, 3))
    assert (model(ids, 4) - longer(ids, 4)).abs().max() > 1e-3


@pytest.mark.parametrize("n_loops", [1, 3, 5])
@pytest.mark.parametrize("config", [GROUPED, SLIDING], ids=["full", "sliding"])
def test_checkpointing_changes_no_bit(config: IceConfig, n_loops: int) -> None:
    model = amplified(config)
    ids = torch.randint(0, 256, (2, 12))
    for grad_loops in (None, 1, 2):
        model.set_remat("none")
        stored = gradients(model, ids, n_loops=n_loops, grad_loops=grad_loops)
        model.set_remat("loop")
        recomputed = gradients(model, ids, n_loops=n_loops, grad_loops=grad_loops)
        assert stored.keys() == recomputed.keys()
        assert all(torch.equal(stored[name], recomputed[name]) for name in stored)


@pytest.mark.parametrize("config", [GROUPED, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("n_loops", [1, 2, 5])
@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 3, 1, 1]], ids=["single", "chunks"])
@torch.no_grad()
def test_decoding_equals_the_full_forward(config: IceConfig, n_loops: int, pieces: list[int]) -> None:
    model = amplified(config).eval()
    ids = torch.randint(0, 256, (2, 10))
    cache = Cache()
    actual = torch.cat([model(piece, n_loops, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(actual, model(ids, n_loops), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_cache_holds_what_gqas_does() -> None:
    bytes_per_token = []
    for attn_type in ("moda_v2", "gqa"):
        cache = Cache()
        IceModel(with_fields(GROUPED, attn_type=attn_type))(torch.zeros(1, 3, dtype=torch.int64), 4, cache=cache)
        bytes_per_token.append(cache.bytes_per_token())
    assert bytes_per_token[0] == bytes_per_token[1] == cache_bytes_per_token(GROUPED, 4, bytes_per_number=4)


@torch.no_grad()
def test_padded_rows_say_what_they_say_alone() -> None:
    model = amplified(GROUPED).eval()
    ids = torch.randint(0, 256, (1, 7))
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), dim=1)
    both = torch.cat((padded, torch.randint(0, 256, (1, 10))))
    actual = model(both, 4, padding=torch.tensor([3, 0]))
    # RoPE sees differences of positions only, so three to the right is the same text.
    torch.testing.assert_close(actual[:1, 3:], model(ids, 4), atol=2e-5, rtol=1e-4)
