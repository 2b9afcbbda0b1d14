"""Batches for this rank, prepared ahead by worker threads.

An optimizer step takes the samples ``[next_sample, next_sample + global_batch_size)``; rank r takes a contiguous part,
cut into micro-batches. So the samples of a step depend neither on ranks nor on micro-batches nor on workers: those only
choose who reads which.

Threads are enough: the time goes into copying memory-mapped tokens, during which numpy lets other threads run.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from launch.settings import BadInputError
from model.token_loss import IGNORED_TARGET
from pretrain.data.packing import Row

ASK_SECONDS = 0.2
"""How often a caller that waits for data looks up whether it should go on waiting."""

PADDING_SAMPLE = -1


@dataclass(frozen=True)
class Batch:
    """What a model is given: ``input_ids`` and ``targets`` (B, S) int64, targets already shifted by one.

    A target of -100 does not count. ``sample_ids`` names the rows (-1: a row of padding). ``domain_ids`` (B, S) is
    the domain of each *target* where evaluation asks for it, -1 where the target does not count. ``document_ids``
    (B, S), where a mask is asked for, numbers the document of each target within its row: input j may see input i when
    i <= j and their numbers are the same (``pretrain.data.packing`` says why an end token opens the next document).
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    sample_ids: tuple[int, ...]
    domain_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None

    def position_ids(self) -> torch.Tensor:
        """(B, S) int64: 0, 1, 2, ... from each document's first input on (or the row's, without ``document_ids``).

        For models with absolute positions: rotary attention sees differences only, which a mask leaves as they are.
        """
        positions_BS = torch.arange(self.input_ids.shape[1]).expand_as(self.input_ids)
        if self.document_ids is None:
            return positions_BS.clone()
        opens_BS = torch.ones_like(self.document_ids, dtype=torch.bool)
        opens_BS[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        return positions_BS - torch.where(opens_BS, positions_BS, 0).cummax(dim=1).values


class SampleSource(Protocol):
    """Whatever gives rows by sample number: a run's ``Sampler``, or one source's ``TokenSequences``."""

    def rows(self, sample_ids: Sequence[int], with_documents: bool = False) -> list[Row]:
        """The rows of samples, all of one length."""
        ...


def batch_of(sample_ids: Sequence[int], rows: Sequence[Row]) -> Batch:
    """Rows as tensors."""
    tokens_BS = torch.from_numpy(np.stack([row.tokens for row in rows]))
    # A copy: of one row the slice is contiguous as it is, and writing into it would change the inputs.
    targets_BS = tokens_BS[:, 1:].clone(memory_format=torch.contiguous_format)
    for target_S, row in zip(targets_BS, rows, strict=True):
        if row.counted is not None:
            target_S[torch.from_numpy(~row.counted)] = IGNORED_TARGET
    documents = [row.document_ids for row in rows if row.document_ids is not None]
    document_ids_BS = torch.from_numpy(np.stack(documents)) if documents else None
    return Batch(tokens_BS[:, :-1].contiguous(), targets_BS, tuple(sample_ids), document_ids=document_ids_BS)


class BatchLoader:
    """Deals samples to ranks. No state: a position is the integer ``next_sample``, kept by whoever trains."""

    def __init__(
        self,
        samples: SampleSource,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        with_documents: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} must be in [0, {world_size})")
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
            raise BadInputError(
                f"global batch size {global_batch_size}: not a positive multiple of micro-batch size "
                f"{micro_batch_size} x {world_size} ranks; change one of the three"
            )
        self.samples = samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.samples_per_rank = global_batch_size // world_size
        self.rank = rank
        self.with_documents = with_documents

    @property
    def batches_per_step(self) -> int:
        """Micro-batches that each rank runs in one optimizer step."""
        return self.samples_per_rank // self.micro_batch_size

    def sample_ids(self, next_sample: int) -> range:
        """The samples of this rank in the step that starts at ``next_sample``."""
        start = next_sample + self.rank * self.samples_per_rank
        return range(start, start + self.samples_per_rank)

    def step_batches(self, next_sample: int) -> list[Batch]:
        """This rank's micro-batches of the step that starts at ``next_sample`` (0 in a new run).

        The next step starts at ``next_sample + global_batch_size``.
        """
        ids = self.sample_ids(next_sample)
        size = self.micro_batch_size
        return [
            batch_of(ids[start : start + size], self.samples.rows(ids[start : start + size], self.with_documents))
            for start in range(0, len(ids), size)
        ]


class SlowDataError(Exception):
    """Data did not arrive in time; the message says which samples, and the limit."""


class Prefetcher:
    """Has the next steps' batches read by ``workers`` threads while the model computes; 0 reads when asked.

    Up to ``steps`` steps are held besides the one asked for, none past sample ``end``. What a worker raises is raised
    by the :meth:`step_batches` of its step. Close it, or use it in a ``with`` statement: threads outlive nothing.
    """

    def __init__(
        self, loader: BatchLoader, end: int, workers: int, steps: int, timeout_seconds: float = math.inf
    ) -> None:
        self.loader, self.end, self.steps, self.timeout_seconds = loader, end, steps, timeout_seconds
        self.stuck = False
        """Whether a worker was left in the middle of a read that may never end: the process must not wait for it."""
        self.waited_seconds = 0.0
        """How long the last :meth:`step_batches` kept its caller waiting."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None
        self._ahead: deque[tuple[int, Future[list[Batch]]]] = deque()

    def step_batches(self, next_sample: int, give_up: Callable[[], bool] = lambda: False) -> list[Batch] | None:
        """The batches of the step that starts at ``next_sample``; steps are asked for in order, or from anywhere.

        None when they are not there yet and ``give_up`` says so (it is not asked without workers, which read at once).
        Raises ``SlowDataError`` when they are not there after ``timeout_seconds``.
        """
        started = time.monotonic()
        batches: list[Batch] | None
        if self._pool is None:
            batches = self.loader.step_batches(next_sample)
        else:
            if not self._ahead or self._ahead[0][0] != next_sample:
                self._forget()
                self._submit(next_sample)
            _, future = self._ahead.popleft()
            self._read_on(next_sample + self.loader.global_batch_size)
            batches = self._await(future, next_sample, give_up)
        self.waited_seconds = time.monotonic() - started
        return batches

    def _await(self, future: Future[list[Batch]], first: int, give_up: Callable[[], bool]) -> list[Batch] | None:
        deadline = time.monotonic() + self.timeout_seconds
        while not wait_for([future], timeout=ASK_SECONDS).done:
            self.stuck = True
            if give_up():
                return None
            if time.monotonic() > deadline:
                ids = self.loader.sample_ids(first)
                raise SlowDataError(
                    f"samples {ids.start} to {ids.stop - 1} were not read in {self.timeout_seconds:g} s "
                    "(data.read_timeout_seconds): the storage is slow or hangs"
                )
        self.stuck = False
        return future.result()

    def _read_on(self, start: int) -> None:
        """Keep ``steps`` steps from ``start`` on in the workers' hands."""
        if self._ahead:
            start = self._ahead[-1][0] + self.loader.global_batch_size
        while len(self._ahead) < self.steps and start < self.end:
            self._submit(start)
            start += self.loader.global_batch_size

    def _submit(self, start: int) -> None:
        assert self._pool is not None
        self._ahead.append((start, self._pool.submit(self.loader.step_batches, start)))

    def _forget(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """End the threads, once the step that each is reading is done (not when it is ``stuck``)."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown(wait=not self.stuck, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
