"""The training loop: the story of a run on one screen.

What happens around a step is a handful of named collaborators: the batches (``data``), the engine, the checkpointer,
the evaluation, the log. Every rank executes the same calls in the same order; what ranks must agree on travels in one
small reduction a step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from launch.settings import EXIT_FINISHED, EXIT_PREEMPTED
from pretrain.checkpoint import Checkpointer, TrainingState
from pretrain.config import TrainingConfig
from pretrain.data import Batch, Prefetcher, Sampler
from pretrain.engine import StepOutcome, TrainingEngine
from pretrain.evaluate import Evaluator
from pretrain.loop_depth import sample_loops, sample_shallow_loop
from pretrain.losses import training_objective
from pretrain.preemption import StopRequest
from pretrain.run_log import RunLog
from pretrain.schedule import lr_scale


class TrainingFailedError(Exception):
    """The run cannot go on; the message says at which step and why. Exit status 1."""


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after a step."""

    outcome: StepOutcome
    terms: dict[str, float]  # means over ranks and micro-batches, see ``pretrain.losses.Objective``
    expert_load_TLE: Tensor | None
    data_wait_seconds: float  # mean over ranks of the time in which a step waited for its batches
    stop_requested: bool

    @property
    def loss(self) -> float:
        """The language-model loss in nats a token."""
        return self.terms["loss"]


class Trainer:
    """Runs a configuration from ``state`` to its last step."""

    def __init__(
        self,
        config: TrainingConfig,
        engine: TrainingEngine,
        sampler: Sampler,
        batches: Prefetcher,
        evaluator: Evaluator,
        checkpointer: Checkpointer,
        log: RunLog,
        stop: StopRequest,
    ) -> None:
        self.config, self.engine, self.sampler, self.batches = config, engine, sampler, batches
        self.evaluator = evaluator
        self.checkpointer, self.log, self.stop = checkpointer, log, stop

    def train(self, state: TrainingState) -> int:
        """Train from ``state`` to the last step; returns the exit status: finished, or preempted and resumable."""
        config = self.config
        while state.step < config.schedule.steps:
            started = time.monotonic()
            step = state.step + 1
            stage = self.sampler.stage_at(state.next_sample)
            tokens_per_step = config.data.global_batch_size * stage.sequence_length
            loops = sample_loops(config.loop, stage.mean_loops or config.mean_loops, config.run.seed, step)
            lr = config.optim.lr * lr_scale(config.schedule, step)
            batches = self.batches.step_batches(state.next_sample)
            result = self._step(batches, step, loops, lr)
            self._require_finite(result, step, batches)
            state = replace(
                state,
                step=step,
                next_sample=state.next_sample + config.data.global_batch_size,
                tokens=state.tokens + tokens_per_step,
                validation_bits_per_byte=None,
            )
            self.log.step(state, result, lr, loops, time.monotonic() - started, tokens_per_step, self.engine)
            self.checkpointer.poll()
            last = step == config.schedule.steps
            if step % config.eval.every == 0 or last:
                evaluation = self.evaluator.run(self.engine, config.mean_loops)
                state = replace(state, validation_bits_per_byte=evaluation.bits_per_byte)
                self.log.evaluation(state, evaluation)
            if step % config.checkpoint.every == 0 or last or result.stop_requested:
                self.checkpointer.save(state)
                self.log.saved(state, result.expert_load_TLE)
            if result.stop_requested and not last:
                saved = f"saved step {step}" if self.checkpointer.wait() else "the last save stands"
                self.log.say(f"asked to stop: {saved}; the same command continues from there")
                return EXIT_PREEMPTED
        if not self.checkpointer.wait():
            raise TrainingFailedError("the last save was not written; the same command continues from the one before")
        return EXIT_FINISHED

    def _step(self, batches: list[Batch], step: int, loops: int, lr: float) -> StepResult:
        """Accumulate gradients over ``batches``, update weights and router biases, agree on the numbers."""
        engine, config = self.engine, self.config
        reads = self._depths_to_read(step, loops)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            if batch.document_ids is not None:
                reads["document_ids"] = batch.document_ids.to(engine.device)
            if config.model.initial_state == "random":
                keys = torch.tensor(batch.sample_ids) ^ (config.run.seed << 32)
                reads["noise_keys"] = keys.to(engine.device)
            output = engine.forward(
                batch.input_ids.to(engine.device), loops, grad_loops=config.loop.grad_loops, **reads
            )
            objective = training_objective(output, batch.targets.to(engine.device), config)
            engine.backward(objective.total)
            for name, term in objective.terms.items():
                sums[name] = sums.get(name, 0) + term.double()
        outcome = engine.step(lr)
        expert_load = engine.take_expert_load()
        if expert_load is not None and not outcome.skipped:
            engine.balance_experts(expert_load)
        stop = float(self.stop.received is not None)
        waited = self.batches.waited_seconds
        *totals, waited, stop_votes = engine.sum_over_ranks([*torch.stack(list(sums.values())).tolist(), waited, stop])
        share = len(batches) * engine.place.world_size
        terms = {name: total / share for name, total in zip(sums, totals, strict=True)}
        return StepResult(outcome, terms, expert_load, waited / engine.place.world_size, stop_votes > 0)

    def _depths_to_read(self, step: int, loops: int) -> dict[str, Any]:
        """What CDL and SLU need to see besides the last loop: the same depths on every rank."""
        config = self.config
        reads: dict[str, Any] = {}
        if config.loop.cdl is not None or config.model.slu:
            shallow = sample_shallow_loop(loops, config.run.seed, step)
            if config.loop.cdl is not None:
                reads["read_loops"] = (shallow,)
            if config.model.slu:
                reads["probe_loop"] = shallow
        return reads

    def _require_finite(self, result: StepResult, step: int, batches: list[Batch]) -> None:
        finite_norm = math.isfinite(result.outcome.grad_norm) or result.outcome.skipped
        if math.isfinite(result.loss) and finite_norm:
            return
        raise TrainingFailedError(
            f"step {step}: loss {result.loss}, gradient norm {result.outcome.grad_norm}: not finite; rank "
            f"{self.engine.place.rank} had samples {[i for batch in batches for i in batch.sample_ids]}. The last "
            "checkpoint is untouched; lower optim.lr, or look at these samples"
        )
