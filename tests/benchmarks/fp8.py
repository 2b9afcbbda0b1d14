"""Does FP8 cost loss? The demo's model trained with and without it, from several seeds: docs/precision.md's curves.

    python tests/benchmarks/fp8.py --store runs/fp8.jsonl                # every missing run, then the report
    python tests/benchmarks/fp8.py --store runs/fp8.jsonl --report       # the report of what is there
        [--json FILE] [--plot docs/fp8_loss.png]
    python tests/benchmarks/fp8.py --errors                              # a product's error by recipe and input
    python tests/benchmarks/fp8.py --price                               # what the emulation costs a step on this CPU

A run is (seed, recipe): ``configs/ice_tiny.json``'s model, data, optimizer settings, schedule and random depth, in one
process and one thread with plain torch AdamW instead of the engine, in fp32, with half the batch of the demo (4
sequences of 256 tokens). The seed decides initial weights, order of the data and depth of each step; all recipes of a
seed share them. On a CPU the eight-bit products are emulated: their numerics, not their speed.

Finished runs are one JSON object a line in the store, and are not repeated; a run that was interrupted begins again.

Besides the recipes there is a control, ``perturbed``: high precision again, from initial weights that are off by a
thousandth. Training is chaotic, so that run drifts from its twin as well; FP8 costs what it drifts beyond that.

The report smooths each loss curve by a trailing mean over ``--window`` steps and compares from there to the end:
FP8 relative to bf16 (here fp32) of the same seed and of the mean over seeds, beside the spread of the seeds themselves
(largest minus smallest, relative to the mean) at the same steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from data_pipeline.dataset.reader import open_dataset  # noqa: E402
from launch.settings import load_settings  # noqa: E402
from model import IceModel  # noqa: E402
from model.expert_parallel import update_selection_biases  # noqa: E402
from model.fp8 import RECIPES, Emulated, RecipeName, choose_kernels, convert  # noqa: E402
from model.fp8.scaling import rounded  # noqa: E402
from model.init import decays  # noqa: E402
from model.token_loss import token_losses  # noqa: E402
from pretrain.config import TrainingConfig  # noqa: E402
from pretrain.data import BatchLoader, held_out_sets, open_sampler  # noqa: E402
from pretrain.data.validation import validation_batches  # noqa: E402
from pretrain.loop_depth import sample_loops  # noqa: E402
from pretrain.losses import mean_loss  # noqa: E402
from pretrain.schedule import lr_scale  # noqa: E402

BASELINE = "bf16"
CONTROL = "perturbed"
VARIANTS: tuple[str, ...] = (*get_args(RecipeName), CONTROL)
PERTURBATION = 1e-3
HELD_OUT_SEQUENCES = 64


class Run(NamedTuple):
    """A finished run."""

    seed: int
    recipe: str
    steps: int
    batch_size: int
    losses: list[float]  # of each step
    held_out_loss: float  # nats a token at the end, at the mean depth
    seconds: float


def read_store(store: Path) -> list[Run]:
    """The finished runs."""
    if not store.is_file():
        return []
    return [Run(**json.loads(line)) for line in store.read_text().splitlines()]


def train(seed: int, recipe: str, steps: int, batch_size: int, data: Path) -> Run:
    """One run from the beginning."""
    started = time.perf_counter()
    overrides = [f"data.path={data}", f"data.global_batch_size={batch_size}", f"run.seed={seed}"]
    config = load_settings(TrainingConfig, ROOT / "configs" / "ice_tiny.json", overrides)
    dataset = open_dataset(data)
    sampler = open_sampler(config.data, seed, config.model.vocab_size, dataset)
    loader = BatchLoader(sampler, batch_size, batch_size)

    torch.manual_seed(seed)
    model = IceModel(config.model)
    if recipe == CONTROL:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + PERTURBATION * torch.randn_like(parameter))
    elif (choice := choose_kernels(recipe, "cpu", torch.float32)) is not None:  # type: ignore[arg-type]
        convert(model, config.model, choice.kernels, exclude=())
    optim = config.optim
    adam = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if decays(n, p)], "weight_decay": optim.weight_decay},
            {"params": [p for n, p in model.named_parameters() if not decays(n, p)], "weight_decay": 0.0},
        ],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    losses = []
    for step in range(1, steps + 1):
        for group in adam.param_groups:
            group["lr"] = optim.lr * lr_scale(config.schedule, step)
        (batch,) = loader.step_batches((step - 1) * batch_size)
        loops = sample_loops(config.loop, config.mean_loops, seed, step)
        loss = mean_loss(token_losses(model(batch.input_ids, loops), batch.targets), batch.targets)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        adam.step()
        load_LE = model.core.expert_load.take().sum(dim=0)
        update_selection_biases(model, load_LE, optim.expert_bias_update_rate)
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"  step {step}: loss {np.mean(losses[-50:]):.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    held_out = held_out_loss(model, config, dataset)
    return Run(seed, recipe, steps, batch_size, losses, held_out, time.perf_counter() - started)


@torch.no_grad()
def held_out_loss(model: IceModel, config: TrainingConfig, dataset: Any) -> float:
    """Nats a token of held-out text, the same sequences in every run."""
    model.eval()
    total, tokens = 0.0, 0
    (held_out,) = held_out_sets(config.data, dataset)
    for batch in validation_batches(held_out, 8, limit=HELD_OUT_SEQUENCES):
        counted = batch.targets >= 0
        losses = token_losses(model(batch.input_ids, config.mean_loops), batch.targets)
        total, tokens = total + losses[counted].double().sum().item(), tokens + int(counted.sum())
    return total / tokens


def smoothed(losses: Sequence[float], window: int) -> NDArray[np.float64]:
    """Trailing means, from step ``window`` on."""
    return np.convolve(np.asarray(losses, dtype=np.float64), np.full(window, 1 / window), mode="valid")


class Comparison(NamedTuple):
    """FP8 relative to the baseline on the same seeds: shares, 0.0025 is a quarter of a percent."""

    recipe: str
    seeds: tuple[int, ...]
    largest_by_seed: list[float]  # largest |difference| of a seed's own smoothed curve
    mean_by_seed: list[float]  # mean |difference| of it
    largest_of_mean: float  # the largest of the seeds' mean curve
    mean_of_mean: float
    end_of_mean: float  # signed, at the last step
    held_out_by_seed: list[float]  # signed
    spread_of_seeds: float  # smallest over steps of the baseline's own (largest - smallest seed) / mean
    median_spread_of_seeds: float


def compare(runs: Sequence[Run], recipe: RecipeName, window: int) -> Comparison | None:
    """``recipe`` against the baseline on the seeds that have both."""
    by_key = {(run.seed, run.recipe): run for run in runs}
    seeds = tuple(sorted(seed for seed, name in by_key if name == recipe and (seed, BASELINE) in by_key))
    if not seeds:
        return None
    base = np.stack([smoothed(by_key[seed, BASELINE].losses, window) for seed in seeds])
    eight = np.stack([smoothed(by_key[seed, recipe].losses, window) for seed in seeds])
    each = np.abs(eight / base - 1)
    mean = eight.mean(axis=0) / base.mean(axis=0) - 1
    spread = (base.max(axis=0) - base.min(axis=0)) / base.mean(axis=0)
    held_out = [by_key[s, recipe].held_out_loss / by_key[s, BASELINE].held_out_loss - 1 for s in seeds]
    return Comparison(
        recipe,
        seeds,
        each.max(axis=1).tolist(),
        each.mean(axis=1).tolist(),
        float(np.abs(mean).max()),
        float(np.abs(mean).mean()),
        float(mean[-1]),
        held_out,
        float(spread.min()),
        float(np.median(spread)),
    )


def table(comparisons: Sequence[Comparison], window: int) -> str:
    """The comparisons in Markdown, percent."""

    def percent(values: Sequence[float], sign: str = "") -> str:
        return ", ".join(f"{100 * value:{sign}.3f}" for value in values)

    lines = [
        f"Loss curves smoothed over {window} steps, relative to {BASELINE} in percent.",
        "",
        "| recipe | seeds | largest, each seed | mean, each seed | mean curve: largest | mean | at the end "
        "| held-out, each seed | spread of seeds: smallest | median |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in comparisons:
        cells = [
            c.recipe,
            str(len(c.seeds)),
            percent(c.largest_by_seed),
            percent(c.mean_by_seed),
            percent([c.largest_of_mean]),
            percent([c.mean_of_mean]),
            percent([c.end_of_mean], "+"),
            percent(c.held_out_by_seed, "+"),
            percent([c.spread_of_seeds]),
            percent([c.median_spread_of_seeds]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: Sequence[Run], window: int, path: Path) -> None:
    """Smoothed curves by seed, and below them each recipe's difference from the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_key = {(run.seed, run.recipe): run for run in runs}
    seeds = sorted({run.seed for run in runs})
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 8), sharex=True)
    styles = dict(zip(VARIANTS, ("-", "--", ":", "-."), strict=True))
    for seed in seeds:
        colour = f"C{seed % 10}"
        for recipe in VARIANTS:
            run = by_key.get((seed, recipe))
            if run is None:
                continue
            curve = smoothed(run.losses, window)
            steps = np.arange(window, run.steps + 1)
            above.plot(steps, curve, styles[recipe], color=colour, lw=1, label=f"{recipe}, seed {seed}")
            base = by_key.get((seed, BASELINE))
            if recipe != BASELINE and base is not None:
                difference = 100 * (curve / smoothed(base.losses, window) - 1)
                below.plot(steps, difference, styles[recipe], color=colour, lw=1)
    for recipe in VARIANTS:
        pairs = [(by_key[s, recipe], by_key[s, BASELINE]) for s in seeds if {(s, recipe), (s, BASELINE)} <= set(by_key)]
        if recipe != BASELINE and pairs:
            eight, base = (
                np.mean([smoothed(run.losses, window) for run in side], axis=0) for side in zip(*pairs, strict=True)
            )
            below.plot(np.arange(window, pairs[0][0].steps + 1), 100 * (eight / base - 1), styles[recipe], color="k")
    below.axhspan(-0.25, 0.25, color="0.9", zorder=0)
    above.set_ylabel(f"loss, mean of the last {window} steps")
    below.set_ylabel(f"percent from {BASELINE} (black: mean over seeds)")
    below.set_xlabel("step")
    above.set_title("ice_tiny: FP8 (emulated) beside fp32")
    above.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def error_table(inner: int = 1024, size: int = 512) -> str:
    """Relative error, root mean square in percent, of products over ``inner`` numbers against float64."""
    torch.manual_seed(0)
    weight = torch.randn(size, inner)
    plain = torch.randn(size, inner)
    outliers = plain.clone()
    outliers[:, torch.randperm(inner)[:4]] *= 1e5  # a few features are large in every row, as in trained transformers
    spread = plain * torch.exp2(6 * torch.randn(size, inner))  # as gradients are
    lines = ["| recipe | normal | 4 features x 100,000: what the others give | log-normal, 6 octaves |"]
    lines.append("| --- | --- | --- | --- |")
    for name, recipe in RECIPES.items():
        kernels = Emulated(recipe)
        errors = []
        for x in (plain, outliers, spread):
            exact, got = x.double() @ weight.double().T, kernels.product(x, weight).double()
            if x is outliers:
                large = x.abs().amax(0) > 1000
                exact = exact - x[:, large].double() @ weight[:, large].double().T
                rounded_x, rounded_w = rounded(x, recipe.input), rounded(weight, recipe.weight)
                got = got - rounded_x[:, large].double() @ rounded_w[:, large].double().T
            errors.append(float((got - exact).norm() / exact.norm()))
        lines.append(f"| {name} | {' | '.join(f'{100 * error:.2f}' for error in errors)} |")
    return "\n".join(lines)


def price_table(data: Path, batch_size: int, rounds: int = 5) -> str:
    """CPU time of a training step's forward and backward by recipe, taken in turns; medians."""
    config = load_settings(TrainingConfig, ROOT / "configs" / "ice_tiny.json", [f"data.path={data}"])
    ids = torch.randint(0, config.model.vocab_size, (batch_size, config.data.sequence_length + 1))
    models: dict[str, IceModel] = {}
    for recipe in get_args(RecipeName):
        torch.manual_seed(0)
        models[recipe] = IceModel(config.model)
        if (choice := choose_kernels(recipe, "cpu", torch.float32)) is not None:
            convert(models[recipe], config.model, choice.kernels, exclude=())
    seconds: dict[str, list[float]] = {recipe: [] for recipe in models}
    for _ in range(rounds + 1):
        for recipe, model in models.items():
            started = time.process_time()
            token_losses(model(ids[:, :-1], config.mean_loops), ids[:, 1:]).mean().backward()
            seconds[recipe].append(time.process_time() - started)
    lines = ["| recipe | CPU seconds a step | relative |", "| --- | --- | --- |"]
    base = float(np.median(seconds[BASELINE][1:]))
    for recipe, times in seconds.items():
        median = float(np.median(times[1:]))
        lines.append(f"| {recipe} | {median:.3f} | {median / base:.2f} |")
    return "\n".join(lines)


def missing(runs: Sequence[Run], arguments: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Seeds and recipes that have no run yet: seed by seed, so that comparisons come early, and the controls last."""
    finished = {(run.seed, run.recipe) for run in runs}
    wanted = [(seed, recipe) for seed in arguments.seeds for recipe in arguments.recipes]
    for key in sorted(wanted, key=lambda key: key[1] == CONTROL):
        if key not in finished:
            yield key


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Loss curves with and without FP8.")
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "fp8.jsonl", help="finished runs, JSON lines")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "demo", help="the demo's prepared data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--window", type=int, default=50, help="steps that the report averages")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--json", type=Path, help="write the comparison here")
    parser.add_argument("--plot", type=Path, help="draw the curves here")
    parser.add_argument("--errors", action="store_true", help="print the errors of single products and end")
    parser.add_argument("--price", action="store_true", help="print the time of a step by recipe and end")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    if arguments.errors:
        print(error_table())
        return
    if arguments.price:
        print(price_table(arguments.data, arguments.batch))
        return
    if not arguments.report:
        arguments.store.parent.mkdir(parents=True, exist_ok=True)
        for seed, recipe in missing(read_store(arguments.store), arguments):
            print(f"seed {seed}, {recipe}", flush=True)
            run = train(seed, recipe, arguments.steps, arguments.batch, arguments.data)
            with arguments.store.open("a") as file:
                file.write(json.dumps(run._asdict()) + "\n")
    runs = [run for run in read_store(arguments.store) if run.seed in arguments.seeds and run.steps == arguments.steps]
    comparisons = [c for name in VARIANTS if name != BASELINE and (c := compare(runs, name, arguments.window))]
    print(table(comparisons, arguments.window))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([c._asdict() for c in comparisons], indent=1) + "\n")
    if arguments.plot is not None:
        plot(runs, arguments.window, arguments.plot)


if __name__ == "__main__":
    main()
