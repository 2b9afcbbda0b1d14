"""Pictures of a run, drawn from ``metrics.jsonl`` and the expert loads: what people look at before they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from torch import Tensor

from pretrain.metrics import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from pretrain.depth_groups import GroupSweep


def _smoothed(values: list[float], window: int) -> list[float]:
    """Trailing mean over at most ``window`` values."""
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        result.append(total / min(index + 1, window))
    return result


def plot_losses(metrics_path: Path, picture: Path, reference_bits_per_byte: float | None = None) -> None:
    """Training loss, validation bits per byte, gradient norm and loops by step, as one PNG.

    ``reference_bits_per_byte`` (``gzip -9`` on the validation text) is drawn as a line for scale.
    """
    lines = read_metrics(metrics_path)
    training = [line for line in lines if line.get("loss") is not None]
    evaluations = [line for line in lines if line.get("validation_bits_per_byte") is not None]
    if not training:
        return
    steps = [line["step"] for line in training]
    losses = [line["loss"] for line in training]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    loss, validation, norm, loops = axes.flat
    loss.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    loss.plot(steps, _smoothed(losses, max(1, len(losses) // 50)), color="tab:blue")
    loss.set(title="training loss", ylabel="nats a token")
    validation.plot(
        [line["step"] for line in evaluations],
        [line["validation_bits_per_byte"] for line in evaluations],
        marker="o",
        markersize=3,
        color="tab:green",
        label="this run",
    )
    if reference_bits_per_byte is not None:
        validation.axhline(reference_bits_per_byte, color="tab:gray", linestyle="--", label="gzip -9")
    if evaluations or reference_bits_per_byte is not None:
        validation.legend()
    validation.set(title="validation", ylabel="bits a byte")
    norms = [line["grad_norm"] if line["grad_norm"] is not None else math.nan for line in training]
    norm.plot(steps, norms, color="tab:orange", linewidth=0.8)
    norm.set(title="gradient norm before clipping", yscale="log", xlabel="step")
    depths = [line["loops"] for line in training]
    points = loops.scatter(steps, [line["loop_residual"] for line in training], c=depths, s=4, cmap="viridis_r")
    loops.set(title="loop residual ||h_T - h_(T-1)|| / ||h_T||", yscale="log", xlabel="step")
    figure.colorbar(points, ax=loops, label="loops T of the step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    _write(figure, picture)


def plot_expert_load(load_TLE: Tensor, picture: Path) -> None:
    """Share of tokens of each (loop, expert), one panel a layer, as a heat map; 1 is an even share."""
    share_TLE = load_TLE.double() / load_TLE.double().mean(dim=-1, keepdim=True).clamp_min(1e-9)
    layers = share_TLE.shape[1]
    figure, axes = plt.subplots(1, layers, figsize=(4 * layers + 1, 3.5), layout="constrained", squeeze=False)
    for layer, axis in enumerate(axes[0]):
        image = axis.imshow(share_TLE[:, layer], aspect="auto", vmin=0, vmax=2, cmap="viridis", origin="lower")
        axis.set(title=f"core layer {layer}", xlabel="expert", ylabel="loop")
        axis.set_yticks(range(len(share_TLE)), [str(loop + 1) for loop in range(len(share_TLE))])
    figure.colorbar(image, ax=axes[0].tolist(), label="load over an even share")
    _write(figure, picture)


def plot_depth_sweep(bits_per_byte: dict[int, float], trained_loops: int, picture: Path) -> None:
    """Validation bits per byte against the number of loops at test time."""
    depths = sorted(bits_per_byte)
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(depths, [bits_per_byte[depth] for depth in depths], marker="o")
    axis.axvline(trained_loops, color="tab:gray", linestyle=":", label="trained mean depth")
    axis.set(xlabel="loops", ylabel="bits a byte", title="depth at test time", xscale="log")
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.minorticks_off()  # a log axis labels its minor ticks too
    axis.grid(alpha=0.3)
    axis.legend()
    _write(figure, picture)


def plot_depth_by_group(groups: Sequence[GroupSweep], trained: tuple[int, int], picture: Path) -> None:
    """What each group gives against the number of loops, a panel for each source; the ``trained`` depths shaded."""
    panels = list(dict.fromkeys((group.source, group.measure) for group in groups))
    size = (6.0 * len(panels), 4.0)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        shown = [group for group in groups if (group.source, group.measure) == panel]
        depths = sorted(shown[0].by_loops)
        for group in shown:
            style = "-" if group.trained else "--"
            axis.plot(depths, [group.by_loops[depth] for depth in depths], style, marker="o", label=group.description)
        axis.axvspan(*trained, color="tab:gray", alpha=0.15, label="trained depths")
        axis.set(xlabel="loops", ylabel=shown[0].measure.replace("_", " "), title=shown[0].source, xscale="log")
        if shown[0].measure == "accuracy":
            axis.set_ylim(-0.02, 1.02)
        axis.set_xticks(depths, [str(depth) for depth in depths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    _write(figure, picture)


def _write(figure: Any, picture: Path) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
