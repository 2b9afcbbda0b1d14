"""Where this process stands among its peers, known before any process group exists.

Ranks come from the launcher's environment (``deepspeed``, ``torchrun`` and our Slurm scripts set ``RANK`` and
``WORLD_SIZE``), from MPI's, or, when neither is there, the process is alone.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from launch.settings import BadInputError

_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Place:
    """A process's rank, and the number of ranks."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def _read_integer(names: tuple[str, ...], default: int) -> int:
    for name in names:
        if name in os.environ:
            try:
                return int(os.environ[name])
            except ValueError:
                raise BadInputError(f"environment: {name} = {os.environ[name]!r}: must be an integer") from None
    return default


def discover_place() -> Place:
    """Rank and number of ranks, from the launcher, from MPI, or alone."""
    place = Place(_read_integer(_RANK_VARIABLES, 0), _read_integer(_SIZE_VARIABLES, 1))
    if not 0 <= place.rank < place.world_size:
        raise BadInputError(
            f"environment: RANK = {place.rank}: must be from 0 to WORLD_SIZE - 1 = {place.world_size - 1}"
        )
    return place


def name_accelerator() -> None:
    """Tell DeepSpeed that this machine has a CPU only, which it would find too, after a warning in every process."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def prepare_rendezvous(place: Place) -> None:
    """Set what torch needs to meet when no launcher did: only for a process that is alone."""
    if place.world_size > 1 or "MASTER_ADDR" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
