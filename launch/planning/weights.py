r"""Every weight of a model, by name and shape, from its configuration alone.

Closed form on purpose: no tensor library, thousands of candidates a second, and a second opinion on the model. The
names are the model's own, so a test holds the two lists to be equal, entry by entry, for every variant and for random
configurations (``tests/launch/planning/test_weights.py``).

A :class:`WeightGroup` is what ZeRO-3 fetches and releases together: the weights that hang directly on one module, or,
for a looped core, which is a leaf, everything inside it. The groups come in the order in which a forward meets them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import IceConfig

# The parts of a model, in the order a reader meets them.
PARTS = (
    "embedding",
    "prelude",
    "core attention",
    "core router",
    "core experts",
    "core shared experts",
    "core dense",
    "core adapters",
    "core fusion",
    "core other",
    "depth heads",
    "coda",
    "norms",
    "head",
)
_LORA_TIMESCALES = 6  # half-lives of the adapter's curve, ``model/lora.py``
_DEPTH_FEATURES = 32  # of a loop number, ``model/speculation.py``


@dataclass(frozen=True)
class Weight:
    """One parameter. ``expert``: its first axis is the routed experts', which expert parallelism spreads."""

    name: str
    shape: tuple[int, ...]
    part: str
    expert: bool = False

    @property
    def elements(self) -> int:
        """Numbers in the whole parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightGroup:
    """Weights that are gathered together. ``scale`` is the MSRD scale's index of a core, None elsewhere."""

    name: str
    weights: tuple[Weight, ...]
    scale: int | None = None

    @property
    def elements(self) -> int:
        """Numbers in all of them."""
        return sum(weight.elements for weight in self.weights)


@dataclass(frozen=True)
class ModelWeights:
    """All groups of a model; a tied head is a group without weights of its own (its matrix is the embedding's)."""

    embedding: WeightGroup
    prelude: tuple[tuple[WeightGroup, ...], ...]  # by block
    prelude_norm: WeightGroup
    cores: tuple[WeightGroup, ...]  # by MSRD scale
    fusion: tuple[WeightGroup, ...]
    coda: tuple[tuple[WeightGroup, ...], ...]
    norm: WeightGroup
    head: WeightGroup
    depth_heads: tuple[WeightGroup, ...]

    def groups(self) -> Iterator[WeightGroup]:
        """Every group, in the order of a forward."""
        yield self.embedding
        for block in self.prelude:
            yield from block
        yield self.prelude_norm
        yield from self.cores
        yield from self.fusion
        for block in self.coda:
            yield from block
        yield self.norm
        yield self.head
        yield from self.depth_heads

    def weights(self) -> Iterator[Weight]:
        """Every weight once."""
        for group in self.groups():
            yield from group.weights

    @property
    def total(self) -> int:
        """Parameters of the model."""
        return sum(weight.elements for weight in self.weights())

    def by_part(self) -> dict[str, int]:
        """Parameters of each of ``PARTS`` that has any."""
        counts = dict.fromkeys(PARTS, 0)
        for weight in self.weights():
            counts[weight.part] += weight.elements
        return {part: count for part, count in counts.items() if count}


@functools.lru_cache(maxsize=64)
def model_weights(config: IceConfig) -> ModelWeights:
    """The weights of ``config``'s model."""
    dim, vocabulary = config.dim, config.vocab_size
    scales = len(config.msrd_scales)
    head = () if config.tie_embeddings else (Weight("head.weight", (vocabulary, dim), "head"),)
    return ModelWeights(
        embedding=WeightGroup("embed", (Weight("embed.weight", (vocabulary, dim), "embedding"),)),
        prelude=_once(config, "prelude", config.prelude_layers),
        prelude_norm=_norm("prelude_norm", dim, "norms"),
        cores=tuple(_core(config, "core" if scales == 1 else f"core.scales.{index}", index) for index in range(scales)),
        fusion=() if scales == 1 else _fusion(config),
        coda=_once(config, "coda", config.coda_layers),
        norm=_norm("norm", dim, "norms"),
        head=WeightGroup("head", head),
        depth_heads=_depth_heads(config) if config.slu else (),
    )


def active_parameters(config: IceConfig) -> int:
    """Distinct parameters one token uses: everything but the routed experts it is not sent to, and the depth heads."""
    parts = model_weights(config).by_part()
    active = sum(parts.values()) - parts.get("depth heads", 0)
    if config.n_experts:
        active -= parts["core experts"] * (config.n_experts - config.n_experts_per_tok) // config.n_experts
    return active


def _norm(name: str, width: int, part: str) -> WeightGroup:
    return WeightGroup(name, (Weight(f"{name}.weight", (width,), part),))


def _linear(name: str, inputs: int, outputs: int, part: str) -> WeightGroup:
    return WeightGroup(name, (Weight(f"{name}.weight", (outputs, inputs), part),))


def _once(config: IceConfig, name: str, layers: int) -> tuple[tuple[WeightGroup, ...], ...]:
    return tuple(
        tuple(_block(config, f"{name}.{layer}", name, attention=name, looped=False)) for layer in range(layers)
    )


def _block(config: IceConfig, name: str, part: str, *, attention: str, looped: bool) -> Iterator[WeightGroup]:
    """Norms, attention and feed-forward; ``part`` of the feed-forward is told apart in a core."""
    dim = config.dim
    norms = "core other" if looped else part
    yield _norm(f"{name}.attention_norm", dim, norms)
    yield from _attention(config, f"{name}.attention", attention, looped=looped)
    if config.sandwich_norm:
        yield _norm(f"{name}.attention_post_norm", dim, norms)
    yield _norm(f"{name}.ffn_norm", dim, norms)
    if looped and config.n_experts:
        yield from _experts(config, f"{name}.ffn")
    else:
        yield from _swiglu(config, f"{name}.ffn", config.ffn_dim, "core dense" if looped else part)
    if config.sandwich_norm:
        yield _norm(f"{name}.ffn_post_norm", dim, norms)


def _attention(config: IceConfig, name: str, part: str, *, looped: bool) -> Iterator[WeightGroup]:
    if looped and config.kv_policy == "gated":
        yield WeightGroup(name, (Weight(f"{name}.gate_bias", (config.n_heads,), part),))
        yield _linear(f"{name}.gate", config.dim, config.n_heads, part)
        name = f"{name}.attention"
    if config.attn_type == "mla":
        yield from _latent_attention(config, name, part)
        return
    heads, keys, width = config.n_heads, config.n_kv_heads, config.head_dim
    yield _linear(f"{name}.qkv_proj", config.dim, (heads + 2 * keys) * width, part)
    if config.qk_norm:
        yield _norm(f"{name}.q_norm", width, part)
        yield _norm(f"{name}.k_norm", width, part)
    yield _linear(f"{name}.o_proj", config.dim, config.dim, part)


def _latent_attention(config: IceConfig, name: str, part: str) -> Iterator[WeightGroup]:
    dim, heads, rank = config.dim, config.n_heads, config.kv_lora_rank
    if config.q_lora_rank is None:
        yield _linear(f"{name}.q_proj", dim, heads * config.qk_head_dim, part)
    else:
        yield _linear(f"{name}.q_a_proj", dim, config.q_lora_rank, part)
        yield _norm(f"{name}.q_a_norm", config.q_lora_rank, part)
        yield _linear(f"{name}.q_b_proj", config.q_lora_rank, heads * config.qk_head_dim, part)
    yield _linear(f"{name}.kv_a_proj", dim, rank + config.qk_rope_head_dim, part)
    yield _norm(f"{name}.kv_a_norm", rank, part)
    yield _linear(f"{name}.kv_b_proj", rank, heads * (config.qk_nope_head_dim + config.v_head_dim), part)
    yield _linear(f"{name}.o_proj", heads * config.v_head_dim, dim, part)


def _swiglu(config: IceConfig, name: str, hidden: int, part: str) -> Iterator[WeightGroup]:
    yield _linear(f"{name}.gate_up_proj", config.dim, 2 * hidden, part)
    yield _linear(f"{name}.down_proj", hidden, config.dim, part)


def _experts(config: IceConfig, name: str) -> Iterator[WeightGroup]:
    dim, experts, hidden = config.dim, config.n_experts, config.expert_dim
    yield WeightGroup(f"{name}.router", (Weight(f"{name}.router.weight", (experts, dim), "core router"),))
    matrices = {"gate_up_proj": (experts, 2 * hidden, dim), "down_proj": (experts, dim, hidden)}
    yield WeightGroup(
        f"{name}.experts",
        tuple(Weight(f"{name}.experts.{key}", shape, "core experts", expert=True) for key, shape in matrices.items()),
    )
    if config.n_shared_experts:
        shared = config.n_shared_experts * hidden
        yield from _swiglu(config, f"{name}.shared_experts", shared, "core shared experts")


def _core(config: IceConfig, name: str, scale: int) -> WeightGroup:
    """One looped core: a leaf, so one group."""
    dim, other, rank = config.dim, "core other", config.lora_rank
    weights = [
        Weight(f"{name}.norm.weight", (dim,), other),
        Weight(f"{name}.step_embedding.gain", (dim,), other),
        Weight(f"{name}.injection.log_A", (dim,), other),
        Weight(f"{name}.injection.log_dt", (1,), other),
        Weight(f"{name}.injection.gain", (dim,), other),
    ]
    for layer in range(config.recurrent_layers):
        blocks = _block(config, f"{name}.blocks.{layer}", "core", attention="core attention", looped=True)
        weights += [weight for group in blocks for weight in group.weights]
    for layer in range(config.recurrent_layers if rank else 0):
        adapter = f"{name}.adapters.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            "down_proj.weight": (rank, dim),
            "up_proj.weight": (dim, rank),
            "gate_weight": (dim,),
            "gate_bias": (1,),
            "scale_limit": (rank,),
            "scale_curve": (_LORA_TIMESCALES, rank),
        }
        weights += [Weight(f"{adapter}.{key}", shape, "core adapters") for key, shape in shapes.items()]
    if config.act:
        weights += [Weight(f"{name}.halting.weight", (dim,), other), Weight(f"{name}.halting.bias", (1,), other)]
    if config.initial_state == "learned":
        weights.append(Weight(f"{name}.initial_state", (dim,), other))
    return WeightGroup(name, tuple(weights), scale)


def _fusion(config: IceConfig) -> tuple[WeightGroup, ...]:
    scales, part, name = len(config.msrd_scales), "core fusion", "core.fusion"
    own = (
        Weight(f"{name}.state_weight", (scales, config.dim), part),
        Weight(f"{name}.input_weight", (scales, config.dim), part),
        Weight(f"{name}.bias", (scales,), part),
    )
    return WeightGroup(name, own), _norm(f"{name}.norm", config.dim, part)


def _depth_heads(config: IceConfig) -> tuple[WeightGroup, ...]:
    hidden, part = max(64, config.dim // 8), "depth heads"

    def benefit_head(name: str, inputs: int) -> Iterator[WeightGroup]:
        yield _linear(f"{name}.input", inputs, hidden, part)
        for layer, (wide, narrow) in {"loops": (_DEPTH_FEATURES, hidden), "output": (hidden, 1)}.items():
            weights = (
                Weight(f"{name}.{layer}.weight", (narrow, wide), part),
                Weight(f"{name}.{layer}.bias", (narrow,), part),
            )
            yield WeightGroup(f"{name}.{layer}", weights)

    return (
        *benefit_head("depth_heads.predictor", config.dim),
        _norm("depth_heads.state_norm", config.dim, part),
        *benefit_head("depth_heads.verifier", 2 * config.dim),
    )
