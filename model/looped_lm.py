"""The looped language model: embedding, prelude once, core T times, coda once, head.

    e = norm(prelude(embed(ids)));  h_T = core(e);  logits = head(norm(coda(h_T)))

It runs as it stands, on one device, and knows nothing of engines; an engine finds what it needs by name: ``core`` is
the module to gather once (ZeRO-3 leaf), ``core.blocks.*.ffn`` the expert layers, ``config.n_experts`` and
``config.n_experts_per_tok`` their sizes.

Shapes: B batch, S sequence, D width, V vocabulary, T loops.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import nn

from model import generation, remat
from model.attention import Cache, SequenceContext, rope_tables
from model.blocks import Block
from model.config import IceConfig
from model.cores import build_core
from model.depth import DepthController, DepthPlan
from model.init import head_std, matrix_std
from model.injection import StableInjection
from model.norm import RMSNorm
from model.speculation import DepthHeads
from model.token_loss import chunked_token_losses, token_losses, token_outcomes
from model.verifier import RefinementTrace

if TYPE_CHECKING:
    from model.attention.flex import AttentionKernel


class DepthProbe(NamedTuple):
    """One loop more or not: what the depth heads said at a loop, and what the model said there and one later."""

    benefit_logits_HBS: torch.Tensor  # H = 2 heads: the predictor (from e) and the verifier (from the state)
    losses_NBS: torch.Tensor  # each token's loss after ``probe_loop`` and after the next, fp32, no gradient


class StepProbe(NamedTuple):
    """What became of each token after ``probe_loop`` steps and after one more: what Apex's verifier learns from."""

    judged_NBS2: torch.Tensor  # what the verifier said, see ``RefinementTrace``; N = 2 steps
    losses_NBS: torch.Tensor  # fp32, nats, no gradient
    correct_NBS: torch.Tensor  # bool: the most likely id was the right one


class LoopedOutput(NamedTuple):
    """What a training step reads. A NamedTuple of tensors, which DeepSpeed's hooks rebuild field by field."""

    logits: torch.Tensor | None  # (B, S, V); None where losses were made of a few tokens' logits at a time
    ponder_cost: torch.Tensor  # scalar fp32: mean loop a token halts at, 0 without ACT
    loop_residual: torch.Tensor  # scalar fp32, no gradient: mean over tokens of ||h_T - h_(T-1)|| / ||h_T||
    expert_share: torch.Tensor  # scalar fp32, no gradient: expert outputs computed rather than reused (AEC), 1 without
    states_NBSD: torch.Tensor | None = None  # fused states after each of ``read_loops``, then the final one
    read_logits_NBSV: torch.Tensor | None = None  # logits of the states after ``read_loops``; None as ``logits``
    losses_BS: torch.Tensor | None = None  # each token's loss, nats, fp32, with ``targets``
    read_losses_NBS: torch.Tensor | None = None  # those of the states after ``read_loops``, with ``targets``
    probe: DepthProbe | None = None  # what the depth heads learn from, with ``probe_loop``
    loops_used_BS: torch.Tensor | None = None  # int64, iterations until each position converged (core = refine)
    refinement: RefinementTrace | None = None  # what the steps say for themselves (core = apex)
    step_probe: StepProbe | None = None  # what the verifier learns from, with ``probe_loop`` (core = apex)

    @property
    def token_losses_BS(self) -> torch.Tensor:
        """``losses_BS`` of a forward that was given ``targets``."""
        if self.losses_BS is None:
            raise ValueError("the forward had no targets to take a loss of")
        return self.losses_BS


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

    def forward(
        self,
        x_BSD: torch.Tensor,
        targets_BS: torch.Tensor | None = None,
        chunk: int | None = None,
        outcomes: bool = False,
    ) -> Any:
        """(B, S, D) to logits (B, S, V); or, with targets and a chunk of tokens, to losses (B, S).

        With ``outcomes`` to losses and whether the most likely id was the right one, both (B, S) and without gradients.
        """
        if targets_BS is not None and chunk is not None:
            if outcomes:
                return token_outcomes(x_BSD, self.weight, targets_BS, chunk)
            return chunked_token_losses(x_BSD, self.weight, targets_BS, chunk)
        return F.linear(x_BSD, self.weight)


class Reading(NamedTuple):
    """What the model says of one state: logits unless losses were made without ever holding them, and losses."""

    logits_BSV: torch.Tensor | None
    losses_BS: torch.Tensor | None


class IceModel(nn.Module):
    """A looped Mixture-of-Experts language model. ``IceModel(config)(ids)`` gives logits."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        self.config = config
        self.remat_once: remat.RematOnce = "none"
        self.loss_chunk: int | None = None
        self.attention_kernel: AttentionKernel = "sdpa"
        self.embed = Embedding(config)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.prelude_layers))
        self.prelude_norm = RMSNorm(config.dim, config.norm_eps)
        self.core = build_core(config)
        self.coda = nn.ModuleList(Block(config) for _ in range(config.coda_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Head(config, self.embed.weight if config.tie_embeddings else None)
        self.depth_heads = DepthHeads(config) if config.slu else None

    def set_remat(self, policy: remat.RematPolicy, once: remat.RematOnce | None = None, offload: bool = False) -> None:
        """Choose what is kept for the backward and what it computes again; see ``model/remat``.

        Args:
            policy: Of the loops.
            once: Of prelude and coda; None: ``none`` with the policy ``none``, ``block`` with any other.
            offload: Keep the loops' states in host memory.

        Raises:
            ValueError: On an unknown policy, or nothing to offload.
        """
        remat.check_policy(policy, once, offload)
        self.remat_once = remat.once_policy(policy, once)
        self.core.set_remat(policy, offload)

    def set_attention_kernel(self, kernel: AttentionKernel) -> None:
        """Who attends where a window or documents hide keys: ``flex`` writes no mask out; ``model/attention/flex.py``.

        Decoding, padding and everything that plain causality describes stay with ``scaled_dot_product_attention``.
        """
        if kernel not in ("sdpa", "flex"):
            raise ValueError(f"attention kernel = {kernel}: must be sdpa or flex")
        self.attention_kernel = kernel

    def set_loss_chunk(self, tokens: int | None) -> None:
        """How many tokens' logits exist at a time when ``targets`` are given; None: all. ``model/token_loss.py``."""
        if tokens is not None and tokens < 1:
            raise ValueError(f"loss chunk = {tokens}: must be at least 1 token")
        self.loss_chunk = tokens

    @overload
    def forward(
        self,
        input_ids: torch.Tensor,
        n_loops: int | None = ...,
        *,
        targets: torch.Tensor | None = ...,
        grad_loops: int | None = ...,
        sequence_loops: torch.Tensor | None = ...,
        cache: Cache | None = ...,
        padding: torch.Tensor | None = ...,
        document_ids: torch.Tensor | None = ...,
        noise_keys: torch.Tensor | None = ...,
        read_loops: tuple[int, ...] = ...,
        probe_loop: int | None = ...,
        controller: DepthController | None = ...,
        only_last: bool = ...,
        return_output: Literal[False] = ...,
    ) -> torch.Tensor: ...

    @overload
    def forward(
        self,
        input_ids: torch.Tensor,
        n_loops: int | None = ...,
        *,
        targets: torch.Tensor | None = ...,
        grad_loops: int | None = ...,
        sequence_loops: torch.Tensor | None = ...,
        cache: Cache | None = ...,
        padding: torch.Tensor | None = ...,
        document_ids: torch.Tensor | None = ...,
        noise_keys: torch.Tensor | None = ...,
        read_loops: tuple[int, ...] = ...,
        probe_loop: int | None = ...,
        controller: DepthController | None = ...,
        only_last: bool = ...,
        return_output: Literal[True],
    ) -> LoopedOutput: ...

    def forward(
        self,
        input_ids: torch.Tensor,
        n_loops: int | None = None,
        *,
        targets: torch.Tensor | None = None,
        grad_loops: int | None = None,
        sequence_loops: torch.Tensor | None = None,
        cache: Cache | None = None,
        padding: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        noise_keys: torch.Tensor | None = None,
        read_loops: tuple[int, ...] = (),
        probe_loop: int | None = None,
        controller: DepthController | None = None,
        only_last: bool = False,
        return_output: bool = False,
    ) -> torch.Tensor | LoopedOutput:
        """Logits (B, S, V), or with ``return_output`` a :class:`LoopedOutput`.

        Args:
            input_ids: (B, S) int64; with a cache, only the tokens it does not hold yet.
            n_loops: Depth T of this call; None: ``config.max_loop_iters``. May exceed it.
            targets: (B, S) int64, the id after each token: the output then holds each token's loss, and logits only
                where :meth:`set_loss_chunk` lets them exist whole. With ``return_output``.
            grad_loops: Backpropagate through the last ``grad_loops`` loops only; None: all.
            sequence_loops: (B,) int64, each sequence's own depth, at most ``n_loops``.
            cache: Filled and advanced by S tokens; for decoding, so only without gradients.
            padding: (B,) int64, how many tokens at the left of each row are padding; None: none.
            document_ids: (B, S) int64, which document each token belongs to where several are packed into a row: no
                token attends to another document's. Rotary positions are relative, so each document gets what it would
                alone. None: each row is one.
            noise_keys: (B,) int64, what each sequence's random initial state is made from in training (with
                ``initial_state="random"``), such as the sample's number: it then has the same state on any ranks.
                None: torch's generator.
            read_loops: Depths, each at most ``n_loops``, whose states and logits the output holds too.
            probe_loop: Depth below ``n_loops`` at which the depth heads, or Apex's verifier, meet the loss; needs
                ``slu`` or ``core = "apex"``, and ``targets``.
            controller: Ends tokens before ``n_loops`` while decoding.
            only_last: Logits of the last token only, (B, 1, V): all that a prompt's reader wants.
            return_output: Return everything that was measured.

        Raises:
            ValueError: On a depth out of range, more than ``config.max_seq_len`` tokens, a cache or controller with
                gradients enabled, ``document_ids`` of another shape or with a cache, ``probe_loop`` without
                ``targets``, or ``targets`` without ``return_output`` or with ``only_last``.
        """
        n_loops = self.config.max_loop_iters if n_loops is None else n_loops
        length, start = input_ids.shape[1], 0 if cache is None else cache.length
        self._check_depths(n_loops, grad_loops, read_loops, probe_loop)
        if targets is None and probe_loop is not None:
            raise ValueError(f"probe_loop = {probe_loop}: compares losses; give targets")
        if targets is not None and (only_last or not return_output):
            raise ValueError("targets: losses of all tokens are in the output; use return_output=True, not only_last")
        for name, value in (("cache", cache), ("controller", controller)):
            if value is not None and torch.is_grad_enabled():
                raise ValueError(f"{name}: decoding keeps no graph; call the model under torch.no_grad()")
        if cache is not None:
            cache.fix_depth(n_loops)
        if start + length > self.config.max_seq_len:
            raise ValueError(f"{start + length} tokens: more than max_seq_len = {self.config.max_seq_len}")
        if document_ids is not None:
            _check_documents(document_ids, input_ids, cache)
        rope = rope_tables(self.config, start, length, input_ids.device)
        context = SequenceContext(rope, cache, padding, document_ids, self.attention_kernel)
        inner_reads = read_loops if probe_loop is None else (*read_loops, probe_loop, probe_loop + 1)
        plan = DepthPlan(n_loops, grad_loops, sequence_loops, inner_reads, controller, noise_keys)

        x_BSD = self._run_once("prelude", self.prelude, self.embed(input_ids), context)
        e_BSD = self.prelude_norm(x_BSD)
        # Tensors positionally: ZeRO-3's backward hooks see positional inputs only.
        core = self.core(e_BSD, context, plan)
        read = self._read_out(core.h_BSD, context, targets, only_last)
        if cache is not None:
            cache.length += length
        if not return_output:
            assert read.logits_BSV is not None
            return read.logits_BSV
        output = LoopedOutput(
            read.logits_BSV,
            core.ponder_cost,
            core.loop_residual,
            core.expert_share,
            losses_BS=read.losses_BS,
            loops_used_BS=core.loops_used_BS,
            refinement=core.refinement,
        )
        if read_loops:
            states_NBSD = core.states_NBSD[: len(read_loops)]
            reads = [self._read_out(h_BSD, context, targets) for h_BSD in states_NBSD]
            output = output._replace(
                states_NBSD=torch.cat((states_NBSD, core.h_BSD.unsqueeze(0))),
                read_logits_NBSV=_stacked([one.logits_BSV for one in reads]),
                read_losses_NBS=_stacked([one.losses_BS for one in reads]),
            )
        if probe_loop is not None and self.depth_heads is not None:
            output = output._replace(probe=self._probe(e_BSD, core.states_NBSD[-2:], probe_loop, context, targets))
        elif probe_loop is not None:
            assert targets is not None
            losses_NBS, correct_NBS = self._outcomes(core.states_NBSD[-2:], context, targets)
            judged_NBS2 = core.refinement.judged_TBS2[probe_loop - 1 : probe_loop + 1]
            output = output._replace(step_probe=StepProbe(judged_NBS2, losses_NBS, correct_NBS))
        return output

    def _check_depths(
        self, n_loops: int, grad_loops: int | None, read_loops: tuple[int, ...], probe_loop: int | None
    ) -> None:
        for name, value in (("n_loops", n_loops), ("grad_loops", grad_loops)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        for loop in read_loops:
            if not 1 <= loop <= n_loops:
                raise ValueError(f"read_loops = {read_loops}: each must be between 1 and n_loops = {n_loops}")
        if probe_loop is not None:
            if self.depth_heads is None and self.config.core != "apex":
                raise ValueError(f"probe_loop = {probe_loop}: this model has no depth heads (slu = false)")
            if not 1 <= probe_loop < n_loops:
                raise ValueError(f"probe_loop = {probe_loop}: must be between 1 and n_loops - 1 = {n_loops - 1}")

    def _read_out(
        self,
        h_BSD: torch.Tensor,
        context: SequenceContext,
        targets_BS: torch.Tensor | None = None,
        only_last: bool = False,
    ) -> Reading:
        """What a state says; the coda reads every token, whose keys the cache wants."""
        x_BSD = self._run_once("coda", self.coda, h_BSD, context)
        x_BSD = self.norm(x_BSD[:, -1:] if only_last else x_BSD)
        if targets_BS is not None and self.loss_chunk is not None:
            return Reading(None, self.head(x_BSD, targets_BS, self.loss_chunk))
        logits_BSV = self.head(x_BSD)
        return Reading(logits_BSV, None if targets_BS is None else token_losses(logits_BSV, targets_BS))

    def _probe(
        self,
        e_BSD: torch.Tensor,
        states_NBSD: torch.Tensor,
        probe_loop: int,
        context: SequenceContext,
        targets_BS: torch.Tensor | None,
    ) -> DepthProbe:
        assert self.depth_heads is not None
        # The heads learn about the model and do not move it.
        benefit_logits_HBS = self.depth_heads(e_BSD.detach(), states_NBSD[0].detach(), probe_loop)
        with torch.no_grad():
            reads = [self._read_out(h_BSD, context, targets_BS) for h_BSD in states_NBSD]
        losses_NBS = _stacked([one.losses_BS for one in reads])
        assert losses_NBS is not None
        return DepthProbe(benefit_logits_HBS, losses_NBS)

    @torch.no_grad()
    def _outcomes(
        self, states_NBSD: torch.Tensor, context: SequenceContext, targets_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and hits (N, B, S) of the states, read without gradients."""
        outcomes = []
        for h_BSD in states_NBSD:
            x_BSD = self.norm(self._run_once("coda", self.coda, h_BSD, context))
            outcomes.append(self.head(x_BSD, targets_BS, self.loss_chunk or targets_BS.numel(), outcomes=True))
        losses, correct = zip(*outcomes, strict=True)
        return torch.stack(losses), torch.stack(correct)

    def _run_once(
        self, part: str, blocks: nn.ModuleList, x_BSD: torch.Tensor, context: SequenceContext
    ) -> torch.Tensor:
        for layer, block in enumerate(blocks):
            site = context.site(part, layer, window=self.config.window(layer))
            if self.remat_once == "block":
                update_BSD, _ = remat.checkpointed(block, x_BSD, site)
            else:
                update_BSD, _ = block(x_BSD, site)
            x_BSD = x_BSD + update_BSD
        return x_BSD

    def injections(self) -> list[StableInjection]:
        """The linear part of every core."""
        return [module for module in self.modules() if isinstance(module, StableInjection)]

    @torch.no_grad()
    def get_spectral_radius(self) -> float:
        """max(A): the largest decay of the loop's linear part, always below 1 - 2^-7.

        Raises:
            ValueError: Where the core has no such part.
        """
        if not self.injections():
            raise ValueError(f"core = {self.config.core}: has no linear injection")
        return max(float(injection.decay().max()) for injection in self.injections())

    @overload
    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int = ...,
        n_loops: int | None = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop_token_ids: Collection[int] = ...,
        on_token: Callable[[generation.NewTokens], None] | None = ...,
        decoding: generation.Decoding = ...,
        kv_policy: generation.KvPolicy | None = ...,
    ) -> torch.Tensor: ...

    @overload
    def generate(
        self,
        input_ids: Sequence[torch.Tensor | Sequence[int]],
        max_new_tokens: int = ...,
        n_loops: int | None = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop_token_ids: Collection[int] = ...,
        on_token: Callable[[generation.NewTokens], None] | None = ...,
        decoding: generation.Decoding = ...,
        kv_policy: generation.KvPolicy | None = ...,
    ) -> list[torch.Tensor]: ...

    def generate(
        self,
        input_ids: generation.Prompts,
        max_new_tokens: int = 128,
        n_loops: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
        on_token: Callable[[generation.NewTokens], None] | None = None,
        decoding: generation.Decoding = generation.FULL_DEPTH,
        kv_policy: generation.KvPolicy | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Continue prompts; :func:`model.generation.generate` tells what it cost as well.

        Args:
            input_ids: (B, S) int64; or a list of prompts of any lengths.
            max_new_tokens: At most ``config.max_output_tokens``, and with the prompt at most ``config.max_seq_len``.
            n_loops: Depth; None: ``config.max_loop_iters``.
            temperature: 0 is greedy.
            top_k: Draw among the k most likely ids.
            top_p: Draw among the most likely ids that together have this probability.
            seed: Row i draws by ``seed + i``; None: torch's generator draws a seed.
            stop_token_ids: Ids that end a sequence.
            on_token: Called with each token of all sequences as it is found.
            decoding: ``FullDepth()``, ``Adaptive(...)`` or ``Speculative(...)`` of ``model.generation``.
            kv_policy: What the cache keeps of a looped layer; None: as configured.

        Returns:
            For a tensor (B, S + new) int64, a row that has met a stop id repeating it; for a list, each prompt with its
            continuation up to the stop id.
        """
        sampling = generation.Sampling(temperature, top_k, top_p, seed)
        options = generation.GenerationOptions(max_new_tokens, n_loops, sampling, decoding, stop_token_ids, kv_policy)
        result = generation.generate(self, input_ids, options, on_token)
        if isinstance(input_ids, torch.Tensor):
            return torch.cat((input_ids, result.new_ids_BN), dim=1)
        return result.sequences()

    def stream(
        self,
        input_ids: generation.Prompts,
        max_new_tokens: int = 128,
        n_loops: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
        decoding: generation.Decoding = generation.FULL_DEPTH,
        kv_policy: generation.KvPolicy | None = None,
    ) -> generation.TokenStream:
        """Yield one :class:`model.generation.NewTokens` at a time; arguments as for :meth:`generate`."""
        sampling = generation.Sampling(temperature, top_k, top_p, seed)
        options = generation.GenerationOptions(max_new_tokens, n_loops, sampling, decoding, stop_token_ids, kv_policy)
        return generation.stream(self, input_ids, options)


def _stacked(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None


def _check_documents(document_ids: torch.Tensor, input_ids: torch.Tensor, cache: Cache | None) -> None:
    if cache is not None:
        raise ValueError("document_ids: packed rows are not decoded; give each document a row, without document_ids")
    if document_ids.shape != input_ids.shape:
        raise ValueError(
            f"document_ids of shape {tuple(document_ids.shape)}: must be that of input_ids, {tuple(input_ids.shape)}"
        )
