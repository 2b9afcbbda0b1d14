"""Text generation: what may be asked for, the checks, and the result. How tokens are found is a choice of three.

    FullDepth      each token at the depth that was asked for (``decoding.py``)
    Adaptive       each token as deep as the model's depth heads say (``adaptive_depth.py``)
    Speculative    drafted shallow, verified at full depth: distributed as FullDepth (``speculative_decoding.py``)

Prompts may differ in length: they are padded at the left, padding is attended to by nobody, and since rotary positions
are relative each row is continued as its prompt alone would be.

Shapes: B batch, S longest prompt, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from model.adaptive_depth import AdaptiveDepth
from model.apex_core import ScoreSchedule
from model.attention.cache import Cache
from model.config import IceConfig, KvPolicy
from model.decoding import Batch, GenerationStatistics, NewTokens, decode_one_by_one
from model.depth import DecodingController
from model.sampling import Sampling, Uniforms
from model.speculative_decoding import KINDS_OF_UNIFORMS, decode_speculatively

if TYPE_CHECKING:
    from model.looped_lm import IceModel

# A (B, S) tensor of prompts of one length, or prompts of any lengths.
Prompts = torch.Tensor | Sequence[torch.Tensor | Sequence[int]]


__all__ = [
    "FULL_DEPTH",
    "Adaptive",
    "Decoding",
    "FullDepth",
    "Generation",
    "GenerationOptions",
    "GenerationStatistics",
    "KvPolicy",
    "NewTokens",
    "Prompts",
    "Sampling",
    "Speculative",
    "TokenStream",
    "generate",
    "stream",
]


@dataclass(frozen=True)
class FullDepth:
    """Every token at ``n_loops``."""


@dataclass(frozen=True)
class Adaptive:
    """Another loop for a token as long as the depth heads give it a benefit with at least this probability.

    With an Apex core: another step as long as its score is below ``threshold`` and the verifier gives a benefit with at
    least ``gain_threshold``, which only Apex reads.
    """

    threshold: float = 0.5
    gain_threshold: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        _check_threshold(self.threshold)
        _check_threshold(self.gain_threshold)


@dataclass(frozen=True)
class Speculative:
    """Lossless: shallow drafts, verified at ``n_loops``.

    Attributes:
        draft_tokens: Drafts of a round.
        draft_loops: Their depth; None: a quarter of ``n_loops``, at least 1.
        threshold: Let the depth heads end a draft's loops before ``draft_loops``, as in :class:`Adaptive`; None: no.
    """

    draft_tokens: int = 4
    draft_loops: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens = {self.draft_tokens}: must be at least 1")
        if self.draft_loops is not None and self.draft_loops < 1:
            raise ValueError(f"draft_loops = {self.draft_loops}: must be at least 1")
        if self.threshold is not None:
            _check_threshold(self.threshold)


Decoding = FullDepth | Adaptive | Speculative
FULL_DEPTH = FullDepth()


@dataclass(frozen=True)
class GenerationOptions:
    """What is asked for.

    Attributes:
        max_new_tokens: At most ``config.max_output_tokens``; with the longest prompt at most ``config.max_seq_len``.
        n_loops: Full depth; None: ``config.max_loop_iters``.
        sampling: How tokens are drawn.
        decoding: How they are found.
        stop_token_ids: Ids that end a sequence; the id itself is part of it.
        kv_policy: What the cache keeps of a looped layer; None: what the configuration says.
    """

    max_new_tokens: int = 128
    n_loops: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    decoding: Decoding = FULL_DEPTH
    stop_token_ids: Collection[int] = ()
    kv_policy: KvPolicy | None = None


@dataclass(frozen=True)
class Generation:
    """The prompts' continuations and what they cost."""

    prompts: tuple[torch.Tensor, ...]  # each (S_i,) int64
    new_ids_BN: torch.Tensor  # int64; after a row's stop id, that id again
    loops_BN: torch.Tensor  # int64, see ``NewTokens.loops_B``
    lengths_B: torch.Tensor  # int64, new tokens of a row up to its stop id, which counts
    statistics: GenerationStatistics

    def sequences(self) -> list[torch.Tensor]:
        """Each prompt with its continuation up to the stop id, int64."""
        lengths = self.lengths_B.tolist()
        return [
            torch.cat((prompt, new_ids[:length]))
            for prompt, new_ids, length in zip(self.prompts, self.new_ids_BN, lengths, strict=True)
        ]


class TokenStream(Iterator[NewTokens]):
    """Yields the sequences' next tokens as they are found; ``statistics`` says what they have cost so far."""

    def __init__(self, batch: Batch, tokens: Iterator[NewTokens]) -> None:
        self._batch, self._tokens = batch, tokens

    def __next__(self) -> NewTokens:
        """One more token of each sequence."""
        return next(self._tokens)

    @property
    def statistics(self) -> GenerationStatistics:
        """Of what has been yielded."""
        return self._batch.statistics()

    @property
    def lengths_B(self) -> torch.Tensor:
        """New tokens of each sequence up to its stop id, int64."""
        return self._batch.lengths_B


def stream(model: IceModel, prompts: Prompts, options: GenerationOptions) -> TokenStream:
    """The continuations as they are found: one :class:`NewTokens` at a time until the limit, or until all have ended.

    Raises:
        ValueError: For an empty prompt, an id outside the vocabulary, an exceeded limit, or a decoding that this model
            or cache cannot do; raised here, before the first token is asked for.
    """
    config, decoding = model.config, options.decoding
    n_loops = config.max_loop_iters if options.n_loops is None else options.n_loops
    if n_loops < 1:
        raise ValueError(f"n_loops = {n_loops}: must be at least 1")
    rows = _rows_of(prompts, next(model.parameters()).device)
    for number, row in enumerate(rows):
        _check_prompt(row, number, config)
    length = max(len(row) for row in rows)
    _check_limits(options.max_new_tokens, length, config)
    ids_BS, padding_B = _padded_left(rows, length)

    speculative = isinstance(decoding, Speculative)
    kinds = KINDS_OF_UNIFORMS if speculative else 1
    batch = Batch(
        model,
        _new_cache(config, options),
        padding_B,
        n_loops,
        options.sampling,
        Uniforms(options.sampling, len(rows), options.max_new_tokens, kinds, ids_BS.device),
        options.stop_token_ids,
    )
    match decoding:
        case FullDepth():
            tokens = decode_one_by_one(batch, ids_BS, options.max_new_tokens)
        case Adaptive():
            controller = _depth_controller(model, decoding.threshold, decoding.gain_threshold)
            tokens = decode_one_by_one(batch, ids_BS, options.max_new_tokens, controller)
        case Speculative():
            draft_loops = max(1, n_loops // 4) if decoding.draft_loops is None else decoding.draft_loops
            if draft_loops > n_loops:
                raise ValueError(f"draft_loops = {draft_loops}: must be at most n_loops = {n_loops}")
            ends_drafts = None if decoding.threshold is None else _depth_controller(model, decoding.threshold)
            tokens = decode_speculatively(
                batch, ids_BS, options.max_new_tokens, decoding.draft_tokens, draft_loops, ends_drafts
            )
    return TokenStream(batch, tokens)


def generate(
    model: IceModel,
    prompts: Prompts,
    options: GenerationOptions,
    on_token: Callable[[NewTokens], None] | None = None,
) -> Generation:
    """All of :func:`stream` at once; errors as there. ``on_token`` is called with each piece of it."""
    tokens = stream(model, prompts, options)
    found: list[NewTokens] = []
    for new in tokens:
        if on_token is not None:
            on_token(new)
        found.append(new)
    new_ids_BN, loops_BN = (torch.stack(pieces, dim=1) for pieces in zip(*found, strict=True))
    rows = tuple(_rows_of(prompts, new_ids_BN.device))
    return Generation(rows, new_ids_BN, loops_BN, tokens.lengths_B, tokens.statistics)


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold = {threshold}: must be between 0 and 1, a probability")


def _rows_of(prompts: Prompts, device: torch.device) -> list[torch.Tensor]:
    if isinstance(prompts, torch.Tensor):
        if prompts.ndim != 2:
            raise ValueError(f"input_ids = tensor of shape {tuple(prompts.shape)}: must be (batch, tokens)")
        rows = list(prompts)
    else:
        rows = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    if not rows:
        raise ValueError("input_ids: no prompt; give at least one")
    return rows


def _check_prompt(row_S: torch.Tensor, number: int, config: IceConfig) -> None:
    if row_S.ndim != 1:
        raise ValueError(f"input_ids[{number}] = tensor of shape {tuple(row_S.shape)}: must be a row of token ids")
    if len(row_S) < 1:
        raise ValueError(f"input_ids[{number}]: the prompt is empty; give at least one token")
    lowest, highest = int(row_S.min()), int(row_S.max())
    if lowest < 0 or highest >= config.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"input_ids[{number}]: {wrong} is no token id; vocab_size = {config.vocab_size}")


def _check_limits(max_new_tokens: int, length: int, config: IceConfig) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if max_new_tokens > config.max_output_tokens:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}: must be at most max_output_tokens = {config.max_output_tokens}"
        )
    if length + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}: with {length} prompt tokens passes max_seq_len = {config.max_seq_len}"
        )


def _padded_left(rows: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, S) and the padding of each row, None where all have the same length (masks cost time)."""
    missing = [length - len(row) for row in rows]
    ids_BS = torch.stack([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, missing, strict=True)])
    return ids_BS, torch.tensor(missing, device=ids_BS.device) if any(missing) else None


def _new_cache(config: IceConfig, options: GenerationOptions) -> Cache:
    speculative = isinstance(options.decoding, Speculative)
    rewindable = options.decoding.draft_tokens if isinstance(options.decoding, Speculative) else 0
    cache = Cache.for_model(config, kv_policy=options.kv_policy, rewindable=rewindable)
    if speculative and (cache.loop_slots is not None or config.mlca_window is not None):
        pooled = f"mlca_window = {config.mlca_window}"
        name = pooled if cache.loop_slots is None else f"kv_policy = {options.kv_policy or config.kv_policy}"
        raise ValueError(f"{name}: tokens verified together see another past than one by one; decoding is not lossless")
    return cache


def _depth_controller(model: IceModel, threshold: float, gain_threshold: float = 0.0) -> DecodingController:
    if model.config.core == "apex":
        return ScoreSchedule(threshold, gain_threshold)
    if model.depth_heads is None:
        raise ValueError(f"threshold = {threshold}: this model has no depth heads to ask (slu = false)")
    return AdaptiveDepth(model.depth_heads, threshold)
