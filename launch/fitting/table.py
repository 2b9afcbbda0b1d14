"""A study on a terminal: the laws beside each other, what they say of unseen runs, and the best run at a budget."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from launch.fitting.bootstrap import Interval
from launch.fitting.holdout import HeldOut
from launch.fitting.runs import LOSS_UNITS, Counted
from launch.fitting.study import LawFit, Part, Study
from launch.readable import readable

COUNTED_TEXT: dict[Counted, str] = {
    "active": "parameters a token passes, without embedding and head",
    "non_embedding": "parameters of all experts, without embedding and head",
    "total": "all parameters",
}


def print_study(study: Study, console: Console) -> None:
    """Everything, and what to beware of."""
    runs, settings = study.runs, study.settings
    console.print(f"{len(runs)} runs; {LOSS_UNITS[settings.unit]}; N counts {COUNTED_TEXT[settings.counted]}")
    interval = f"{settings.level:.0%} interval"
    if study.laws:
        console.print(_law_table(study.laws, interval))
    if study.parabolas:
        console.print(_isoflop_table(study, interval))
    if study.depths:
        console.print(_depth_table(study, interval))
    if study.optima:
        console.print(_optimum_table(study, interval))
    for note in notes_of(study):
        console.print(f"note: {note}")


def notes_of(study: Study) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = [f"no {part}: {reason}" for part, reason in study.left_out.items()]
    for part, fit in study.laws.items():
        if not fit.converged:
            notes.append(f"{part}: the fit did not converge; do not use it")
        if fit.unconverged_resamples:
            notes.append(f"{part}: {fit.unconverged_resamples} of {len(fit.resampled)} resampled fits did not converge")
        if fit.no_intervals is not None:
            notes.append(f"{part}: no intervals: {fit.no_intervals}")
        for name in fit.at_bounds:
            notes.append(f"{part}: {name} ended at the bound of its search; these runs do not determine it")
    if "chinchilla" in study.laws and len({row.mean_loops for row in study.runs.rows}) > 1:
        notes.append("chinchilla does not look at the depth, in which these runs differ")
    if study.family is not None:
        notes.append(f"optimum: the FLOPs of the runs are powers of their size to within {study.family.misfit:.1%}")
    return notes


def _law_table(laws: dict[Part, LawFit], interval: str) -> Table:
    table = Table(title="laws of the loss", title_justify="left")
    table.add_column("")
    for fit in laws.values():
        table.add_column(fit.law.title, justify="right")
        table.add_column(interval, justify="right")
    names = list(dict.fromkeys(name for fit in laws.values() for name in fit.coefficients if name != "a"))
    for name in [*names, "a"]:
        cells = []
        for fit in laws.values():
            known = name in fit.coefficients
            cells += [f"{fit.coefficients[name]:.4g}", _range(fit.intervals[name])] if known else ["", ""]
        label = "a = beta / (alpha + beta)" if name == "a" else name
        table.add_row(label, *cells, end_section=name == "a")
    table.add_row("error at these runs", *_pairs([(f"{fit.mean_error:.2%}", "") for fit in laws.values()]))
    for what in next(iter(laws.values())).held_out:
        unseen = [_held_out(fit.held_out[what]) for fit in laws.values()]
        table.add_row(f"error at the {what}, unseen", *_pairs(unseen))
    return table


def _held_out(result: HeldOut | str) -> tuple[str, str]:
    if isinstance(result, str):
        return "", "not known"
    return f"{result.mean_error:.2%}", f"bias {result.bias:+.2%}, {result.runs} runs"


def _isoflop_table(study: Study, interval: str) -> Table:
    table = Table(title="best size at a FLOP level, by parabola", title_justify="left")
    for name in ("FLOPs", "loops", "runs", "best N", interval, "its tokens", "its loss", ""):
        table.add_column(name, justify="right")
    growth = {each.mean_loops: each for each in study.growth}
    for index, parabola in enumerate(study.parabolas):
        last = study.parabolas[index + 1 : index + 2]
        ends = not last or last[0].mean_loops != parabola.mean_loops
        note = "" if parabola.inside else "no minimum among these sizes"
        if ends and parabola.mean_loops in growth:
            grown = growth[parabola.mean_loops]
            note += f"{'; ' * bool(note)}N ~ C^{grown.exponent:.2f} {_range(grown.interval)}".rstrip()
        inside = parabola.inside
        table.add_row(
            f"{parabola.flops_level:.3g}",
            str(parabola.mean_loops),
            str(len(parabola.runs)),
            readable(parabola.best_parameters) if inside and parabola.best_parameters else "",
            _range(parabola.interval, counts=True) if inside else "",
            readable(parabola.best_tokens) if parabola.best_tokens else "",
            f"{parabola.best_loss:.4f}" if inside else "",
            note,
            end_section=ends,
        )
    return table


def _depth_table(study: Study, interval: str) -> Table:
    table = Table(title="loss against loops, L = L_inf + Z exp(-z T)", title_justify="left")
    for name in ("series", "loops", "L_inf", interval, "Z", "z", interval, "within 0.1% from", "worst error"):
        table.add_column(name, justify="left" if name == "series" else "right")
    for fit in study.depths:
        series = fit.series
        values, intervals = fit.coefficients, fit.intervals
        trained = f", trained at {series.trained_loops}" if series.trained_loops is not None else ""
        table.add_row(
            f"{series.name}{trained}",
            ",".join(map(str, dict.fromkeys(series.loops))),
            f"{values['L_inf']:.4f}",
            _range(intervals["L_inf"]),
            f"{values['Z']:.3g}",
            f"{values['z']:.3g}",
            _range(intervals["z"]),
            f"{fit.enough_loops:.1f} loops",
            f"{fit.worst_error:.2%}" + ("" if fit.converged else ", not converged"),
        )
    return table


def _optimum_table(study: Study, interval: str) -> Table:
    table = Table(title="best run at a budget of training FLOPs", title_justify="left")
    for name in ("FLOPs", "N", interval, "tokens", interval, "loops", interval, "loss", interval, "beware"):
        table.add_column(name, justify="left" if name == "beware" else "right")
    for best in study.optima:
        intervals = best.intervals
        loops = intervals["loops"]
        table.add_row(
            f"{best.budget:.3g}",
            readable(best.parameters),
            _range(intervals["parameters"], counts=True),
            readable(best.tokens),
            _range(intervals["tokens"], counts=True),
            str(best.loops),
            "" if loops is None else f"{loops.low:g} .. {loops.high:g}",
            f"{best.loss:.4f}",
            _range(intervals["loss"]),
            "; ".join(best.edges),
            end_section=len(best.at_depths) < 2,
        )
        if len(best.at_depths) > 1:
            for each in best.at_depths:
                cells = [
                    readable(each.parameters),
                    "",
                    readable(each.tokens),
                    "",
                    str(each.loops),
                    "",
                    f"{each.loss:.4f}",
                ]
                last = each is best.at_depths[-1]
                table.add_row("at this depth", *cells, "", "", style="dim", end_section=last)
    return table


def _pairs(cells: Sequence[tuple[str, str]]) -> list[str]:
    return [text for pair in cells for text in pair]


def _range(interval: Interval | None, *, counts: bool = False) -> str:
    if interval is None:
        return ""
    if counts:
        return f"{readable(interval.low)} .. {readable(interval.high)}"
    return f"{interval.low:.4g} .. {interval.high:.4g}"
