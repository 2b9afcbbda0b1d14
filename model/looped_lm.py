"""The looped language model: embedding, prelude once, core T times, coda once, head.

    e = norm(prelude(embed(ids)));  h_T = core(e);  logits = head(norm(coda(h_T)))

It runs as it stands, on one device, and knows nothing of engines; an engine finds what it needs by name: ``core`` is
the module to gather once (ZeRO-3 leaf), ``core.blocks.*.ffn`` the expert layers, ``config.n_experts`` and
``config.n_experts_per_tok`` their sizes.

Shapes: B batch, S sequence, D width, V vocabulary, T loops.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import nn

from model import generation, remat
from model.attention import Cache, rope_tables
from model.blocks import Block
from model.config import IceConfig
from model.init import head_std, matrix_std
from model.loop import LoopedCore
from model.norm import RMSNorm


class LoopedOutput(NamedTuple):
    """What a training step reads. A NamedTuple of tensors, which DeepSpeed's hooks rebuild field by field."""

    logits: torch.Tensor  # (B, S, V)
    ponder_cost: torch.Tensor  # scalar fp32: mean loop a token halts at, 0 without ACT
    loop_residual: torch.Tensor  # scalar fp32, no gradient: mean over tokens of ||h_T - h_(T-1)|| / ||h_T||


class Embedding(nn.Module):
    """Token vectors, scaled on the way in so that the stream starts with unit variance.

    The matrix itself starts small: as a tied head, larger rows would make the model repeat its input at first (the
    stream is mostly the token's own vector, whose logit is its squared length times the scale).
    """

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        std = head_std(config) if config.tie_embeddings else matrix_std(config.dim)
        self.scale = 1 / std
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        nn.init.normal_(self.weight, std=std)

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """(B, S) int64 to (B, S, D)."""
        return F.embedding(ids_BS, self.weight) * self.scale


class Head(nn.Module):
    """Logits. Tied, its ``weight`` *is* the embedding's parameter: one tensor with two names, as ZeRO-3 handles it."""

    def __init__(self, config: IceConfig, tied_weight: nn.Parameter | None) -> None:
        super().__init__()
        if tied_weight is None:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))
            nn.init.normal_(self.weight, std=head_std(config))
        else:
            self.weight = tied_weight

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """(B, S, D) to (B, S, V)."""
        return F.linear(x_BSD, self.weight)


class IceModel(nn.Module):
    """A looped Mixture-of-Experts language model. ``IceModel(config)(ids)`` gives logits."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        self.config = config
        self.remat: remat.RematPolicy = "none"
        self.embed = Embedding(config)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.prelude_layers))
        self.prelude_norm = RMSNorm(config.dim, config.norm_eps)
        self.core = LoopedCore(config)
        self.coda = nn.ModuleList(Block(config) for _ in range(config.coda_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Head(config, self.embed.weight if config.tie_embeddings else None)

    def set_remat(self, policy: remat.RematPolicy) -> None:
        """Choose what the backward computes again instead of storing; see ``model/remat.py``."""
        remat.check_policy(policy)
        self.remat = self.core.remat = policy

    @overload
    def forward(
        self,
        input_ids: torch.Tensor,
        n_loops: int | None = ...,
        *,
        grad_loops: int | None = ...,
        sequence_loops: torch.Tensor | None = ...,
        cache: Cache | None = ...,
        return_output: Literal[False] = ...,
    ) -> torch.Tensor: ...

    @overload
    def forward(
        self,
        input_ids: torch.Tensor,
        n_loops: int | None = ...,
        *,
        grad_loops: int | None = ...,
        sequence_loops: torch.Tensor | None = ...,
        cache: Cache | None = ...,
        return_output: Literal[True],
    ) -> LoopedOutput: ...

    def forward(
        self,
        input_ids: torch.Tensor,
        n_loops: int | None = None,
        *,
        grad_loops: int | None = None,
        sequence_loops: torch.Tensor | None = None,
        cache: Cache | None = None,
        return_output: bool = False,
    ) -> torch.Tensor | LoopedOutput:
        """Logits (B, S, V), or with ``return_output`` a :class:`LoopedOutput`.

        Args:
            input_ids: (B, S) int64; with a cache, only the tokens it does not hold yet.
            n_loops: Depth T of this call; None: ``config.max_loop_iters``. May exceed it.
            grad_loops: Backpropagate through the last ``grad_loops`` loops only; None: all.
            sequence_loops: (B,) int64, each sequence's own depth, at most ``n_loops``.
            cache: Filled and advanced by S tokens; for decoding, so only without gradients.
            return_output: Also return the loop's measurements.

        Raises:
            ValueError: On a depth below 1, more than ``config.max_seq_len`` tokens, or a cache with gradients enabled.
        """
        n_loops = self.config.max_loop_iters if n_loops is None else n_loops
        length, start = input_ids.shape[1], 0
        for name, value in (("n_loops", n_loops), ("grad_loops", grad_loops)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if cache is not None:
            if torch.is_grad_enabled():
                raise ValueError("cache: decoding keeps no graph; call the model under torch.no_grad()")
            cache.fix_depth(n_loops)
            start = cache.length
        if start + length > self.config.max_seq_len:
            raise ValueError(f"{start + length} tokens: more than max_seq_len = {self.config.max_seq_len}")
        cos, sin = rope_tables(start, length, self.config.rope_dim, self.config.rope_theta, input_ids.device)

        x_BSD = self.embed(input_ids)
        x_BSD = self._run_once("prelude", self.prelude, x_BSD, cos, sin, cache)
        # Tensors positionally: ZeRO-3's backward hooks see positional inputs only.
        core = self.core(self.prelude_norm(x_BSD), cos, sin, n_loops, grad_loops, sequence_loops, cache)
        x_BSD = self._run_once("coda", self.coda, core.h_BSD, cos, sin, cache)
        logits_BSV = self.head(self.norm(x_BSD))
        if cache is not None:
            cache.length += length
        return LoopedOutput(logits_BSV, core.ponder_cost, core.loop_residual) if return_output else logits_BSV

    def _run_once(
        self,
        part: str,
        blocks: nn.ModuleList,
        x_BSD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: Cache | None,
    ) -> torch.Tensor:
        for layer, block in enumerate(blocks):
            slot = None if cache is None else cache.slot(part, layer)
            x_BSD = x_BSD + remat.run(self.remat, block, x_BSD, cos, sin, slot)
        return x_BSD

    @torch.no_grad()
    def get_spectral_radius(self) -> float:
        """max(A): the largest decay of the loop's linear part, always below 1 - 2^-7."""
        return float(self.core.injection.decay().max())

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int = 128,
        n_loops: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
        on_token: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Continue ``input_ids``; see :func:`model.generation.generate`."""
        return generation.generate(
            self,
            input_ids,
            max_new_tokens,
            generation.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
            n_loops=n_loops,
            stop_token_ids=stop_token_ids,
            on_token=on_token,
        )

    def stream(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int = 128,
        n_loops: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
    ) -> Iterator[torch.Tensor]:
        """Yield one (B,) tensor of new ids at a time; see :func:`model.generation.stream`."""
        return generation.stream(
            self,
            input_ids,
            max_new_tokens,
            generation.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
            n_loops=n_loops,
            stop_token_ids=stop_token_ids,
        )
