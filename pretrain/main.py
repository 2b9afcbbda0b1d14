"""Train a looped MoE language model: ``deepspeed pretrain/main.py --config configs/ice_tiny.json``.

Validates everything first (status 78 and one line when something is wrong), then starts the process group, resumes when
the run directory holds a valid checkpoint, and trains. ``--dry-run`` prints the plan and trains nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.dataset.reader import Dataset
from launch import preflight
from launch.environment import Place, discover_place
from launch.files import write_json_atomically
from launch.settings import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_FINISHED,
    BadInputError,
    exit_with_status,
    load_settings,
)
from pretrain.config import DEFAULT_SUB_GROUP_SIZE, TrainingConfig, check_topology

if TYPE_CHECKING:
    from pretrain.checkpoint import TrainingState
    from pretrain.data import AnyDataset, AnyHeldOut, Sampler
    from pretrain.engine import TrainingEngine
    from pretrain.fault_log import FaultLog
    from pretrain.preemption import StopRequest
    from pretrain.watchdog import Watchdog


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``--local_rank`` is what the DeepSpeed launcher passes, and is not used."""
    parser = argparse.ArgumentParser(description="Train a looped MoE language model.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="such as configs/ice_tiny.json")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="overrides", help="override one setting"
    )
    parser.add_argument("--dry-run", action="store_true", help="validate, print the plan, train nothing")
    parser.add_argument("--ranks", type=int, help="with --dry-run: plan for this many ranks")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse_arguments(arguments)
    config = load_settings(TrainingConfig, options.config, options.overrides)
    if options.dry_run:
        from pretrain.dry_run import dry_run

        return dry_run(config, options.config, options.ranks)
    place = discover_place()
    check_topology(config, place.world_size, str(options.config))
    faulthandler.enable()  # a shard cut short while it is mapped into memory ends a process by SIGBUS: say where
    return train(config, place)


def open_training_data(config: TrainingConfig) -> AnyDataset:
    """The main data set of ``config``; ``BadInputError`` when it is missing, damaged or has another vocabulary."""
    from pretrain.data import check_vocabulary, open_main

    dataset = open_main(config.data)
    check_vocabulary(dataset, config.model.vocab_size)
    return dataset


def train(config: TrainingConfig, place: Place) -> int:
    """Check what needs no process group, start the engine, and train under the watchdog; returns the exit status."""
    # Before the imports, which take seconds (torch, DeepSpeed, matplotlib): a signal may come at any time.
    from pretrain.preemption import StopRequest

    stop = StopRequest()
    from pretrain.data import SlowDataError, held_out_sets, open_sampler
    from pretrain.engine import TrainingEngine
    from pretrain.fault_log import FaultLog
    from pretrain.stability import StabilityGuard
    from pretrain.watchdog import Watchdog, new_session

    dataset = open_training_data(config)
    sampler = open_sampler(config.data, config.run.seed, config.model.vocab_size, dataset)
    sampler.require_enough(StabilityGuard(config, {}).end_of(0, config.schedule.steps))
    held_out = held_out_sets(config.data, dataset, [source.dataset for source in sampler.sources])
    run_path = config.run.path
    checkpoints = run_path / "checkpoints"
    if config.checkpoint.resume == "never" and any(checkpoints.glob("step_*")):
        raise BadInputError(
            f"{checkpoints}: already holds checkpoints and checkpoint.resume = never; choose another run.name"
        )
    initial = None
    if config.run.init_from is not None:
        from pretrain.interchange.initial_weights import open_initial

        initial = open_initial(Path(config.run.init_from), config.model)
    engine = TrainingEngine(config, place, initial)
    hosts = engine.gather_objects(socket.gethostname())
    session = engine.gather_objects(new_session())[0]
    faults = FaultLog(run_path, place.rank)
    watchdog = Watchdog(config.watchdog, place, hosts, session, run_path, faults)
    watchdog.start(engine.rendezvous_store(f"ice/{session}"), stop)
    engine.barrier()
    me = f"rank {place.rank} on {hosts[place.rank]}"
    try:
        if config.run.preflight:
            _check_before(config, engine)
        return _train_watched(config, engine, dataset, sampler, held_out, stop, watchdog, faults, hosts)
    except AgreedError as refusal:
        watchdog.leave()
        engine.close()
        raise BadInputError(str(refusal)) from None
    except BadInputError as error:
        # Found by this rank alone (a damaged shard on one node): the others learn it from the watchdog.
        print(f"error: {me}: {error}", file=sys.stderr, flush=True)
        watchdog.fail(EXIT_BAD_INPUT, str(error))
        return EXIT_BAD_INPUT
    except (OSError, SlowDataError) as error:
        print(f"error: {me}: {error}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        faults.add("storage", error=str(error))
        watchdog.fail(EXIT_FAILED, str(error))
        return EXIT_FAILED
    except Exception as error:
        watchdog.blame()  # ends the process where the true reason is a rank that is gone
        watchdog.fail(EXIT_FAILED, f"{type(error).__name__}: {error}")
        raise


class AgreedError(Exception):
    """Bad input that every rank found alike, before any step: they can part in order."""


def _check_before(config: TrainingConfig, engine: TrainingEngine) -> None:
    """The cheap part of the preflight: wrong input ends the run, a machine's fault is only said."""
    findings = preflight.inspect(config, engine.place, engine.gather_objects)
    for finding in findings:
        if finding.wrong == "input":
            raise AgreedError(f"preflight: {finding.check}: {finding.detail} (run.preflight = false ignores this)")
        if finding.wrong == "machine" and engine.place.is_first:
            print(f"preflight: {finding.check}: {finding.detail}", file=sys.stderr, flush=True)


def _train_watched(
    config: TrainingConfig,
    engine: TrainingEngine,
    dataset: AnyDataset,
    sampler: Sampler,
    held_out: list[AnyHeldOut],
    stop: StopRequest,
    watchdog: Watchdog,
    faults: FaultLog,
    hosts: list[str],
) -> int:
    """Resume, assemble the run's collaborators, and train."""
    from pretrain.checkpoint import Checkpointer, CheckpointError, Fence, RunIdentity, TrainingState
    from pretrain.data import BatchLoader, Prefetcher
    from pretrain.evaluate import Evaluator, gzip9_bits_per_byte
    from pretrain.run_log import RunLog
    from pretrain.run_tokenizer import keep_tokenizer
    from pretrain.stability import StabilityGuard
    from pretrain.stragglers import StragglerCheck
    from pretrain.tracking import new_wandb_id
    from pretrain.trainer import Trainer, TrainingFailedError

    place, run_path, sub_groups = engine.place, config.run.path, config.parallel.sub_group_size
    identity = RunIdentity(
        model=config.model.model_dump(mode="json"),
        data=sampler.identity(),
        topology={
            "ranks": place.world_size,
            "zero_stage": config.parallel.zero_stage,
            "expert_parallel_size": config.parallel.expert_parallel_size,
            "dtype": engine.precision.name,
            # Absent for AdamW, as in checkpoints of before there was a choice.
            **({} if config.optim.kind == "adamw" else {"optimizer": config.optim.kind}),
            # Absent where nobody has chosen one, likewise.
            **({} if sub_groups == DEFAULT_SUB_GROUP_SIZE else {"sub_group_size": sub_groups}),
        },
    )
    notices: list[str] = []
    fence = Fence(run_path)
    checkpointer = Checkpointer(run_path / "checkpoints", config.checkpoint, identity, engine, fence, notices.append)
    wandb_id = engine.gather_objects(config.logging.wandb_id or new_wandb_id())[0]
    try:
        with watchdog.phase("loading"):
            resumed = checkpointer.resume()
        start = resumed or TrainingState(step=0, next_sample=0, tokens=0, wandb_id=wandb_id)
        guard = StabilityGuard(config, start.stability)
        end = guard.end_of(start.next_sample, config.schedule.steps - start.step)
        sampler.require_enough(end)
    except BadInputError as error:
        raise AgreedError(str(error)) from None
    except CheckpointError as error:
        if place.is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        watchdog.leave()
        return EXIT_FAILED
    if place.is_first:
        write_json_atomically(run_path / "config.json", config.model_dump(mode="json"))
        keep_tokenizer(dataset, run_path)
    reference = gzip9_bits_per_byte(dataset) if isinstance(dataset, Dataset) else None
    log = RunLog(config, start, place.is_first, reference)
    checkpointer.say = log.say
    for notice in notices:
        log.say(notice)
    log.say(_opening_line(config, engine, start, resumed is not None))
    for line in (*engine.kernels, *engine.fp8):
        log.say(line)
    loader = BatchLoader(
        sampler,
        config.data.global_batch_size,
        config.parallel.micro_batch_size,
        place.rank,
        place.world_size,
        config.data.document_mask,
    )
    data = config.data
    with Prefetcher(loader, end, data.prefetch_workers, data.prefetch_steps, data.read_timeout_seconds) as batches:
        evaluator = Evaluator(config, held_out)
        stragglers = StragglerCheck(config.stragglers, engine, hosts, faults, log.say)
        trainer = Trainer(
            config, engine, sampler, batches, evaluator, checkpointer, log, faults, stop, guard, watchdog, stragglers
        )
        try:
            status = trainer.train(start)
        except (TrainingFailedError, CheckpointError) as error:
            # Every rank has come to the same end: a save that is being written can still be finished.
            if isinstance(error, TrainingFailedError):
                checkpointer.wait()
            log.say(f"error: {error}")
            log.close()
            watchdog.leave()
            return EXIT_FAILED
    log.say(f"run directory: {run_path}")
    if config.logging.plot and status == EXIT_FINISHED:
        log.say(f"loss plot: {run_path / 'plots' / 'loss.png'}")
    log.close()
    watchdog.leave()
    engine.close()
    if batches.stuck:
        os._exit(status)  # the interpreter would wait for the thread whose read never ends
    return status


def _opening_line(config: TrainingConfig, engine: TrainingEngine, start: TrainingState, resumed: bool) -> str:
    parallel, precision = config.parallel, engine.precision
    topology = f"{engine.place.world_size} ranks, ZeRO-{parallel.zero_stage}, EP={parallel.expert_parallel_size}"
    where = f"resuming after step {start.step}" if resumed else "from the beginning"
    remat = f"remat {config.loop.remat}" + (" in host memory" if config.loop.remat_offload else "")
    stock = engine.stock_expert_layer
    experts = f"; the engine's own expert layer: {stock}" if stock else ""
    return f"{config.run.path}: {where}; {topology}; {precision.name} ({precision.reason}); {remat}{experts}"


if __name__ == "__main__":
    exit_with_status(main)
