"""Where this process stands among its peers, known before any process group exists.

Ranks come from the launcher's environment (``deepspeed``, ``torchrun`` and our Slurm scripts set ``RANK`` and
``WORLD_SIZE``), from MPI, or, when neither is there, the process is alone.

MPI (``mpirun``, ``srun --mpi=pmix``) is asked through mpi4py, once: its ranks agree on where to meet, write what the
other launchers would have written into their environment, and leave MPI before torch starts its own process group. PMIx
has no variable for the number of ranks, so reading the environment alone would not do.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from launch.settings import RANK_VARIABLES, BadInputError


@dataclass(frozen=True)
class Place:
    """A process's rank, and the number of ranks."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def _read_integer(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise BadInputError(f"environment: {name} = {os.environ[name]!r}: must be an integer") from None


def discover_place() -> Place:
    """Rank and number of ranks, from the launcher, MPI, or alone. The first call of MPI's ranks is collective."""
    if "RANK" not in os.environ and any(name in os.environ for name in RANK_VARIABLES):
        _ask_mpi()
    place = Place(_read_integer("RANK", 0), _read_integer("WORLD_SIZE", 1))
    if not 0 <= place.rank < place.world_size:
        raise BadInputError(
            f"environment: RANK = {place.rank}: must be from 0 to WORLD_SIZE - 1 = {place.world_size - 1}"
        )
    return place


def _ask_mpi() -> None:
    """Write what a launcher would have: ranks, and the first rank's address (its ``MASTER_*``, if set) for all."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter: no MPI library where mpi4py looks
        raise BadInputError(
            f"environment: started by MPI, but mpi4py cannot be used ({error}); install an MPI library, then: pip "
            "install mpi4py"
        ) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, one_machine = node.Get_rank(), node.Get_size() == world.Get_size()
    node.Free()
    meeting = (
        os.environ.get("MASTER_ADDR", "127.0.0.1" if one_machine else socket.gethostname()),
        os.environ.get("MASTER_PORT", str(free_port())),
    )
    address, port = world.bcast(meeting, root=0)
    os.environ.update(
        RANK=str(world.Get_rank()),
        WORLD_SIZE=str(world.Get_size()),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )
    # Now, together: to mpirun a rank that ends inside MPI is an error, and to finalise at exit waits for the others.
    MPI.Finalize()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def name_accelerator() -> None:
    """Tell DeepSpeed that this machine has a CPU only, which it would find too, after a warning in every process."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def prepare_rendezvous(place: Place) -> None:
    """Set what torch needs to meet when no launcher did: only for a process that is alone."""
    if place.world_size > 1 or "MASTER_ADDR" in os.environ:
        return
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
