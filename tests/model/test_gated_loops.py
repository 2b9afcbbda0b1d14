import pytest
import torch
from amplified import amplified
from slow_reference import naive_attention, naive_rope

from model import IceConfig, IceModel
from model.attention import Cache, GatedLoopAttention, SequenceContext, Site, build_attention, rope_tables
from model.parameters import cache_bytes

CONFIGS = {
    "gqa": IceConfig(kv_policy="gated", recurrent_layers=2).scaled_down(),
    "mla": IceConfig(kv_policy="gated", attn_type="mla").scaled_down(),
}
LENGTH = 14  # longer than the gate's window of 8


def with_fields(config: IceConfig, **fields: object) -> IceConfig:
    return IceConfig.model_validate(config.model_dump() | fields)


def gated(config: IceConfig) -> GatedLoopAttention:
    attention = build_attention(config, looped=True)
    assert isinstance(attention, GatedLoopAttention)
    torch.nn.init.normal_(attention.gate.weight, std=0.3)
    torch.nn.init.normal_(attention.gate_bias)
    return attention


def lively(config: IceConfig) -> IceModel:
    return amplified(config, uneven=("gate_bias", ".gate.weight")).eval()


def site(config: IceConfig, loop: int) -> Site:
    return SequenceContext(rope_tables(config, 0, LENGTH, torch.device("cpu"))).site("core", 0, loop)


def heads(config: IceConfig, attention: GatedLoopAttention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of every head, float64, rotated, (B, H, S, width)."""
    inner, positions = attention.attention, list(range(x.shape[1]))
    x = x.double()

    def projected(name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows @ inner.get_submodule(name).weight.double().T

    if config.attn_type == "gqa":
        wide = projected("qkv_proj", x).view(*x.shape[:2], -1, config.head_dim).transpose(1, 2)
        q, k, v = wide.split([config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=1)
        repeat = config.n_heads // config.n_kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        return naive_rope(q, positions, config.rope_theta), naive_rope(k, positions, config.rope_theta), v
    q = projected("q_proj", x).view(*x.shape[:2], config.n_heads, -1).transpose(1, 2)
    latent, k_rope = projected("kv_a_proj", x).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    latent = latent / (latent.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
    k, v = projected("kv_b_proj", latent).view(*x.shape[:2], config.n_heads, -1).transpose(1, 2).split(16, dim=-1)
    k_rope = naive_rope(k_rope.unsqueeze(1), positions, config.rope_theta).expand(-1, config.n_heads, -1, -1)
    q = torch.cat((q[..., :16], naive_rope(q[..., 16:], positions, config.rope_theta)), dim=-1)
    return q, torch.cat((k, k_rope), dim=-1), v


@pytest.mark.parametrize("name", CONFIGS)
def test_later_loops_match_the_float64_formula(name: str) -> None:
    config = CONFIGS[name]
    attention = gated(config)
    first_x, second_x, third_x = torch.randn(3, 2, LENGTH, config.dim)
    scale, window = config.qk_head_dim**-0.5, config.kv_gate_window
    out_proj = attention.attention.o_proj.weight.double().T
    carry: tuple[torch.Tensor, ...] = ()
    _, shared_k, shared_v = heads(config, attention, first_x)
    for loop, x in enumerate((first_x, second_x, third_x)):
        actual, carry = attention(x, site(config, loop), carry)
        q, k, v = heads(config, attention, x)
        mixed = naive_attention(q, shared_k, shared_v, scale)
        if loop > 0:
            gate = (x.double() @ attention.gate.weight.double().T + attention.gate_bias.double()).sigmoid()
            for i in range(LENGTH):
                seen = slice(max(i - window + 1, 0), i + 1)
                local = naive_attention(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen], scale)[:, :, 0]
                share = gate[:, i].unsqueeze(-1)
                mixed[:, :, i] = share * mixed[:, :, i] + (1 - share) * local
        expected = mixed.transpose(1, 2).flatten(2) @ out_proj
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_gate_mixes_evenly_and_a_saturated_one_chooses(name: str) -> None:
    config = CONFIGS[name]
    attention = build_attention(config, looped=True)
    x = torch.randn(1, LENGTH, config.dim)
    _, carry = attention(torch.randn_like(x), site(config, 0))

    def with_bias(value: float) -> torch.Tensor:
        torch.nn.init.constant_(attention.gate_bias, value)
        out: torch.Tensor = attention(x, site(config, 1), carry)[0]
        return out

    shared, local = with_bias(99.0), with_bias(-99.0)
    torch.testing.assert_close(with_bias(0.0), (shared + local) / 2, atol=1e-6, rtol=1e-4)
    # The local half is the plain attention with a sliding window.
    window = SequenceContext(site(config, 0).rope).site("core", 0, 0, config.kv_gate_window)
    torch.testing.assert_close(local, attention.attention(x, window)[0])
    assert not torch.allclose(shared, local)


def test_only_the_core_has_gates_and_only_when_asked_for() -> None:
    for config in CONFIGS.values():
        plain = IceModel(with_fields(config, kv_policy="per_loop"))
        model = IceModel(config)
        wrappers = {name for name, module in model.named_modules() if isinstance(module, GatedLoopAttention)}
        assert wrappers == {f"core.blocks.{layer}.attention" for layer in range(config.recurrent_layers)}
        assert not any(isinstance(module, GatedLoopAttention) for module in plain.modules())
        extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
        assert extra == config.recurrent_layers * config.n_heads * (config.dim + 1)
        # One loop is the plain model.
        state = {name.replace(".attention.attention.", ".attention."): p for name, p in model.state_dict().items()}
        plain.load_state_dict({name: p for name, p in state.items() if "attention.gate" not in name})
        ids = torch.randint(0, config.vocab_size, (1, LENGTH))
        assert torch.equal(model(ids, 1), plain(ids, 1))
        assert not torch.equal(model(ids, 2), plain(ids, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_the_gate_and_checkpointing_changes_no_bit(name: str) -> None:
    config = CONFIGS[name]
    model, ids = lively(config), torch.randint(0, config.vocab_size, (2, LENGTH))
    for grad_loops in (None, 2):
        found = []
        for policy in ("none", "loop"):
            model.set_remat(policy)
            model.zero_grad()
            model(ids, 4, grad_loops=grad_loops).logsumexp(-1).sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        gates = [name for name in found[0] if ".gate.weight" in name or "gate_bias" in name]
        assert len(gates) == 2 * config.recurrent_layers
        assert all(found[0][name].abs().max() > 1e-4 for name in gates)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_later_loop_that_sees_only_the_first_repeats_it_also_where_it_is_pooled(name: str) -> None:
    config = with_fields(CONFIGS[name], mlca_window=6)
    attention, cache = gated(config), Cache.for_model(config)
    torch.nn.init.constant_(attention.gate_bias, 99.0)
    torch.nn.init.zeros_(attention.gate.weight)
    for x in torch.randn(2, 50, config.dim).split([20, 7, *[1] * 23], dim=1):
        context = SequenceContext(rope_tables(config, cache.length, x.shape[1], torch.device("cpu")), cache)
        with torch.no_grad():
            first, carry = attention(x, context.site("core", 0, 0))
            second, _ = attention(x, context.site("core", 0, 1), carry)
        torch.testing.assert_close(second, first, atol=1e-6, rtol=1e-5)
        cache.length += x.shape[1]
    assert len(carry) == len(cache.slot("core", 0, 0).newest(1)) + 1  # the counts come last


def test_the_gates_gradient_is_the_finite_difference() -> None:
    config = CONFIGS["gqa"]
    attention = gated(config).double()
    x = torch.randn(1, LENGTH, config.dim, dtype=torch.float64)
    _, carry = attention(torch.randn_like(x), site(config, 0))

    def output(bias: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(attention, {"gate_bias": bias}, (x, site(config, 1), carry))[0]
        return out.sum(dim=(0, 1))

    assert torch.autograd.gradcheck(output, attention.gate_bias.detach().clone().requires_grad_())


def test_decoding_remembers_the_first_loop_and_a_window_of_each_other() -> None:
    # Another depth adds windows, not bytes a token; per_loop adds both.
    for config in CONFIGS.values():
        shallow, deep = cache_bytes(config, 2), cache_bytes(config, 8)
        assert (
            shallow.per_token == deep.per_token == cache_bytes(with_fields(config, kv_policy="per_loop"), 1).per_token
        )
        assert deep.constant == 7 * shallow.constant > 0
        model, ids = lively(config), torch.randint(0, config.vocab_size, (1, 40))
        growth = []
        with torch.no_grad():
            cache = Cache.for_model(config)
            for token in ids.split(1, dim=1):
                model(token, 4, cache=cache)
                growth.append(sum(slot.bytes_used() for key, slot in cache._slots.items() if key[2] > 0))
        assert max(growth[10:]) == growth[-1] == cache_bytes(config, 4, bytes_per_number=4).constant
