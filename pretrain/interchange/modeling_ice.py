"""An Ice model as transformers calls one: ``from_pretrained``, ``forward`` with labels, ``generate`` with the cache.

A thin coat over :class:`~model.looped_lm.IceModel`, which lies beside this file. Depth is an argument of every call:
``model(ids, n_loops=8)``, ``model.generate(ids, n_loops=8)``; without it ``config.n_loops``.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.attention.cache import Cache
from model.looped_lm import IceModel
from pretrain.interchange.configuration_ice import IceConfiguration


class IceCache:
    """The model's cache under the names that ``generate`` asks for.

    Args:
        config: Whose layers and loops it holds.
        rewindable: Tokens that ``crop`` may take back; windows keep as many more.
        kv_policy: Instead of the configuration's.
    """

    is_compileable = False

    def __init__(self, config: IceConfiguration, rewindable: int = 0, kv_policy: str | None = None) -> None:
        self.slots = Cache.for_model(config.ice, kv_policy=kv_policy, rewindable=rewindable)
        self.padding_B: torch.Tensor | None = None  # padding at the left of each prompt

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, the same for every layer."""
        return self.slots.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was; (B,) int64."""
        self.slots.select_rows(beam_idx)
        if self.padding_B is not None:
            self.padding_B = self.padding_B.index_select(0, beam_idx.to(self.padding_B.device))

    def crop(self, max_length: int) -> None:
        """Forget all tokens from ``max_length`` on; negative: that many of the latest."""
        self.slots.rewind(max_length if max_length >= 0 else self.slots.length + max_length)


class IceForCausalLM(PreTrainedModel, GenerationMixin):
    """A looped language model with its head."""

    config_class = IceConfiguration
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012  (transformers' own form)

    def __init__(self, config: IceConfiguration) -> None:
        super().__init__(config)
        ice = config.ice
        self.model = IceModel(ice)
        if ice.tie_embeddings:
            self._tied_weights_keys = {"model.head.weight": "model.embed.weight"}
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: every module's constructor has drawn its own."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: a looped layer remembers each loop, and the first forward makes the cache that can."""
        return False

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding."""
        return self.model.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        """The head."""
        return self.model.head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: IceCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        n_loops: int | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with ``labels`` the mean loss of predicting each from the tokens before it.

        Args:
            input_ids: (B, S) int64; with ``past_key_values`` only the tokens it does not hold yet.
            attention_mask: (B, S), or with a cache (B, past + S): 0 for padding at the left. Padding at the right is
                allowed without a cache: no token of the text sees it.
            past_key_values: What an earlier call returned.
            labels: (B, S) int64, the input ids themselves; -100 is not counted.
            use_cache: Return a cache; needs ``torch.no_grad()``. Default: only when one was given.
            n_loops: Depth; None: ``config.n_loops``. The same for all calls with one cache.
            logits_to_keep: 1: logits (B, 1, V) of the last token only; 0: of all.
            return_dict: False gives a tuple.

        Raises:
            ValueError: For a mask with holes, more than ``max_seq_len`` tokens, another depth than the cache's.
        """
        loops = self.config.n_loops if n_loops is None else n_loops
        cache = past_key_values
        if cache is None and use_cache:
            cache = IceCache(self.config)
        if logits_to_keep not in (0, 1):
            raise ValueError(f"logits_to_keep = {logits_to_keep}: must be 0 (all) or 1 (the last)")
        if labels is not None and logits_to_keep:
            raise ValueError("labels: need the logits of all tokens; leave logits_to_keep at 0")
        if cache is not None and cache.slots.length > 0:
            padding_B = cache.padding_B
        else:
            padding_B = _left_padding(attention_mask, input_ids, decoding=cache is not None)
        if cache is not None:
            cache.padding_B = padding_B
        logits = self.model(
            input_ids,
            loops,
            cache=None if cache is None else cache.slots,
            padding=padding_B,
            only_last=logits_to_keep == 1,
        )
        loss = None
        if labels is not None:
            targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(logits.device))
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict is None or return_dict else output.to_tuple()


def _left_padding(mask: torch.Tensor | None, input_ids: torch.Tensor, decoding: bool) -> torch.Tensor | None:
    """(B,) int64, padding tokens at the left of each row; None where there are none."""
    if mask is None:
        return None
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: must be that of input_ids, {tuple(input_ids.shape)}"
        )
    real = mask.bool()
    if bool(real.all()):
        return None
    # One run of text a row: the places where it begins and ends are all there is.
    steps = torch.diff(real.int(), dim=1).abs().sum(1)
    first = real.int().argmax(dim=1)
    ends_early = ~real[:, -1]
    if bool((steps > 1 + ((first > 0) & ends_early).int()).any()) or not bool(real.any(dim=1).all()):
        raise ValueError("attention_mask: must be ones without a gap in every row")
    if decoding and bool(ends_early.any()):
        raise ValueError("attention_mask: decoding continues the last token; pad at the left (padding_side='left')")
    return first if bool(first.any()) else None
