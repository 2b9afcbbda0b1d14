"""A plan on a terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table

from launch.planning.eight_bits import emulated
from launch.planning.flops import total_flops, training_flops
from launch.planning.report import Plan
from launch.planning.search import usable_bytes
from launch.planning.traffic import step_transfers
from launch.planning.weights import active_parameters, model_weights


def print_plan(plan: Plan, console: Console) -> None:
    """Everything of one run."""
    run, gpu = plan.run, plan.gpu
    nodes = -(-run.ranks // gpu.per_node)
    console.print(f"{run.name} on {run.ranks} x {gpu.name}, {nodes} nodes", style="bold", highlight=False)
    for part in (parameter_table(plan), memory_table(plan), flops_table(plan), traffic_table(plan), time_table(plan)):
        console.print(part)
    console.print(_verdict(plan))


def parameter_table(plan: Plan) -> Table:
    """Parameters by part, total and active."""
    table = _table("parameters", "part", "parameters")
    weights = model_weights(plan.run.model)
    for part, count in weights.by_part().items():
        table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("total", f"{weights.total:,}")
    table.add_row("active a token", f"{active_parameters(plan.run.model):,}")
    return table


def memory_table(plan: Plan) -> Table:
    """Memory of the fullest moment by kind."""
    memory = plan.memory
    table = _table(f"memory of a rank, fullest at: {memory.moment}", "kind", "GiB")
    for kind, size in memory.by_kind.items():
        if size:
            table.add_row(kind, gibibytes(size))
    table.add_section()
    table.add_row("total", gibibytes(memory.total))
    table.add_row("while it starts", gibibytes(memory.start_bytes))
    table.add_row("usable", gibibytes(usable_bytes(plan.gpu)))
    table.add_row("more, should all rows go to one rank", gibibytes(memory.worst_dispatch_bytes))
    if memory.host_bytes:
        table.add_row("in host memory", gibibytes(memory.host_bytes))
    if memory.start_host_bytes:
        table.add_row("in host memory while it starts", gibibytes(memory.start_host_bytes))
    return table


def flops_table(plan: Plan) -> Table:
    """FLOPs a token by part."""
    table = _table(f"GFLOP a token, {plan.run.mean_loops} loops", "part", "forward", "backward", "recompute")
    parts = training_flops(plan.run, plan.run.mean_loops)
    for part, own in {**parts, "total": total_flops(parts)}.items():
        if part == "total":
            table.add_section()
        table.add_row(part, *(f"{value / 1e9:,.2f}" for value in (own.forward, own.backward, own.recompute)))
    return table


def traffic_table(plan: Plan) -> Table:
    """Bytes a step on each wire."""
    run = plan.run
    table = _table("GB a rank sends in a step", "collective", "ranks", "NVLink", "network")
    for transfer in step_transfers(run, run.mean_loops):
        network = transfer.over_network(plan.gpu.per_node, run.expert_parallel_size)
        nvlink = max(transfer.sent_bytes - network, 0.0)
        table.add_row(transfer.kind, str(transfer.ranks), f"{nvlink / 1e9:,.3f}", f"{network / 1e9:,.3f}")
    return table


def time_table(plan: Plan) -> Table:
    """Where a step's time goes, and what the run costs."""
    time = plan.time
    table = _table("time of a step of mean depth", "resource", "seconds")
    for resource, seconds in time.by_resource.items():
        table.add_row(resource, f"{seconds:,.3f}")
    table.add_section()
    table.add_row("step", f"{time.seconds:,.3f}")
    table.add_row("model FLOPs utilisation", f"{time.utilisation:.1%}")
    table.add_row("tokens a day", f"{time.tokens_per_day:,.3g}")
    table.add_row(f"days for {plan.run.steps:,} steps", f"{plan.days:,.1f}")
    table.add_row("GPU-hours", f"{plan.gpu_hours:,.0f}")
    if plan.price_per_gpu_hour is not None:
        cost = plan.gpu_hours * plan.price_per_gpu_hour
        table.add_row(f"cost at {plan.price_per_gpu_hour:g} a GPU-hour", f"{cost:,.0f}")
    return table


def overview_table(plans: list[Plan]) -> Table:
    """One row a run: as it is configured, and the smallest cluster on which anything fits."""
    columns = ("run", "params", "active", "GPUs", "EP", "mb", "GiB", "fits", "step s", "MFU", "tokens/day", "days")
    table = _table("as configured, and the smallest cluster", *columns, "least GPUs", "EP/ZeRO/mb/remat", "step s")
    for plan in plans:
        run, small = plan.run, plan.smallest
        least = ("none", "", "")
        if small is not None:
            own = small.run
            short = f"{own.expert_parallel_size}/{own.zero_stage}/{own.micro_batch_size}/{own.remat}"
            least = (str(own.ranks), short, f"{small.time.seconds:,.1f}")
        table.add_row(
            *(run.name, _short(model_weights(run.model).total), _short(active_parameters(run.model))),
            *(str(run.ranks), str(run.expert_parallel_size), str(run.micro_batch_size)),
            *(gibibytes(plan.memory.total), "yes" if plan.fits else "no"),
            *(f"{plan.time.seconds:,.1f}", f"{plan.time.utilisation:.0%}", f"{plan.time.tokens_per_day:,.2g}"),
            f"{plan.days:,.1f}",
            *least,
        )
    return table


def gibibytes(size: float) -> str:
    """To a tenth."""
    return f"{size / 2**30:,.1f}"


def _verdict(plan: Plan) -> RenderableType:
    lines = []
    if plan.fits:
        lines.append("It fits.")
    else:
        lines += _misfits(plan)
        lines += [f"  It would with {remedy}." for remedy in plan.remedies]
        if not plan.remedies:
            lines.append("  No change of settings makes it fit this many GPUs.")
    if emulated(plan.run, plan.gpu):
        lines.append(f"{plan.run.recipe} is emulated on {plan.gpu.name}: planned as fast as without, in truth slower.")
    if plan.best is not None:
        found = plan.best
        lines.append(
            f"Fastest on {plan.run.ranks}: {found.describe()}; {found.time.seconds:,.2f} s a step, "
            f"{gibibytes(found.memory.total)} GiB."
        )
    if plan.smallest is not None:
        found = plan.smallest
        lines.append(f"Smallest cluster: {found.run.ranks} GPUs with {found.describe()}.")
    return Group(*lines)


def _misfits(plan: Plan) -> list[str]:
    """Each amount of memory that is not enough."""
    memory, device, host = plan.memory, usable_bytes(plan.gpu), plan.gpu.host_memory_bytes
    needs = (
        (memory.total, device, f"at the {memory.moment}"),
        (memory.start_bytes, device, "while it starts"),
        (memory.host_bytes, host, "in host memory"),
        (memory.start_host_bytes, host, "in host memory while it starts"),
    )
    return [
        f"It does not fit: {gibibytes(needed - there)} GiB too much {when}."
        for needed, there, when in needs
        if needed > there
    ]


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _short(count: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
