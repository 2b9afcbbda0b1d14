r"""Bytes a rank moves in an optimizer step, by what they are for, and over which wire.

    parameter gather    what ``gathering.py`` walks, each micro-batch, and the small persistent ones once a step
    gradient reduce     every gradient once a micro-batch (ZeRO 2 and 3) or once a step (0 and 1)
    expert payload      K rows of D numbers a token, for each loop and layer, each way: 2 all-to-alls forward,
                        2 backward (loops with a gradient), and 2 in each recomputation that repeats them
    expert counts       E integers for each exchange that is planned
    Muon gather         gradients and momenta, gathered whole and handed out again, once a step (``muon.py``)

Muon has DeepSpeed all-reduce every gradient.

With ``parallel.fp8_dispatch`` the way there, forward, takes a byte a number and one for each 128.

The depth enters the last two only. Recomputation repeats everything under the policies ``loop`` (once) and ``sqrt``
(nearly twice), the payload under ``routes``, nothing under ``dispatch``.

``buffer_bytes`` and ``sent_bytes`` are those of ``pretrain/communication.py``, which counts the same on real ranks
(``tests/benchmarks/traffic.py``). An all-to-all is taken to be balanced: 1 / EP of the rows stay.

Wires. Ranks fill nodes in order, and an expert-parallel group is a run of consecutive ranks. Of a ring over n ranks,
g of them on each node, a rank gets 1 / g of what comes from other nodes through its own network port and the rest from
its neighbours over NVLink, the best that a hierarchical ring can do. Of an all-to-all over n ranks, (n - g) / n of the
rows leave the node.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.gathering import persistent_gather, walked
from launch.planning.memory import elements_of
from launch.planning.muon import gathered_elements
from launch.planning.run import PlannedRun
from launch.planning.weights import model_weights

_COUNT_BYTES = 4


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in an optimizer step of one rank."""

    kind: str
    ranks: int  # that take part
    consecutive: bool  # whether they are neighbours, or one of every expert-parallel group
    buffer_bytes: float
    sent_bytes: float

    def over_network(self, ranks_of_node: int, expert_parallel_size: int) -> float:
        """Bytes of ``sent_bytes`` that leave the node through this rank's own port."""
        if self.consecutive:
            together = min(self.ranks, ranks_of_node)
        else:
            together = max(1, min(self.ranks, ranks_of_node // expert_parallel_size))
        if together >= self.ranks:
            return 0.0
        if self.kind.startswith("expert"):
            return self.sent_bytes * (self.ranks - together) / (self.ranks - 1)
        nodes = self.ranks / together
        whole = self.buffer_bytes * (2 if self.kind == "gradient all-reduce" else 1)
        return whole * (nodes - 1) / nodes / together


def step_transfers(run: PlannedRun, loops: int) -> list[Transfer]:
    """Everything a rank takes part in during an optimizer step of ``loops`` loops."""
    return [*_parameters(run), *_gradients(run), *_orthogonalised(run), *_exchanges(run, loops)]


def bytes_by_kind(transfers: list[Transfer]) -> dict[str, tuple[float, float]]:
    """(sent, buffer) bytes under the names that ``pretrain/communication.py`` counts by."""
    names = {
        "parameter gather": "parameter_gather",
        "Muon gather": "parameter_gather",
        "expert payload": "expert_payload",
        "expert counts": "expert_counts",
    }
    totals: dict[str, tuple[float, float]] = {}
    for transfer in transfers:
        name = names.get(transfer.kind, "gradient_reduce")
        sent, whole = totals.get(name, (0.0, 0.0))
        totals[name] = (sent + transfer.sent_bytes, whole + transfer.buffer_bytes)
    return totals


def _ring(run: PlannedRun, kind: str, owners: int, buffer_bytes: float) -> Transfer:
    passes = 2 if kind == "gradient all-reduce" else 1
    sent = passes * buffer_bytes * (owners - 1) / owners
    return Transfer(kind, owners, owners == run.ranks, buffer_bytes, sent)


def _parameters(run: PlannedRun) -> list[Transfer]:
    """ZeRO-3's gathers; under ZeRO 1 and 2 every updated parameter once a step."""
    placement = run.placement
    elements: dict[int, int] = {}
    if run.zero_stage == 3:
        account = walked(run.model, placement, run.engine, run.remat_once, run.extra_reads, run.probes)
        for owners, count in account.gathered.items():
            elements[owners] = elements.get(owners, 0) + count * run.grad_accum_steps
        for owners, count in persistent_gather(model_weights(run.model), placement, run.engine).items():
            elements[owners] = elements.get(owners, 0) + count
    elif run.zero_stage in (1, 2):
        elements = _by_owners(run)
    return [
        _ring(run, "parameter gather", owners, count * run.dtype_bytes) for owners, count in sorted(elements.items())
    ]


def _gradients(run: PlannedRun) -> list[Transfer]:
    whole = run.zero_stage in (0, 1) or run.muon
    kind = "gradient all-reduce" if whole else "gradient reduce-scatter"
    times = run.grad_accum_steps if run.zero_stage >= 2 else 1
    return [
        _ring(run, kind, owners, count * run.dtype_bytes * times)
        for owners, count in sorted(_by_owners(run).items())
        # pretrain/lean_zero.py: nothing is reduce-scattered over one rank
        if owners > 1 or run.zero_stage != 3 or run.muon
    ]


def _orthogonalised(run: PlannedRun) -> list[Transfer]:
    return [
        _ring(run, "Muon gather", owners, float(count * run.dtype_bytes))
        for owners, count in sorted(gathered_elements(run).items())
    ]


def _by_owners(run: PlannedRun) -> dict[int, int]:
    """Elements of all parameters, padded to equal shards, by how many ranks share them."""
    placement, elements = run.placement, elements_of(run.model, run.placement)
    totals: dict[int, int] = {}
    for owners, shard in (
        (placement.ranks, elements.shard_shared),
        (placement.ranks // placement.expert_parallel_size, elements.shard_experts),
    ):
        totals[owners] = totals.get(owners, 0) + shard * owners
    return totals


def _exchanges(run: PlannedRun, loops: int) -> list[Transfer]:
    size, model = run.expert_parallel_size, run.model
    if size == 1 or model.n_experts == 0:
        return []
    there = back = plans = 0
    for n_loops, kept in run.loops_of_scales(loops):
        again = run.recomputed_loops(kept)
        forwards = n_loops + (0 if run.remat == "dispatch" else again)
        there += forwards
        back += forwards + 2 * kept
        plans += n_loops + (again if run.remat in ("loop", "sqrt") else 0)
    each = run.grad_accum_steps * model.recurrent_layers
    rows = run.micro_tokens * model.n_experts_per_tok
    whole = model.dim * run.dtype_bytes
    row = model.dim + -(-model.dim // 128) if run.fp8_dispatch else whole  # model/fp8/wire.py
    payload = float(each * rows * (there * row + back * whole))
    counts = float(each * plans * model.n_experts * _COUNT_BYTES)
    away = (size - 1) / size
    return [
        Transfer("expert payload", size, True, payload, payload * away),
        Transfer("expert counts", size, True, counts, counts * away),
    ]
