"""DeepSpeed's universal checkpoint format: how a run goes on with other ranks than it was saved by.

A checkpoint holds the optimizer's flat partitions, one file a rank. ``deepspeed.checkpoint.ds_to_universal`` puts them
together to one file a parameter and state (``zero/NAME/fp32.pt``, ``exp_avg.pt``, ``exp_avg_sq.pt``), experts of all
ranks in one tensor, and any number of ranks and any expert-parallel size that divides the experts can take its part of
them. With ``engine.py`` this is the seam that knows DeepSpeed: that one converts here and loads there.

Three things DeepSpeed 0.19.8 loses on the way, and ``load_into`` mends (ZeRO-3; found by comparing every state):

- **Adam's step.** Every partition's state gets *the same* step tensor, which then counts once for each partition and
  optimizer step: bias correction runs ahead by a factor of their number. Here each gets its own copy.
- **The groups.** Every optimizer group gets the first one's hyper-parameters: norms, biases and the injection would be
  decayed from then on. Here each keeps what the configuration says.
- **Memory.** ``zero/optimizer_state.pt`` holds the whole partition of rank 0, which every rank then reads to find one
  number. Here it is written without the tensors.
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

OPTIMIZER_STATE = "zero/optimizer_state.pt"


def write_universal(saved: Path, output: Path, workers: int = 1) -> None:
    """Convert the engine's files in ``saved`` (of ZeRO stage 1, 2 or 3) to the universal format in ``output``.

    Needs no process group. With one worker, memory for the largest parameter with its two moments; DeepSpeed's lines of
    progress are swallowed.
    """
    from deepspeed.checkpoint import ds_to_universal

    from pretrain.engine import restrict_unpickling

    restrict_unpickling()
    output.mkdir(parents=True, exist_ok=True)
    request = Namespace(
        input_folder=str(saved),
        output_folder=str(output),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ds_to_universal.main(request)
    (output.parent / "latest_universal").unlink()  # names a folder, for DeepSpeed's own command line
    path = output / OPTIMIZER_STATE
    torch.save(_without_partitions(torch.load(path, map_location="cpu", weights_only=True)), path)


def _without_partitions(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's global state, without what belongs to one rank."""
    kept = {key: value for key, value in state.items() if key not in ("fp32_flat_groups", "optimizer_state_dict")}
    inner = state.get("optimizer_state_dict")
    if inner is not None:  # ZeRO-3's
        steps = [values["step"] for values in inner["state"].values() if "step" in values]
        steps += [group["step"] for group in inner["param_groups"] if "step" in group]
        kept["optimizer_state_dict"] = {"state": {0: {"step": steps[0]}}, "param_groups": inner["param_groups"]}
    return kept


@contextlib.contextmanager
def mended(optimizer: Any) -> Iterator[None]:
    """Load a universal checkpoint inside; ``optimizer`` is the one that ZeRO wraps. Puts right what that confuses."""
    configured = [
        {key: group[key] for key in group if key not in ("params", "step")} for group in optimizer.param_groups
    ]
    yield
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
