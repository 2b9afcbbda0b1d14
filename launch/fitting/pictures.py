"""Pictures of a study: what people look at before they believe a table.

``isoflop.png``    loss against size, a curve for each FLOP level, a panel for each mean depth, minima marked
``loops.png``      loss against trained loops, a curve of the looped law for each size, a panel for each FLOP level
``depth.png``      loss against loops: measured, and the saturating law
``predicted.png``  what each law says against what was measured, and by how much it errs
``optimum.png``    the best parameters, tokens and loops against the budget, and what keeping to a depth costs

Colours mean one thing throughout a picture. Only what a study has is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.fitting.depth import DepthFit
from launch.fitting.holdout import largest
from launch.fitting.isoflop import Parabola
from launch.fitting.optimum import Optimum, best_run
from launch.fitting.runs import LOSS_UNITS, Floats, Points
from launch.fitting.study import LawFit, Study
from launch.readable import readable

PREFIX = "fit_"
_PANEL = (4.2, 3.6)  # inches
_MOST_COLUMNS = 3
_MEASURED = {"linestyle": "none", "markersize": 5, "markeredgewidth": 0.6, "markeredgecolor": "white"}


def draw_study(study: Study, folder: Path) -> list[Path]:
    """Write the pictures of ``study`` into ``folder``; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    drawings: dict[str, tuple[bool, Callable[[Study], Any]]] = {
        "isoflop": (bool(study.parabolas), draw_isoflop),
        "loops": ("looped" in study.laws and bool(_loop_series(study)), draw_loops),
        "depth": (bool(study.depths), draw_depth),
        "predicted": (bool(study.laws), draw_predicted),
        "optimum": (bool(study.optima), draw_optimum),
    }
    from matplotlib import pyplot

    paths = []
    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.25}):
        for name, (wanted, draw) in drawings.items():
            if wanted:
                figure = draw(study)
                paths.append(folder / f"{PREFIX}{name}.png")
                figure.savefig(paths[-1], dpi=150)
                pyplot.close(figure)
    return paths


def draw_isoflop(study: Study) -> Any:
    """A panel for each mean depth; the parabola is drawn a little beyond its sizes."""
    depths = sorted({parabola.mean_loops for parabola in study.parabolas})
    levels = sorted({parabola.flops_level for parabola in study.parabolas})
    colours = _sequence(len(levels))
    figure, panels = _panels(len(depths), share_y=True)
    figure.suptitle("Loss against size at equal training FLOPs")
    for panel, loops in zip(panels, depths, strict=True):
        for parabola in [each for each in study.parabolas if each.mean_loops == loops]:
            _draw_parabola(panel, study, parabola, colours[levels.index(parabola.flops_level)])
        panel.set(title=f"{loops} loop{'s' * (loops > 1)}", xscale="log")
        _readable_ticks(panel.xaxis)
    _label_outer(panels, "parameters N, each counted once", f"held-out loss, {LOSS_UNITS[study.settings.unit]}")
    marks = [_line(colour, f"{level:.3g}", marker="o") for level, colour in zip(levels, colours, strict=True)]
    marks.append(_line("0.35", "least loss", marker="*", markersize=11, linestyle="none"))
    if any(parabola.interval is not None for parabola in study.parabolas):
        marks.append(_line("0.7", f"its {study.settings.level:.0%} interval", linewidth=4))
    figure.legend(handles=marks, title="training FLOPs", loc="outside right upper", frameon=False)
    return figure


def _draw_parabola(panel: Any, study: Study, parabola: Parabola, colour: Any) -> None:
    parameters = study.runs.points.unique[list(parabola.runs)]
    loss = study.runs.loss[list(parabola.runs)]
    panel.plot(parameters, loss, marker="o", color=colour, zorder=3, **_MEASURED)
    wide = np.geomspace(parameters.min() / 1.15, parameters.max() * 1.15, 100)
    panel.plot(wide, parabola.loss_at(wide), color=colour, linewidth=1.4, alpha=0.9)
    if parabola.inside:
        if parabola.interval is not None:
            shown = np.clip([parabola.interval.low, parabola.interval.high], wide[0], wide[-1])
            panel.plot(shown, [parabola.best_loss] * 2, color=colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
        panel.plot(
            parabola.best_parameters,
            parabola.best_loss,
            marker="*",
            markersize=12,
            color=colour,
            markeredgecolor="0.2",
            markeredgewidth=0.6,
            zorder=4,
        )


def _loop_series(study: Study) -> dict[float, dict[str, list[int]]]:
    """Runs by FLOP level and size, in order of depth, where a size was trained at two depths or more."""
    found: dict[float, dict[str, list[int]]] = {}
    rows = study.runs.rows
    for place in sorted(range(len(rows)), key=lambda place: rows[place].mean_loops):
        level = rows[place].flops_level
        if level is not None:
            found.setdefault(level, {}).setdefault(rows[place].size, []).append(place)
    several = {
        level: {size: places for size, places in sizes.items() if len({rows[place].mean_loops for place in places}) > 1}
        for level, sizes in sorted(found.items())
    }
    return {level: sizes for level, sizes in several.items() if sizes}


def draw_loops(study: Study) -> Any:
    """What depth is worth when its FLOPs are taken from the tokens: a panel for each level, a colour for each size."""
    series, runs = _loop_series(study), study.runs
    fit = study.laws["looped"]
    by_size = {row.size: runs.points.unique[place] for place, row in enumerate(runs.rows)}
    sizes = sorted({size for level in series.values() for size in level}, key=lambda size: float(by_size[size]))
    colours = dict(zip(sizes, _sequence(len(sizes)), strict=True))
    figure, panels = _panels(len(series), share_y=True)
    figure.suptitle("Loss against trained depth at equal training FLOPs, and the looped law")
    for panel, (level, members) in zip(panels, series.items(), strict=True):
        for size, places in members.items():
            points = runs.points.where(np.isin(np.arange(len(runs)), places))
            panel.plot(points.loops, runs.loss[sorted(places)], marker="o", color=colours[size], zorder=3, **_MEASURED)
            loops = np.geomspace(points.loops.min(), points.loops.max(), 100)
            order = np.argsort(points.loops, kind="stable")
            tokens = np.exp(np.interp(np.log(loops), np.log(points.loops[order]), np.log(points.tokens[order])))
            along = Points(points.once[:1], points.recurrent[:1], loops, tokens)
            panel.plot(loops, np.exp(fit.law.log_loss(fit.x_P, along)), color=colours[size], linewidth=1.4, alpha=0.9)
        depths = sorted({runs.rows[place].mean_loops for places in members.values() for place in places})
        panel.set(title=f"{level:.3g} FLOPs", xscale="log")
        panel.set_xticks(depths, [str(depth) for depth in depths])
        panel.minorticks_off()
    _label_outer(panels, "mean loops T of the training", f"held-out loss, {LOSS_UNITS[study.settings.unit]}")
    marks = [_line(colours[size], f"{size}, {readable(float(by_size[size]))}", marker="o") for size in reversed(sizes)]
    figure.legend(handles=marks, title="size, N", loc="outside right upper", frameon=False)
    return figure


def draw_depth(study: Study) -> Any:
    """One panel for models evaluated at several depths, one for sizes trained at several."""
    kinds = [kind for kind in ("test", "training") if any(fit.series.kind == kind for fit in study.depths)]
    figure, panels = _panels(len(kinds), share_y=False, panel=(6.2, 4.4))
    titles = {
        "test": "One model at several depths at test time",
        "training": "One size trained at several depths, on the same tokens",
    }
    for panel, kind in zip(panels, kinds, strict=True):
        fits = [fit for fit in study.depths if fit.series.kind == kind]
        groups = _depth_groups(fits)
        colours = dict(zip(groups, _sequence(len(groups)), strict=True))
        for group, members in groups.items():
            for fit in members:
                _draw_series(panel, fit, colours[group])
        depths = sorted({loops for fit in fits for loops in fit.series.loops})
        panel.set(title=titles[kind], xscale="log", xlabel="loops T")
        panel.set_xticks(depths, [str(depth) for depth in depths])
        panel.minorticks_off()
        marks = [_line(colour, group, marker="o") for group, colour in colours.items()]
        if kind == "test":
            marks.append(_line("0.35", "trained depth", marker="D", linestyle="none", markerfacecolor="none"))
        marks.append(_line("0.35", "L_inf", linestyle=":"))
        panel.legend(handles=marks, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    panels[0].set_ylabel(f"held-out loss, {LOSS_UNITS[study.settings.unit]}")
    return figure


def _depth_groups(fits: Sequence[DepthFit]) -> dict[str, list[DepthFit]]:
    """The series by what gives them their colour: each its own, or of many the trained depth."""
    if len(fits) <= 8 or any(fit.series.trained_loops is None for fit in fits):
        return {fit.series.name: [fit] for fit in fits}
    trained = sorted({fit.series.trained_loops or 0 for fit in fits})
    return {
        f"trained at {loops} loop{'s' * (loops > 1)}": [fit for fit in fits if fit.series.trained_loops == loops]
        for loops in trained
    }


def _draw_series(panel: Any, fit: DepthFit, colour: Any) -> None:
    series = fit.series
    panel.plot(series.loops, series.loss, marker="o", color=colour, zorder=3, **_MEASURED)
    smooth = np.geomspace(min(series.loops), max(series.loops), 200)
    panel.plot(smooth, fit.predict(smooth), color=colour, linewidth=1.3, alpha=0.9)
    panel.axhline(fit.coefficients["L_inf"], color=colour, linewidth=0.8, linestyle=":", alpha=0.7)
    if series.trained_loops in series.loops:
        at = series.loss[series.loops.index(series.trained_loops)]
        panel.plot(series.trained_loops, at, marker="D", markersize=9, color=colour, markerfacecolor="none", zorder=4)


def draw_predicted(study: Study) -> Any:
    """Above, predicted against measured; below, the errors. The largest size and its unseen prediction stand out."""
    from matplotlib import pyplot

    runs, fits = study.runs, list(study.laws.values())
    depths = sorted({row.mean_loops for row in runs.rows})
    colours = dict(zip(depths, _sequence(len(depths)), strict=True))
    figure, grid = pyplot.subplots(
        2,
        len(fits),
        figsize=(4.4 * len(fits) + 1.8, 6.6),
        height_ratios=(2.6, 1),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    unseen = largest(runs, "largest size")
    span = _span(np.concatenate([runs.loss, *(fit.predicted for fit in fits)]), 0.04)
    for above, below, fit in zip(*grid, fits, strict=True):
        errors = 100 * (fit.predicted / runs.loss - 1)
        for index, row in enumerate(runs.rows):
            style = {"color": colours[row.mean_loops], "marker": "s" if unseen[index] else "o", **_MEASURED}
            above.plot(runs.loss[index], fit.predicted[index], zorder=3, **style)
            below.plot(runs.loss[index], errors[index], zorder=3, **style)
        above.plot(span, span, color="0.4", linewidth=0.9, zorder=1)
        below.axhline(0, color="0.4", linewidth=0.9, zorder=1)
        above.set(xlim=span, ylim=span, title=f"{fit.law.title}: ${_formula(fit)}$")
        above.text(0.03, 0.97, _error_text(fit), transform=above.transAxes, va="top", fontsize=8)
        below.set(xlabel=f"measured loss, {LOSS_UNITS[study.settings.unit]}")
    grid[0, 0].set_ylabel(f"predicted loss, {LOSS_UNITS[study.settings.unit]}")
    grid[1, 0].set_ylabel("error, %")
    marks = [_line(colours[depth], str(depth), marker="o", linestyle="none") for depth in depths]
    marks.append(_line("0.35", "largest size", marker="s", linestyle="none"))
    figure.legend(handles=marks, title="mean loops", loc="outside right upper", frameon=False)
    return figure


def _formula(fit: LawFit) -> str:
    texts = {
        "L = E + A N^-alpha + B D^-beta": r"E + A\,N^{-\alpha} + B\,D^{-\beta}",
        "L = E + A (N_once + T^phi N_rec)^-alpha + B D^-beta": (
            r"E + A\,(N_{once} + T^{\varphi} N_{rec})^{-\alpha} + B\,D^{-\beta}"
        ),
    }
    return texts[fit.law.equation]


def _error_text(fit: LawFit) -> str:
    lines = [f"mean error {fit.mean_error:.2%}"]
    for what, result in fit.held_out.items():
        if not isinstance(result, str):
            lines.append(f"{what}, unseen: {result.mean_error:.2%}")
    return "\n".join(lines)


def draw_optimum(study: Study) -> Any:
    """The best N, D and T over two decades of budgets and more, with the resampled fits' range."""
    fit, family = study.best_law, study.family
    assert fit is not None
    assert family is not None
    asked = [best.budget for best in study.optima]
    least = min(float(study.runs.flops.min()), *asked)
    most = max(float(study.runs.flops.max()), *asked)
    budgets = np.geomspace(least, most * 1.5, 25)
    resampled = fit.resampled[:100]
    level, limit = study.settings.level, study.settings.most_parameters
    path = [best_run(fit.law, fit.x_P, resampled, family, float(C), level, limit) for C in budgets]
    several = len(family.depths) > 1
    figure, panels = _panels(4 if several else 2, share_y=False, panel=(4.8, 3.2))
    figure.suptitle(f"Best run at a budget, by the {fit.law.title} law")
    quantities = [("parameters", "parameters N, each once"), ("tokens", "tokens D"), ("loops", "loops T")]
    for panel, (name, label) in zip(panels, quantities, strict=False):
        steps = "steps-mid" if name == "loops" else "default"
        values = [getattr(best, name) for best in path]
        panel.plot(budgets, values, color="tab:blue", linewidth=1.6, drawstyle=steps)
        bands = [best.intervals[name] for best in path]
        if all(bands):
            low, high = [band.low for band in bands if band], [band.high for band in bands if band]
            step = "mid" if name == "loops" else None
            panel.fill_between(budgets, low, high, color="tab:blue", alpha=0.18, linewidth=0, step=step)
        values = [getattr(best, name) for best in study.optima]
        panel.plot(asked, values, marker="*", markersize=13, linestyle="none", color="tab:orange", zorder=4)
        panel.axvspan(least, float(study.runs.flops.max()), color="0.5", alpha=0.08, linewidth=0)
        panel.set(xscale="log", xlabel="training FLOPs", ylabel=label, xlim=(budgets[0], budgets[-1]))
        if name == "loops":
            panel.set_yticks(family.depths if len(family.depths) <= 12 else family.depths[:: len(family.depths) // 8])
            panel.set_ylim(family.depths[0] - 0.5, family.depths[-1] + 0.5)
        else:
            panel.set_yscale("log")
            _readable_ticks(panel.yaxis)
    if several:
        _draw_price_of_depth(panels[3], budgets, path)
        panels[3].axvspan(least, float(study.runs.flops.max()), color="0.5", alpha=0.08, linewidth=0)
    from matplotlib.patches import Patch

    marks = [
        _line("tab:blue", "best"),
        Patch(color="tab:blue", alpha=0.18, label=f"{study.settings.level:.0%} interval"),
        _line("tab:orange", "asked for", marker="*", markersize=11, linestyle="none"),
        Patch(color="0.5", alpha=0.12, label="measured FLOPs"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_price_of_depth(panel: Any, budgets: Floats, path: Sequence[Optimum]) -> None:
    """How much worse the best run of each trained depth is than the best of all."""
    depths = [at.loops for at in path[0].at_depths]
    for column, (depth, colour) in enumerate(zip(depths, _sequence(len(depths)), strict=True)):
        worse = [100 * (best.at_depths[column].loss / best.loss - 1) for best in path]
        panel.plot(budgets, worse, color=colour, linewidth=1.6, label=str(depth))
    panel.set(xscale="log", xlabel="training FLOPs", ylabel="loss above the best, %", xlim=(budgets[0], budgets[-1]))
    panel.legend(title="loops T, fixed", fontsize=8, ncols=2)


def _panels(count: int, *, share_y: bool, panel: tuple[float, float] = _PANEL) -> tuple[Any, list[Any]]:
    """A figure of ``count`` panels, in rows; those beyond are not drawn."""
    from matplotlib import pyplot

    columns = min(count, 2 if count == 4 else _MOST_COLUMNS)
    rows = math.ceil(count / columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(panel[0] * columns + 1.4, panel[1] * rows + 0.3),
        sharey=share_y,
        squeeze=False,
        layout="constrained",
    )
    for unused in grid.flat[count:]:
        unused.remove()
    return figure, list(grid.flat[:count])


def _label_outer(panels: Sequence[Any], x: str, y: str) -> None:
    """Labels at the left and below only, of panels that share their axes' meaning."""
    for panel in panels:
        place = panel.get_subplotspec()
        below = [other.get_subplotspec() for other in panels]
        lowest = max(each.rowspan.stop for each in below if each.colspan.start == place.colspan.start)
        if place.rowspan.stop == lowest:
            panel.set_xlabel(x)
        if place.is_first_col():
            panel.set_ylabel(y)


def _sequence(count: int) -> list[Any]:
    """Colours from dark to bright, in an order that print and colour-blind readers keep; the brightest is left out."""
    from matplotlib import colormaps

    return [colormaps["viridis"](value) for value in (np.linspace(0.0, 0.85, count) if count > 1 else [0.3])]


def _line(colour: Any, label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, label=label, **{"markersize": 5, **style})


def _readable_ticks(axis: Any) -> None:
    """1M, 2M, 5M: few enough not to touch, whatever the range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    labelled = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 3 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=labelled))
    axis.set_major_formatter(FuncFormatter(lambda value, place: readable(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _span(values: Floats, margin: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return low - margin * (high - low), high + margin * (high - low)
