"""The command: known coefficients inside their intervals, wrong laws shown, mistakes in one line, the same bits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic import LAW, isoflop_rows, looped_loss, make_row, write_rows

from launch.fit import main
from launch.fitting.runs import ResultRow, as_runs, read_rows
from launch.fitting.study import Settings, make_study
from launch.settings import BadInputError

RESAMPLES = 50


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the results of a looped family, with noise, have been fitted."""
    folder = tmp_path_factory.mktemp("fit")
    rows = isoflop_rows(looped_loss(), noise=0.003, seed=2)
    by_loops = {str(T): {"validation_loss": 4 + 2.0**-T, "bits_per_byte": 2 + 2.0**-T} for T in (1, 2, 4, 8)}
    rows[0]["by_loops"] = by_loops
    results = write_rows(folder / "results.jsonl", rows)
    options = ["--wandb", "offline", "--wandb-project", "test"]
    assert main([str(results), "--resamples", str(RESAMPLES), *options]) == 0
    return folder


def test_known_coefficients_lie_inside_their_intervals(fitted: Path) -> None:
    law = json.loads((fitted / "fit.json").read_text())["laws"]["looped"]
    assert law["converged"]
    assert (law["resamples"], law["unconverged_resamples"]) == (RESAMPLES, 0)
    for name, value in LAW.items():
        interval = law["intervals"][name]
        assert interval["low"] <= value <= interval["high"], name
        assert interval["low"] < law["coefficients"][name] < interval["high"], name
    assert law["intervals"]["phi"]["high"] - law["intervals"]["phi"]["low"] < 0.1, "an interval that says nothing"
    split = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
    assert law["intervals"]["a"]["low"] <= split <= law["intervals"]["a"]["high"]


def test_a_law_that_does_not_see_depth_is_visibly_worse(fitted: Path) -> None:
    laws = json.loads((fitted / "fit.json").read_text())["laws"]
    assert laws["chinchilla"]["converged"], "it is the best of its kind, and still wrong"
    assert laws["chinchilla"]["mean_error"] > 5 * laws["looped"]["mean_error"]
    for what in ("largest size", "largest budget"):
        wrong, right = (laws[part]["held_out"][what]["mean_error"] for part in ("chinchilla", "looped"))
        assert wrong > 3 * right, what


def test_everything_is_written_and_read_again(fitted: Path) -> None:
    study = json.loads((fitted / "fit.json").read_text())
    rows = [json.loads(line) for line in (fitted / "results.jsonl").read_text().splitlines()]
    losses = {row["cell"]: row["validation_loss"] for row in rows}
    assert {run["cell"]: run["loss"] for run in study["runs"]} == losses
    errors = [abs(run["predicted"]["looped"] / run["loss"] - 1) for run in study["runs"]]
    assert sum(errors) / len(errors) == pytest.approx(study["laws"]["looped"]["mean_error"])
    assert len(study["isoflop"]["parabolas"]) == 12
    assert [series["series"]["name"] for series in study["depth"]] == [rows[0]["cell"]]
    assert [best["budget"] for best in study["optimum"]["best"]] == pytest.approx([1.6e17, 1.6e18], rel=1e-6)
    assert study["left_out"] == {}
    for name in ("isoflop", "loops", "depth", "predicted", "optimum"):
        with Image.open(fitted / f"fit_{name}.png") as picture:
            assert picture.width > 600, name
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 50, f"{name} shows nothing"
    (run,) = (fitted / "wandb").glob("offline-run-*")
    tables = sorted(path.name.split("_")[0] for path in run.glob("files/media/table/*.json"))
    assert tables == ["laws", "measured", "optimum"]
    assert len(list(run.glob("files/media/images/*.png"))) == 5


def test_the_same_seed_gives_the_same_bits_in_any_order_of_rows(tmp_path: Path) -> None:
    rows = isoflop_rows(looped_loss(), noise=0.003, widths=(128, 192, 256, 384), levels=[1e16, 4e16], depths=[1, 4])

    def fit(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        path = write_rows(tmp_path / "results.jsonl", rows)
        settings = Settings(required=("looped", "isoflop"), optional=(), resamples=5, seed=seed)
        return make_study(read_rows([path]), settings).to_json()

    first = fit(rows, 0)
    assert fit(rows[::-1], 0) == first
    other = fit(rows, 1)
    del first["settings"], other["settings"]
    assert other["laws"]["looped"]["coefficients"] == first["laws"]["looped"]["coefficients"]
    assert other["laws"]["looped"]["intervals"] != first["laws"]["looped"]["intervals"]


def test_parts_that_the_runs_do_not_show_are_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        make_row(width, 2, tokens, looped_loss()(24 * width**2 + 200 * width, 40 * width**2, 2, tokens))
        for width in (128, 192, 256, 384)
        for tokens in (10**8, 3 * 10**8, 10**9)
    ]
    path = write_rows(tmp_path / "results.jsonl", rows)
    assert main([str(path), "--resamples", "20", "--loss", "bits", "--out", str(tmp_path / "out" / "here")]) == 0
    study = json.loads((tmp_path / "out" / "here" / "fit.json").read_text())
    assert set(study["laws"]) == {"chinchilla"}
    assert set(study["left_out"]) == {"looped", "isoflop", "depth"}
    assert study["runs"][0]["loss"] == pytest.approx(rows[0]["bits_per_byte"])
    assert all(best["loops"] == 2 for best in study["optimum"]["best"])
    output = capsys.readouterr().out
    assert "note: no looped: all runs have 2 mean loops; it needs 2 depths or more" in output
    assert "no FLOP level has 3 sizes" in output
    assert sorted(path.name for path in (tmp_path / "out" / "here").glob("*.png")) == [
        "fit_optimum.png",
        "fit_predicted.png",
    ]


def test_parameters_are_counted_as_asked() -> None:
    rows = [ResultRow.model_validate(make_row(128, 2, 1e8, 4.0))]
    total = rows[0].parameters.total
    counted = {kind: as_runs(rows, kind, "nats").points for kind in ("active", "non_embedding", "total")}
    assert counted["active"].recurrent[0] == 40 * 128**2
    assert counted["non_embedding"].recurrent[0] == counted["total"].recurrent[0] == 4 * 40 * 128**2
    assert counted["active"].once[0] == counted["non_embedding"].once[0] == 24 * 128**2 + 200 * 128
    assert counted["total"].unique[0] == total


GOOD = isoflop_rows(looped_loss())


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (GOOD[:5], [], "the chinchilla fit needs other runs: 5 runs; it has 5 coefficients and needs 6"),
        (
            [row for row in GOOD if row["size"] == "d128"],
            [],
            "the chinchilla fit needs other runs: 1 different number of parameters; it needs 3 or more",
        ),
        (GOOD, ["--laws", "looped", "--loops", "4"], "the looped fit needs other runs: all runs have 4 mean loops"),
        (GOOD, ["--laws", "depth"], "the depth fit needs other runs: no run was evaluated at 4 depths"),
        (GOOD, ["--loops", "3"], "--loops 3: no run was trained at it; there are [1, 2, 4, 8]"),
        ([], [], "results.jsonl: no finished cell; run the sweep first"),
        ([*GOOD, GOOD[0]], [], "line 61: cell = t"),
        (
            [*GOOD[:-1], {**GOOD[-1], "data": {"data/other": "0" * 64}}],
            [],
            "were trained on different data",
        ),
        (
            [{**GOOD[0], "parameters": {"total": 5, "active": 5, "non_embedding": 5}}],
            [],
            "line 1: parameters.once: is required and missing",
        ),
        ([{**GOOD[0], "validation_loss": None}], [], "line 1: validation_loss = null:"),
        ([{**GOOD[0], "tokens": 0}], [], "line 1: tokens = 0:"),
        (GOOD, ["--budget", "-1"], "--budget -1: must be above 0, and finite"),
        (GOOD, ["--level", "95"], "--level 95: must be between 0 and 1"),
        (GOOD, ["--most-parameters", "0"], "--most-parameters 0: must be above 0"),
        (GOOD, ["--resamples", "-1"], "--resamples -1: must be 0 or more"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    tmp_path: Path, rows: list[dict[str, Any]], options: list[str], expected: str
) -> None:
    path = write_rows(tmp_path / "results.jsonl", rows)
    with pytest.raises(BadInputError, match=re.escape(expected)) as caught:
        main([str(path), *options])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fit.json").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '"row"', "[" * 100_000], ids=["cut", "list", "text", "nested"])
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    path = write_rows(tmp_path / "results.jsonl", GOOD[:1])
    path.write_text(path.read_text() + text)
    with pytest.raises(BadInputError, match=r"results\.jsonl: line 2: (not JSON|holds a)"):
        main([str(path)])


def test_a_wrong_command_ends_with_78_in_one_line_and_without_torch(repository_root: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from launch import fit\n"
        "from launch.fitting import pictures, tracking\n"
        "assert 'torch' not in sys.modules\n"
        f"sys.argv = ['fit.py', {str(tmp_path / 'results.jsonl')!r}]\n"
        "fit.exit_with_status(fit.main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=repository_root, capture_output=True, text=True)
    assert ended.returncode == 78, ended.stderr
    assert ended.stderr.splitlines() == [
        f"error: {tmp_path / 'results.jsonl'}: no such file; name the results.jsonl of a sweep"
    ]


def test_too_few_runs_to_draw_from_have_no_intervals_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = isoflop_rows(looped_loss(), widths=(128, 192, 256), levels=[1e16, 4e16], depths=[1])
    path = write_rows(tmp_path / "results.jsonl", rows)
    assert main([str(path), "--resamples", "20"]) == 0
    law = json.loads((tmp_path / "fit.json").read_text())["laws"]["chinchilla"]
    assert set(law["intervals"].values()) == {None}
    assert "too few runs to draw from" in law["no_intervals"]
    assert "note: chinchilla: no intervals: too few runs to draw from" in capsys.readouterr().out
