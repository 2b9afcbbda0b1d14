"""W&B and TensorBoard: where a run's numbers go besides ``metrics.jsonl``.

W&B is online when ``WANDB_API_KEY`` is set and offline otherwise (``wandb sync`` uploads it later); its run id lives in
the checkpoint, so that a resumed run continues the same curve. The key is never read or logged by this code.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from pretrain.config import TrainingConfig


def new_wandb_id() -> str:
    """A fresh run id: eight characters, from the system's generator so that no seeded stream moves."""
    return secrets.token_hex(4)


class Trackers:
    """The trackers of one run; built on the first rank only."""

    def __init__(self, config: TrainingConfig, run_path: Path, wandb_id: str | None, start_step: int) -> None:
        self._wandb_run: Any = None
        self._tensorboard: Any = None
        mode = config.logging.wandb
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        if mode != "disabled":
            import wandb

            self._wandb_run = wandb.init(
                project=config.logging.wandb_project,
                group=config.logging.wandb_group,
                name=config.run.name,
                id=wandb_id,
                resume="allow",
                dir=str(run_path),
                mode=mode,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )
        if config.logging.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard_folder = str(run_path / "tensorboard")
            self._tensorboard = SummaryWriter(self._tensorboard_folder, purge_step=start_step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers of ``values`` under their names."""
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        if self._wandb_run is not None:
            self._wandb_run.log(numbers, step=step)
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)

    def rewind(self, step: int) -> None:
        """Steps after ``step`` will be sent again: TensorBoard drops the old ones, W&B keeps them."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = type(self._tensorboard)(self._tensorboard_folder, purge_step=step + 1)

    def close(self) -> None:
        """Flush and finish."""
        if self._wandb_run is not None:
            self._wandb_run.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()
