"""What ``config.json`` of an exported Ice model means to transformers.

The architecture is one object under one key, ``architecture``, so that none of its names (``rope_theta``,
``sliding_window``, ...) is taken for one of transformers' own; :meth:`IceConfiguration.ice` checks it. What other
libraries ask every model for (``hidden_size``, ``vocab_size``, ...) follows from it.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from model.config import IceConfig


class IceConfiguration(PretrainedConfig):
    """An Ice model's description.

    Args:
        architecture: The fields of ``IceConfig``; missing ones have their defaults.
        n_loops: Depth T of a call that names none; None: the architecture's ``max_loop_iters``.
        kwargs: transformers' own settings.

    Raises:
        ValueError: For an architecture that cannot be, or a depth below 1.
    """

    model_type = "ice"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own form)

    def __init__(self, architecture: dict[str, Any] | None = None, n_loops: int | None = None, **kwargs: Any) -> None:
        config = IceConfig.model_validate(architecture or {})
        if n_loops is not None and n_loops < 1:
            raise ValueError(f"n_loops = {n_loops}: must be at least 1")
        self.architecture = config.model_dump(mode="json")
        self.n_loops = config.max_loop_iters if n_loops is None else n_loops
        self.vocab_size = config.vocab_size
        self.hidden_size = config.dim
        self.num_attention_heads = config.n_heads
        self.num_hidden_layers = config.effective_depth
        self.max_position_embeddings = config.max_seq_len
        self.use_cache = True
        super().__init__(**kwargs | {"tie_word_embeddings": config.tie_embeddings})

    @property
    def ice(self) -> IceConfig:
        """The architecture, checked."""
        return IceConfig.model_validate(self.architecture)
