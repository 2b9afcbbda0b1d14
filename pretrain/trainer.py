"""The training loop: the story of a run on one screen.

What happens around a step is a handful of named collaborators: the batches (``data``), the engine, the checkpointer,
the evaluation, the guard that judges losses, the watchdog, the log. Every rank executes the same calls in the same
order; what ranks must agree on travels in two small reductions a step: before it (is anybody asked to stop, or without
its data?), and after it (the numbers).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.mixture import Stage
from launch.settings import EXIT_FINISHED, EXIT_PREEMPTED
from pretrain.checkpoint import Checkpointer, TrainingState
from pretrain.config import TrainingConfig
from pretrain.data import Batch, Prefetcher, Sampler
from pretrain.engine import StepOutcome, TrainingEngine
from pretrain.evaluate import Evaluator
from pretrain.fault_log import FaultLog
from pretrain.loop_depth import sample_loops, sample_shallow_loop
from pretrain.losses import training_objective
from pretrain.preemption import StopRequest
from pretrain.run_log import RunLog
from pretrain.schedule import lr_scale
from pretrain.stability import StabilityGuard, Trouble
from pretrain.stragglers import StragglerCheck
from pretrain.watchdog import Watchdog


class TrainingFailedError(Exception):
    """The run cannot go on; the message says at which step and why. Exit status 1."""


@dataclass(frozen=True)
class StepPlan:
    """What a step is, known before it: a pure function of the settings, the seed and the state."""

    step: int
    first_sample: int
    stage: Stage
    loops: int
    lr: float
    tokens: int


class StepResult(NamedTuple):
    """What all ranks know after a step."""

    outcome: StepOutcome
    terms: dict[str, float]  # means over ranks and micro-batches, see ``pretrain.losses.Objective``
    expert_load_TLE: Tensor | None
    data_wait_seconds: float  # mean over ranks of the time in which a step waited for its batches

    @property
    def loss(self) -> float:
        """The language-model loss in nats a token."""
        return self.terms["loss"]


@dataclass(frozen=True)
class Trainer:
    """Runs a configuration from a state to its last step."""

    config: TrainingConfig
    engine: TrainingEngine
    sampler: Sampler
    batches: Prefetcher
    evaluator: Evaluator
    checkpointer: Checkpointer
    log: RunLog
    faults: FaultLog
    stop: StopRequest
    guard: StabilityGuard
    watchdog: Watchdog
    stragglers: StragglerCheck

    def train(self, state: TrainingState) -> int:
        """Train from ``state`` to the last step; returns the exit status: finished, or preempted and resumable."""
        config = self.config
        saved_step = state.step
        if self.guard.evaluation_due:
            state = self._evaluate(state)
        while state.step < config.schedule.steps:
            started = time.monotonic()
            plan = self._plan(state)
            batches = self._fetch(plan)
            if batches is None:
                return self._leave(state, saved_step)
            with self.watchdog.phase("step"):
                result = self._step(plan, batches)
                trouble = self._judge(plan, result)
            if trouble is not None:
                state = self._roll_back(plan, trouble)
                saved_step = state.step
                continue
            state = replace(
                state,
                step=plan.step,
                next_sample=plan.first_sample + config.data.global_batch_size,
                tokens=state.tokens + plan.tokens,
                validation_bits_per_byte=None,
            )
            seconds = time.monotonic() - started
            self.log.step(state, result, plan, seconds, self.guard, self.stragglers.check(plan.step), self.engine)
            self.checkpointer.poll()
            last = plan.step == config.schedule.steps
            if plan.step % config.eval.every == 0 or last:
                state = self._evaluate(state)
            if plan.step % config.checkpoint.every == 0 or last:
                saved_step = self._save(state)
                self.log.saved(state, result.expert_load_TLE)
        if self.guard.evaluation_due:
            return self._leave(state, saved_step)
        if not self._wait_for_save():
            raise TrainingFailedError("the last save was not written; the same command continues from the one before")
        return EXIT_FINISHED

    def _plan(self, state: TrainingState) -> StepPlan:
        config, step = self.config, state.step + 1
        first_sample = self.guard.next_sample(state.next_sample)
        stage = self.sampler.stage_at(first_sample)
        return StepPlan(
            step=step,
            first_sample=first_sample,
            stage=stage,
            loops=sample_loops(config.loop, stage.mean_loops or config.mean_loops, config.run.seed, step),
            lr=config.optim.lr * lr_scale(config.schedule, step),
            tokens=config.data.global_batch_size * stage.sequence_length,
        )

    def _fetch(self, plan: StepPlan) -> list[Batch] | None:
        """This rank's batches; None on every rank when one was asked to stop, whatever the others have."""
        # The data's own time-out speaks first: it names the samples.
        with self.watchdog.phase("data", at_least=self.config.data.read_timeout_seconds + 60):
            batches = self.batches.step_batches(plan.first_sample, give_up=self.stop.is_set)
            return None if self._any_rank(self.stop.is_set() or batches is None) else batches

    def _any_rank(self, mine: bool) -> bool:
        """Whether it is so on some rank; collective."""
        return self.engine.sum_over_ranks([float(mine)]) != [0.0]

    def _step(self, plan: StepPlan, batches: list[Batch]) -> StepResult:
        """Accumulate gradients over ``batches``, update weights and router biases, agree on the numbers."""
        engine, config = self.engine, self.config
        reads = self._depths_to_read(plan.step, plan.loops)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            if batch.document_ids is not None:
                reads["document_ids"] = batch.document_ids.to(engine.device)
            if config.model.initial_state == "random":
                keys = torch.tensor(batch.sample_ids) ^ (config.run.seed << 32)
                reads["noise_keys"] = keys.to(engine.device)
            targets_BS = batch.targets.to(engine.device)
            output = engine.forward(
                batch.input_ids.to(engine.device),
                plan.loops,
                targets=targets_BS,
                grad_loops=config.loop.grad_loops,
                **reads,
            )
            objective = training_objective(output, targets_BS, config)
            engine.backward(objective.total)
            for name, term in objective.terms.items():
                sums[name] = sums.get(name, 0) + term.double()
        outcome = engine.step(plan.lr)
        expert_load = engine.take_expert_load()
        if expert_load is not None and not outcome.skipped:
            engine.balance_experts(expert_load)
        mine = torch.stack(list(sums.values())).tolist()
        if outcome.skipped and not outcome.scale_lowered:
            self._record_skip(plan, batches, all(map(math.isfinite, mine)))
        *totals, waited = engine.sum_over_ranks([*mine, self.batches.waited_seconds])
        share = len(batches) * engine.place.world_size
        terms = {name: total / share for name, total in zip(sums, totals, strict=True)}
        return StepResult(outcome, terms, expert_load, waited / engine.place.world_size)

    def _depths_to_read(self, step: int, loops: int) -> dict[str, Any]:
        """What CDL, SLU and Apex's verifier need to see besides the last loop: the same depths on every rank."""
        config = self.config
        reads: dict[str, Any] = {}
        probed = config.model.slu or config.model.core == "apex"
        if config.loop.cdl is not None or probed:
            shallow = sample_shallow_loop(loops, config.run.seed, step)
            if config.loop.cdl is not None:
                reads["read_loops"] = (shallow,)
            if probed:
                reads["probe_loop"] = shallow
        return reads

    def _record_skip(self, plan: StepPlan, batches: list[Batch], finite: bool) -> None:
        """Say which ranks and samples made a step's numbers go wrong; where all losses are finite, all may have."""
        samples = [sample for batch in batches for sample in batch.sample_ids]
        by_rank = self.engine.gather_objects((self.faults.host, finite, samples))
        in_loss = any(not rank_finite for _, rank_finite, _ in by_rank)
        suspects = [
            {"rank": rank, "host": host, "samples": its_samples}
            for rank, (host, rank_finite, its_samples) in enumerate(by_rank)
            if not (in_loss and rank_finite)
        ]
        where = "loss" if in_loss else "gradients"
        ranks = ", ".join(f"rank {suspect['rank']} on {suspect['host']}" for suspect in suspects[:4])
        self.log.say(f"step {plan.step} skipped: {where} not finite ({ranks}{' ...' if len(suspects) > 4 else ''})")
        if self.engine.place.is_first:
            self.faults.add("skipped_step", step=plan.step, where=where, suspects=suspects)

    def _judge(self, plan: StepPlan, result: StepResult) -> Trouble | None:
        outcome = result.outcome
        if outcome.scale_lowered and math.isfinite(result.loss):
            return None  # fp16's scaler tries how far it can go: no fault of these samples
        return self.guard.observe(plan.step, plan.first_sample, plan.stage.from_tokens, result.loss, outcome.skipped)

    def _roll_back(self, plan: StepPlan, trouble: Trouble) -> TrainingState:
        """Load the last checkpoint from before the trouble; the samples since are passed over from now on."""
        engine, guard = self.engine, self.guard
        story = f"step {plan.step}: {trouble.reason}"
        if guard.rollbacks >= self.config.stability.max_rollbacks:
            raise TrainingFailedError(
                f"{story}, after {guard.rollbacks} roll-backs (stability.max_rollbacks); look at {self.faults.path}, "
                "lower optim.lr, or name samples to pass over in stability.skip_samples"
            )
        with self.watchdog.phase("loading"):
            state = self.checkpointer.resume(newest_step=trouble.newest_step)
        if state is None:
            raise TrainingFailedError(
                f"{story}, and no checkpoint of step {trouble.newest_step} or before is left to go back to; lower "
                "optim.lr, save more often (checkpoint.every) or keep more (checkpoint.keep_last)"
            )
        guard.roll_back(trouble, state.stability)
        self.batches.end = guard.end_of(state.next_sample, self.config.schedule.steps - state.step)
        self.sampler.require_enough(self.batches.end)
        self.log.rolled_back(state)
        passed_over = [trouble.skip_from, trouble.skip_to]
        samples = f"samples {trouble.skip_from} to {trouble.skip_to - 1}"
        self.log.say(f"{story}; back to step {state.step}, from where {samples} are passed over")
        if engine.place.is_first:
            self.faults.add(
                "roll_back", step=plan.step, to_step=state.step, reason=trouble.reason, skipped_samples=passed_over
            )
        return self._evaluate(state) if guard.evaluation_due else state

    def _evaluate(self, state: TrainingState) -> TrainingState:
        """Evaluate, or, when a rank is asked to stop meanwhile, leave it to the resumed run."""
        with self.watchdog.phase("evaluation"):
            result = self.evaluator.run(self.engine, self.config.mean_loops, lambda: self._any_rank(self.stop.is_set()))
        self.guard.evaluation_due = result is None
        if result is None:
            self.log.evaluation_left_out()
            return state
        state = replace(state, validation_bits_per_byte=result.bits_per_byte)
        self.log.evaluation(state, result)
        return state

    def _save(self, state: TrainingState) -> int:
        # It may wait for the write of the one before, which has a time-out of its own.
        with self.watchdog.phase("saving", at_least=self.config.checkpoint.write_timeout_seconds + 60):
            self.checkpointer.save(replace(state, stability=self.guard.memory()))
        return state.step

    def _leave(self, state: TrainingState, saved_step: int) -> int:
        if state.step > saved_step:
            self._save(state)
        saved = f"saved step {state.step}" if self._wait_for_save() else "the last save stands"
        self.log.say(f"asked to stop: {saved}; the same command continues from there")
        return EXIT_PREEMPTED

    def _wait_for_save(self) -> bool:
        with self.watchdog.phase("writing", at_least=self.config.checkpoint.write_timeout_seconds + 60):
            return self.checkpointer.wait()
