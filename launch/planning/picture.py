"""A picture of where a rank's memory goes, one bar a run, and the line it must stay under."""

from __future__ import annotations

from pathlib import Path

from launch.planning.memory import KINDS
from launch.planning.report import Plan
from launch.planning.search import usable_bytes


def draw_memory(plans: list[Plan], path: Path) -> None:
    """Write a PNG of memory by kind at the fullest moment of each plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(2.5 + 1.2 * len(plans), 5), layout="constrained")
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    names = [f"{plan.run.name}\n{plan.run.ranks} x {plan.gpu.name}" for plan in plans]
    bottoms = [0.0] * len(plans)
    for kind, colour in zip(KINDS, colours, strict=True):
        heights = [plan.memory.by_kind.get(kind, 0.0) / 2**30 for plan in plans]
        if any(heights):
            axes.bar(names, heights, bottom=bottoms, label=kind, color=colour, width=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.axhline(usable_bytes(plans[0].gpu) / 2**30, color="black", linestyle="--", label="usable")
    axes.set_ylabel("GiB a rank")
    axes.tick_params(axis="x", labelsize=8)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
