"""Everything a run says about itself: the metrics file, the trackers, the console, the pictures.

Built on every rank with the same calls, so that the trainer needs no ``if rank == 0``; only the first rank writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pretrain.checkpoint import TrainingState
from pretrain.config import TrainingConfig
from pretrain.console import TrainingConsole
from pretrain.engine import TrainingEngine
from pretrain.evaluate import Evaluation
from pretrain.metrics import FILE_NAME, MetricsFile, expert_load_metrics
from pretrain.plots import plot_expert_load, plot_losses
from pretrain.tracking import Trackers

if TYPE_CHECKING:
    from pretrain.stability import StabilityGuard
    from pretrain.trainer import StepPlan, StepResult


class RunLog:
    """The first rank's record of a run; a silent stand-in on the others."""

    def __init__(
        self, config: TrainingConfig, start: TrainingState, is_first: bool, reference_bits_per_byte: float | None
    ) -> None:
        self._config, self._path, self._reference = config, config.run.path, reference_bits_per_byte
        self._console = TrainingConsole(
            config.schedule.steps, start.step, config.logging.console_every, enabled=is_first
        )
        self._metrics = self._open_metrics(start) if is_first else None
        self._trackers = Trackers(config, self._path, start.wandb_id, start.step) if is_first else None

    def _open_metrics(self, state: TrainingState) -> MetricsFile:
        return MetricsFile(self._path / FILE_NAME, state.step, state.stability.get("evaluation_due", False))

    def say(self, text: str) -> None:
        """A line on the console."""
        self._console.say(text)

    def step(
        self,
        state: TrainingState,
        result: StepResult,
        plan: StepPlan,
        step_seconds: float,
        guard: StabilityGuard,
        slowest: dict[str, float],
        engine: TrainingEngine,
    ) -> None:
        """Record a training step. The injection radius needs a gather of ``log_A``, so every rank takes part."""
        line: dict[str, Any] = {
            "step": state.step,
            "loss": result.loss,
            "lr": plan.lr,
            "grad_norm": result.outcome.grad_norm,
            "loops": plan.loops,
            "tokens": state.tokens,
            "tokens_per_second": plan.tokens / step_seconds,
            "step_seconds": step_seconds,
            "data_wait_seconds": result.data_wait_seconds,
            "next_sample": state.next_sample,
            "skipped_steps": guard.skipped_steps,
            "rollbacks": guard.rollbacks,
            **{name: value for name, value in result.terms.items() if name != "loss"},
            **slowest,
        }
        radius = engine.injection_radius()
        if radius is not None:
            line["injection_radius"] = radius
        if result.outcome.skipped:
            line["skipped"] = True
        if result.expert_load_TLE is not None:
            line.update(expert_load_metrics(result.expert_load_TLE))
        self._record(state.step, line)
        self._console.step(line)

    def evaluation_left_out(self) -> None:
        """The last step's evaluation is left to the next start."""
        if self._trackers is not None:
            self._trackers.leave_open()

    def evaluation(self, state: TrainingState, result: Evaluation) -> None:
        """Record an evaluation."""
        line: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            "validation_bits_per_byte": result.bits_per_byte,
            "validation_nats_per_token": result.nats_per_token,
            **{f"validation_bits_per_byte/{name}": value for name, value in result.bits_per_byte_by_domain.items()},
        }
        for source, bits in result.by_source.items():
            line[f"validation_bits_per_byte/source/{source}"] = bits.bits_per_byte
            for domain, value in bits.bits_per_byte_by_domain.items():
                line[f"validation_bits_per_byte/source/{source}/{domain}"] = value
        self._record(state.step, line)
        by_domain = "  ".join(f"{name} {value:.3f}" for name, value in result.bits_per_byte_by_domain.items())
        self.say(f"step {state.step}: validation {result.bits_per_byte:.4f} bits a byte  ({by_domain})")
        if result.by_source:
            by_source = "  ".join(f"{name} {bits.bits_per_byte:.3f}" for name, bits in result.by_source.items())
            self.say(f"step {state.step}: by source  {by_source}")

    def rolled_back(self, state: TrainingState) -> None:
        """Forget the steps after ``state``, which are about to be run again, as a resume does.

        W&B keeps what it was told: its curve goes on where the replayed steps pass the old ones.
        """
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = self._open_metrics(state)
        if self._trackers is not None:
            self._trackers.rewind(state.step)

    def saved(self, state: TrainingState, expert_load_TLE: Tensor | None) -> None:
        """Redraw the pictures at each checkpoint."""
        if self._metrics is None or not self._config.logging.plot:
            return
        plot_losses(self._path / FILE_NAME, self._path / "plots" / "loss.png", self._reference)
        if expert_load_TLE is not None:
            plot_expert_load(expert_load_TLE, self._path / "plots" / "expert_load.png")

    def _record(self, step: int, line: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.append(line)
        if self._trackers is not None:
            self._trackers.log(step, line)

    def close(self) -> None:
        """Flush everything."""
        self._console.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._trackers is not None:
            self._trackers.close()
