"""The one description of an Ice model: every field of ``model.*`` in a run's JSON.

``IceConfig`` is data only (frozen pydantic, unknown keys refused). Field names are the specification's. A value that
contradicts another raises a ``ValueError`` (pydantic wraps it) that reads ``key = value: problem``.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

# ``torch._grouped_mm`` wants every row to start on a 16-byte boundary: 8 elements in bf16 and fp16.
GROUPED_GEMM_MULTIPLE = 8

KvPolicy = Literal["per_loop", "ring", "last", "gated"]
Core = Literal["ice", "apex", "refine", "plain"]


class IceConfig(BaseModel):
    """Shape and switches of a looped Mixture-of-Experts language model. See docs/architecture.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Size
    vocab_size: PositiveInt = Field(32000, description="number of token ids")
    dim: PositiveInt = Field(2048, description="width D of the residual stream")
    max_seq_len: PositiveInt = Field(4096, description="longest sequence, prompt and answer together, in tokens")
    max_output_tokens: PositiveInt = Field(
        4096, description="most tokens one generate() call may add, within max_seq_len"
    )

    # Family
    core: Core = Field("ice", description="what a loop is: Ice's, Apex's, RR-SLM's, or a plain residual stream")
    memory_slots: PositiveInt = Field(4, description="slots of a position's spiral memory (core = apex)")
    convergence_eps: float = Field(
        0.0, ge=0.0, description="relative change below which a position stops (core = refine); 0: never"
    )

    # Depth
    prelude_layers: int = Field(2, ge=0, description="dense blocks run once before the loop")
    recurrent_layers: PositiveInt = Field(1, description="distinct blocks inside the loop")
    coda_layers: int = Field(2, ge=0, description="dense blocks run once after the loop")
    max_loop_iters: PositiveInt = Field(16, description="loops T when a call names none; also scales initialisation")
    initial_state: Literal["input", "random", "learned"] = Field(
        "input",
        description="h_0: the encoded input e; noise while training and zero otherwise; or a learned vector",
    )
    msrd_scales: tuple[PositiveInt, ...] = Field(
        (1,), description="a core for each scale s, running max(1, ceil(T / s)) loops; (1,): one core, no fusion"
    )
    lora_rank: int = Field(0, ge=0, description="rank of the gated depth-wise adapter of each core block; 0: none")
    slu: bool = Field(False, description="speculative unrolling: heads that predict and verify a token's depth")

    # Attention
    attn_type: Literal["gqa", "mla", "moda_v2"] = "gqa"
    n_heads: PositiveInt = 16
    n_kv_heads: PositiveInt = Field(4, description="key/value heads of gqa and moda_v2; unused by mla")
    qk_norm: bool = Field(False, description="RMS-normalise each query and key head (gqa, moda_v2)")
    sandwich_norm: bool = Field(False, description="normalise what attention and feed-forward write, too")
    moda_history_window: PositiveInt = Field(
        4, description="earlier loops whose state of the same position moda_v2 attends to"
    )
    sliding_window: PositiveInt | None = Field(
        None, description="keys an attention sees, itself included; null: all earlier ones"
    )
    full_attention_every: PositiveInt | None = Field(
        None, description="with sliding_window: every n-th layer sees everything; a core's layers count over its loops"
    )
    rope_theta: PositiveFloat = 10000.0
    rope_scaling_factor: float = Field(1.0, ge=1.0, description="YaRN: context is this many times the original one")
    rope_original_seq_len: PositiveInt | None = Field(None, description="YaRN: context the rotations were made for")
    q_lora_rank: PositiveInt | None = Field(None, description="rank of mla's query bottleneck; null: full rank")
    kv_lora_rank: PositiveInt = Field(512, description="rank of mla's cached latent")
    qk_rope_head_dim: PositiveInt = Field(64, description="rotated part of an mla query/key head")
    qk_nope_head_dim: PositiveInt = Field(128, description="unrotated part of an mla query/key head")
    v_head_dim: PositiveInt = Field(128, description="width of an mla value head")

    # What decoding remembers of a looped layer
    kv_policy: KvPolicy = Field(
        "per_loop",
        description="keys and values of every loop (exact); of the latest kv_ring_size; of the last; or of the first, "
        "with a gated window of the others",
    )
    kv_ring_size: PositiveInt = Field(2, description="slots of kv_policy = ring")
    kv_gate_window: PositiveInt = Field(64, description="own keys a loop sees with kv_policy = gated")
    mlca_window: PositiveInt | None = Field(
        None, description="multi-level cache: tokens kept exactly, and entries of each pooled level; null: all exact"
    )
    mlca_levels: PositiveInt = Field(3, description="pooled levels, of 2, 4, 8, ... tokens an entry")

    # Feed-forward
    ffn_dim: PositiveInt = Field(5632, description="hidden width of the dense SwiGLU (prelude, coda, dense core)")
    n_experts: int = Field(64, ge=0, description="routed experts E of a core block; 0: a dense SwiGLU core")
    n_shared_experts: int = Field(1, ge=0, description="experts that see every token")
    n_experts_per_tok: PositiveInt = Field(4, description="routed experts K a token is sent to")
    expert_dim: PositiveInt = Field(1408, description="hidden width F of one expert")
    moe_n_groups: PositiveInt = Field(1, description="expert groups of group-limited routing; 1: plain top-k")
    moe_topk_groups: PositiveInt = Field(1, description="groups a token may choose its experts from")
    score_func: Literal["sigmoid", "softmax"] = "sigmoid"
    route_norm: bool = Field(True, description="divide the K gates by their sum")
    route_scale: PositiveFloat = Field(1.0, description="factor on the gates after normalisation")

    aec: bool = Field(False, description="adaptive expert caching: reuse a token's routed output across loops")
    aec_confidence: float = Field(
        0.5, ge=0.0, le=1.0, description="router confidence above which an output may be reused"
    )
    aec_drift: float = Field(
        0.1, ge=0.0, description="a token is computed again once its normed input has moved this far, relative"
    )
    aec_max_age: PositiveInt = Field(4, description="most loops in a row an output is reused")

    # Halting
    act: bool = Field(False, description="adaptive computation time: mix the loops' states by halting weights")
    act_threshold: float = Field(0.99, gt=0.0, le=1.0, description="cumulative halting probability that ends a token")

    # Output
    tie_embeddings: bool = Field(False, description="the head uses the embedding matrix")
    norm_eps: PositiveFloat = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one gqa head."""
        return self.dim // self.n_heads

    @property
    def qk_head_dim(self) -> int:
        """Width of one query/key head: ``head_dim`` for gqa, unrotated plus rotated part for mla."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attn_type == "mla" else self.head_dim

    @property
    def rope_dim(self) -> int:
        """How many channels of a query/key head are rotated."""
        return self.qk_rope_head_dim if self.attn_type == "mla" else self.head_dim

    @property
    def rope_resolutions(self) -> tuple[float, ...]:
        """Factors on ``rope_theta`` of the tables attention uses."""
        return (1.0, 2.0, 4.0) if self.attn_type == "moda_v2" else (1.0,)

    def window(self, layer: int) -> int | None:
        """Keys that attention number ``layer`` of its part sees; None: all. A core counts over its loops."""
        if self.sliding_window is None:
            return None
        every = self.full_attention_every
        return None if every is not None and (layer + 1) % every == 0 else self.sliding_window

    def loop_slots(self, kv_policy: str | None = None) -> int | None:
        """Slots a core layer's cache has over its loops under ``kv_policy`` (None: this one's); None: one per loop.

        Raises:
            ValueError: For a name that is no policy; when ``gated``, which a model is trained with, would be chosen or
                dropped; and when loops with different sliding windows would share a slot.
        """
        policy = self.kv_policy if kv_policy is None else kv_policy
        if policy not in get_args(KvPolicy):
            raise ValueError(f"kv_policy = {policy}: must be one of {', '.join(get_args(KvPolicy))}")
        if (policy == "gated") != (self.kv_policy == "gated"):
            raise ValueError(
                f"kv_policy = {policy}: this model was trained with kv_policy = {self.kv_policy}; "
                "gated is an architecture, chosen before training and kept"
            )
        slots = {"ring": self.kv_ring_size, "last": 1}.get(policy)
        every = self.full_attention_every
        if slots is not None and every is not None and slots * self.recurrent_layers % every:
            raise ValueError(
                f"kv_policy = {policy}: {slots} slots of {self.recurrent_layers} recurrent_layers would be shared by "
                f"loops that see a window and loops that see all; full_attention_every = {every} must divide their "
                "product"
            )
        return slots

    @property
    def effective_depth(self) -> int:
        """Blocks a token passes through at the default depth; what initialisation is scaled by."""
        return self.prelude_layers + self.max_loop_iters * self.recurrent_layers + self.coda_layers

    @model_validator(mode="after")
    def _fields_agree(self) -> IceConfig:
        if self.dim % GROUPED_GEMM_MULTIPLE:
            raise ValueError(f"dim = {self.dim}: must be a multiple of {GROUPED_GEMM_MULTIPLE}")
        self._attention_agrees()
        if self.msrd_scales[:1] != (1,) or list(self.msrd_scales) != sorted(set(self.msrd_scales)):
            raise ValueError(f"msrd_scales = {list(self.msrd_scales)}: must begin with 1 and increase")
        if self.core != "ice":
            self._family_agrees()
        if self.convergence_eps and self.core != "refine":
            raise ValueError(f"convergence_eps = {self.convergence_eps}: only core = refine stops by it")
        if self.n_experts:
            self._experts_agree()
        elif self.aec:
            raise ValueError("aec = true: n_experts = 0 leaves no expert output to reuse")
        return self

    def _family_agrees(self) -> None:
        """The ideas that change Ice's own loop belong to it."""
        for name in ("msrd_scales", "lora_rank", "slu", "aec", "act"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {getattr(self, name)}: only core = ice has it, not core = {self.core}")
        if self.core == "apex":
            if self.attn_type == "mla":
                raise ValueError("attn_type = mla: core = apex reads its memory with grouped heads; use gqa or moda_v2")
            if self.sandwich_norm:
                raise ValueError("sandwich_norm = true: core = apex has none")

    def _attention_agrees(self) -> None:
        if self.attn_type == "mla":
            if self.qk_norm:
                raise ValueError("qk_norm = true: only gqa and moda_v2 have it; attn_type = mla normalises its latents")
        else:
            if self.dim % self.n_heads:
                raise ValueError(f"dim = {self.dim}: must be a multiple of n_heads = {self.n_heads}")
            if self.n_heads % self.n_kv_heads:
                raise ValueError(f"n_heads = {self.n_heads}: must be a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.rope_dim % 2:
            name = "qk_rope_head_dim" if self.attn_type == "mla" else "head_dim (dim / n_heads)"
            raise ValueError(f"{name} = {self.rope_dim}: must be even, RoPE rotates pairs")
        resolutions = len(self.rope_resolutions)
        if resolutions > 1 and self.n_kv_heads < resolutions:
            raise ValueError(
                f"n_kv_heads = {self.n_kv_heads}: attn_type = {self.attn_type} spreads {resolutions} RoPE resolutions "
                f"over the key heads; at least {resolutions}"
            )
        if self.full_attention_every is not None and self.sliding_window is None:
            raise ValueError(f"full_attention_every = {self.full_attention_every}: sliding_window is not set")
        self.loop_slots()
        if self.rope_scaling_factor > 1 and self.rope_original_seq_len is None:
            raise ValueError(
                f"rope_scaling_factor = {self.rope_scaling_factor}: rope_original_seq_len must say what it scales"
            )
        if self.kv_policy == "gated":
            if self.attn_type == "moda_v2":
                raise ValueError("kv_policy = gated: moda_v2 has its own way across loops; use gqa or mla")
            if self.sliding_window is not None:
                raise ValueError(f"kv_policy = gated: brings its own window; sliding_window = {self.sliding_window}")

    def _experts_agree(self) -> None:
        if self.n_experts_per_tok == 1 and self.route_norm:
            raise ValueError(
                "route_norm = true: with n_experts_per_tok = 1 the one gate is always 1 and the router learns nothing; "
                "set route_norm = false"
            )
        if self.expert_dim % GROUPED_GEMM_MULTIPLE:
            raise ValueError(f"expert_dim = {self.expert_dim}: must be a multiple of {GROUPED_GEMM_MULTIPLE}")
        if self.n_experts % self.moe_n_groups:
            raise ValueError(f"n_experts = {self.n_experts}: must be a multiple of moe_n_groups = {self.moe_n_groups}")
        if self.moe_topk_groups > self.moe_n_groups:
            raise ValueError(
                f"moe_topk_groups = {self.moe_topk_groups}: must be at most moe_n_groups = {self.moe_n_groups}"
            )
        group_size = self.n_experts // self.moe_n_groups
        if self.moe_n_groups > 1 and group_size < 2:
            raise ValueError(
                f"moe_n_groups = {self.moe_n_groups}: leaves {group_size} expert in a group; "
                "a group is scored by its 2 best"
            )
        reachable = self.moe_topk_groups * group_size
        if self.n_experts_per_tok > reachable:
            raise ValueError(
                f"n_experts_per_tok = {self.n_experts_per_tok}: must be at most {reachable}, the experts of "
                f"moe_topk_groups = {self.moe_topk_groups} of moe_n_groups = {self.moe_n_groups} groups"
            )

    def scaled_down(self) -> IceConfig:
        """The same structure (every switch, kind and grouping) in a size for tests: width 64, at most 4 loops."""
        grouped, moda = self.moe_n_groups > 1, self.attn_type == "moda_v2"
        sizes: dict[str, Any] = {
            "vocab_size": 256,
            "dim": 64,
            "max_seq_len": 64,
            "max_output_tokens": 64,
            "prelude_layers": min(self.prelude_layers, 1),
            "recurrent_layers": min(self.recurrent_layers, 2),
            "coda_layers": min(self.coda_layers, 1),
            "max_loop_iters": min(self.max_loop_iters, 4),
            "memory_slots": min(self.memory_slots, 3),
            "msrd_scales": self.msrd_scales[:3],
            "lora_rank": min(self.lora_rank, 4),
            "n_heads": 4,
            "n_kv_heads": 4 if self.n_kv_heads == self.n_heads or moda else min(self.n_kv_heads, 2),
            "moda_history_window": min(self.moda_history_window, 2),
            "sliding_window": None if self.sliding_window is None else 8,
            "kv_gate_window": 8,
            "mlca_window": None if self.mlca_window is None else 8,
            "rope_original_seq_len": None if self.rope_original_seq_len is None else 16,
            "rope_scaling_factor": min(self.rope_scaling_factor, 4.0),
            "q_lora_rank": None if self.q_lora_rank is None else 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "ffn_dim": 128,
            "n_experts": 8 if self.n_experts else 0,
            "n_shared_experts": min(self.n_shared_experts, 1),
            "n_experts_per_tok": min(self.n_experts_per_tok, 2),
            "expert_dim": 32,
            "moe_n_groups": 4 if grouped else 1,
            "moe_topk_groups": 2 if grouped else 1,
        }
        return IceConfig.model_validate(self.model_dump() | sizes)
