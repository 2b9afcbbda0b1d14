"""W&B and TensorBoard: where a run's numbers go besides ``metrics.jsonl``.

W&B is what ``WANDB_MODE`` says; without that it is online when ``WANDB_API_KEY`` is set and offline otherwise (``wandb
sync`` uploads it later). Its run id lives in the checkpoint, so that a resumed run continues the same curve. The key is
never read or logged by this code.

W&B keeps rows back in a process of its own, and a killed job takes them along. So a start first tells again, from
``metrics.jsonl``, what W&B may not have got: online what comes after the server's last step, offline what comes after
the last start that ended in order. The history has no gap then; a step that is told twice has the same values.

That process is this rank's own. A parent that used W&B leaves the address of its own in the environment; a run kept
there would outlive its killed rank, and W&B would call the run id "in use" when the next start asks for it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from launch.files import write_atomically
from pretrain.config import TrainingConfig
from pretrain.metrics import FILE_NAME, read_metrics

PARENTS_SERVICE = "WANDB_SERVICE"  # where a parent's W&B process is reached
FINISHED = "finished_step"  # below wandb/: the last step of the last start that ended in order


def new_wandb_id() -> str:
    """A fresh run id: eight characters, from the system's generator so that no seeded stream moves."""
    return secrets.token_hex(4)


def wandb_mode(setting: str) -> Any:
    """A mode of ``wandb.init``: ``setting``, or for ``auto`` what the environment says (W&B refuses one it lacks)."""
    if setting != "auto":
        return setting
    wanted = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    return {"run": "online", "dryrun": "offline"}.get(wanted, wanted)  # its older names


class Trackers:
    """The trackers of one run; built on the first rank only."""

    def __init__(self, config: TrainingConfig, run_path: Path, wandb_id: str | None, start_step: int) -> None:
        self._wandb_run: Any = None
        self._tensorboard: Any = None
        mode = wandb_mode(config.logging.wandb)
        if mode != "disabled":
            import wandb

            os.environ.pop(PARENTS_SERVICE, None)
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
            self._marker = run_path / "wandb" / FINISHED
            self._tell_again(run_path / FILE_NAME, self._first_missing(mode))
        self._step, self._row_open = start_step, False
        if config.logging.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard_folder = str(run_path / "tensorboard")
            self._tensorboard = SummaryWriter(self._tensorboard_folder, purge_step=start_step + 1)

    def _first_missing(self, mode: str) -> int:
        if mode == "online":
            return int(self._wandb_run.step)
        return int(self._marker.read_text()) + 1 if self._marker.exists() else 0

    def _tell_again(self, metrics: Path, first_step: int) -> None:
        """Send the rows from ``first_step`` on; the file ends at the step that this start resumes from."""
        for line in read_metrics(metrics):
            if line["step"] >= first_step:
                self._wandb_run.log(_numbers(line), step=line["step"])

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers of ``values`` under their names."""
        self._step = step
        numbers = _numbers(values)
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

    def leave_open(self) -> None:
        """The last step's row lacks its evaluation: the next start tells the row again, whole (online W&B keeps it)."""
        self._row_open = True

    def close(self) -> None:
        """Flush and finish."""
        if self._wandb_run is not None:
            self._wandb_run.finish()
            write_atomically(self._marker, f"{self._step - self._row_open}\n".encode())
        if self._tensorboard is not None:
            self._tensorboard.close()


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
