"""Train a looped MoE language model: ``deepspeed pretrain/main.py --config configs/ice_tiny.json``.

Validates everything first (status 78 and one line when something is wrong), then starts the process group, resumes when
the run directory holds a valid checkpoint, and trains. ``--dry-run`` prints the plan and trains nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.dataset.reader import Dataset, open_dataset
from launch.environment import Place, discover_place
from launch.files import write_json_atomically
from launch.settings import EXIT_FAILED, EXIT_FINISHED, BadInputError, exit_with_status, load_settings
from pretrain.config import TrainingConfig, check_topology

if TYPE_CHECKING:
    from pretrain.checkpoint import TrainingState
    from pretrain.engine import TrainingEngine


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
    return train(config, place)


def open_training_data(config: TrainingConfig) -> Dataset:
    """The prepared data set of ``config``; ``BadInputError`` when it is missing, damaged or has another vocabulary."""
    from pretrain.data import check_vocabulary

    dataset = open_dataset(Path(config.data.path))
    check_vocabulary(dataset, config.model.vocab_size)
    return dataset


def train(config: TrainingConfig, place: Place) -> int:
    """Assemble a run's collaborators, and train."""
    # Importing these takes seconds (torch, DeepSpeed, matplotlib); a configuration error should not wait for them.
    from pretrain.checkpoint import Checkpointer, CheckpointError, Fence, RunIdentity, TrainingState
    from pretrain.data import BatchLoader, Prefetcher, held_out_sets, open_sampler
    from pretrain.engine import TrainingEngine
    from pretrain.evaluate import Evaluator, gzip9_bits_per_byte
    from pretrain.preemption import StopRequest
    from pretrain.run_log import RunLog
    from pretrain.run_tokenizer import keep_tokenizer
    from pretrain.tracking import new_wandb_id
    from pretrain.trainer import Trainer, TrainingFailedError

    dataset = open_training_data(config)
    sampler = open_sampler(config.data, config.run.seed, config.model.vocab_size, dataset)
    total_samples = config.schedule.steps * config.data.global_batch_size
    sampler.require_enough(total_samples)
    held_out = held_out_sets(config.data, dataset, {s.dataset.folder: s.dataset for s in sampler.sources})
    run_path = config.run.path
    checkpoints = run_path / "checkpoints"
    if config.checkpoint.resume == "never" and any(checkpoints.glob("step_*")):
        raise BadInputError(
            f"{checkpoints}: already holds checkpoints and checkpoint.resume = never; choose another run.name"
        )

    stop = StopRequest()
    engine = TrainingEngine(config, place)
    identity = RunIdentity(
        model=config.model.model_dump(mode="json"),
        data=sampler.identity(),
        topology={
            "ranks": place.world_size,
            "zero_stage": config.parallel.zero_stage,
            "expert_parallel_size": config.parallel.expert_parallel_size,
            "dtype": engine.precision.name,
        },
    )
    notices: list[str] = []
    fence = Fence(run_path)
    checkpointer = Checkpointer(checkpoints, config.checkpoint, identity, engine, fence, notices.append)
    try:
        resumed = checkpointer.resume()
    except BadInputError:
        engine.close()  # every rank has come to the same refusal
        raise
    except CheckpointError as error:
        if place.is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    wandb_id = engine.gather_objects(new_wandb_id())[0]
    start = resumed or TrainingState(step=0, next_sample=0, tokens=0, wandb_id=wandb_id)
    if place.is_first:
        write_json_atomically(run_path / "config.json", config.model_dump(mode="json"))
        keep_tokenizer(dataset, run_path)
    log = RunLog(config, start, place.is_first, gzip9_bits_per_byte(dataset))
    checkpointer.say = log.say
    for notice in notices:
        log.say(notice)
    log.say(_opening_line(config, engine, start, resumed is not None))
    loader = BatchLoader(
        sampler,
        config.data.global_batch_size,
        config.parallel.micro_batch_size,
        place.rank,
        place.world_size,
        config.data.document_mask,
    )
    try:
        with Prefetcher(loader, total_samples, config.data.prefetch_workers, config.data.prefetch_steps) as batches:
            evaluator = Evaluator(config, held_out)
            trainer = Trainer(config, engine, sampler, batches, evaluator, checkpointer, log, stop)
            status = trainer.train(start)
    except BadInputError as error:
        # Found while training, perhaps by this rank alone (a damaged shard on one node): the others stay silent.
        if not place.is_first:
            print(f"error: rank {place.rank}: {error}", file=sys.stderr, flush=True)
        raise
    except (TrainingFailedError, CheckpointError) as error:
        # Every rank has come to the same end: a save that is being written can still be finished.
        if isinstance(error, TrainingFailedError):
            checkpointer.wait()
        log.say(f"error: {error}")
        log.close()
        return EXIT_FAILED
    log.say(f"run directory: {run_path}")
    if config.logging.plot and status == EXIT_FINISHED:
        log.say(f"loss plot: {run_path / 'plots' / 'loss.png'}")
    log.close()
    engine.close()
    return status


def _opening_line(config: TrainingConfig, engine: TrainingEngine, start: TrainingState, resumed: bool) -> str:
    parallel, precision = config.parallel, engine.precision
    topology = f"{engine.place.world_size} ranks, ZeRO-{parallel.zero_stage}, EP={parallel.expert_parallel_size}"
    where = f"resuming after step {start.step}" if resumed else "from the beginning"
    return f"{config.run.path}: {where}; {topology}; {precision.name} ({precision.reason}); remat {config.loop.remat}"


if __name__ == "__main__":
    exit_with_status(main)
