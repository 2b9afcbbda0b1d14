"""A study on W&B: its tables, its numbers and its pictures as one run of the project, online or offline.

``wandb sync`` uploads an offline one later. The key is W&B's own business: it is never read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from launch.fitting.study import Study

Mode = Literal["online", "offline"]


def report_to_wandb(study: Study, pictures: Sequence[Path], folder: Path, mode: Mode, project: str, name: str) -> None:
    """One W&B run, of type ``fit``, in ``folder/wandb``."""
    import wandb

    run: Any = wandb.init(
        project=project,
        name=name,
        job_type="fit",
        dir=str(folder),
        mode=mode,
        config={**study.to_json()["settings"], "cells": [row.cell for row in study.runs.rows]},
        settings=wandb.Settings(silent=True, console="off"),
    )
    laws = wandb.Table(columns=["law", "coefficient", "value", "low", "high"], data=law_rows(study))
    measured = wandb.Table(columns=["cell", "N", "tokens", "loops", "FLOPs", "loss", *study.laws], data=run_rows(study))
    optimum = wandb.Table(
        columns=["FLOPs", "N", "tokens", "loops", "loss", "beware"],
        data=[
            [best.budget, best.parameters, best.tokens, best.loops, best.loss, "; ".join(best.edges)]
            for best in study.optima
        ],
    )
    run.log(
        {
            "laws": laws,
            "measured": measured,
            "optimum": optimum,
            **{picture.stem: wandb.Image(str(picture)) for picture in pictures},
        }
    )
    for part, fit in study.laws.items():
        for coefficient, value in fit.coefficients.items():
            run.summary[f"{part}/{coefficient}"] = value
        run.summary[f"{part}/mean_error"] = fit.mean_error
        for what, result in fit.held_out.items():
            if not isinstance(result, str):
                run.summary[f"{part}/error at the {what}"] = result.mean_error
    run.finish()


def law_rows(study: Study) -> list[list[Any]]:
    """A row for each coefficient of each law and series, with its interval."""
    fits: list[tuple[str, dict[str, float], dict[str, Any]]] = [
        *((part, fit.coefficients, fit.intervals) for part, fit in study.laws.items()),
        *((f"depth: {fit.series.name}", fit.coefficients, fit.intervals) for fit in study.depths),
    ]
    return [
        [law, name, value, interval.low if interval else None, interval.high if interval else None]
        for law, coefficients, intervals in fits
        for name, value in coefficients.items()
        for interval in [intervals[name]]
    ]


def run_rows(study: Study) -> list[list[Any]]:
    """A row for each run: where it lies, what was measured, and what each law says."""
    runs = study.runs
    return [
        [
            row.cell,
            float(runs.points.unique[index]),
            row.tokens,
            row.mean_loops,
            row.training_flops,
            float(runs.loss[index]),
            *(float(fit.predicted[index]) for fit in study.laws.values()),
        ]
        for index, row in enumerate(runs.rows)
    ]
