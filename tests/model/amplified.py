"""Models that do something: as initialised, updates are so small that a wrong term hides behind the state.

Shared by the tests that compare two ways to the same numbers (loops, caches, expert caches, scales, speculation).
"""

from __future__ import annotations

from collections.abc import Collection

from model import IceConfig, IceModel

UPDATES = ("o_proj.weight", "down_proj", "down_proj.weight")
LOGITS = ("head.weight",)


def amplified(config: IceConfig, logits: bool = False, uneven: Collection[str] = ()) -> IceModel:
    """A model whose updates are as large as its state, and whose loops differ.

    With ``logits`` those are larger too, so that a wrong value changes the token. Parameters with a part of ``uneven``
    in their name are drawn anew: gates that start at zero would otherwise all say the same.
    """
    model = IceModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith(UPDATES + LOGITS * logits):
            parameter.data.mul_(5)
        if name.endswith("step_embedding.gain"):
            parameter.data.fill_(0.3)
        if any(part in name for part in uneven):
            parameter.data.normal_(std=0.3)
    return model
