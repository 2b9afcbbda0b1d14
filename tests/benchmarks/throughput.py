"""How fast a training step is, beside plain torch, the machine's matrix product, loops over experts and OpenMythos.

    python tests/benchmarks/throughput.py --openmythos FOLDER --json throughput.json   # one thread, 5 minutes
    python tests/benchmarks/throughput.py --sections experts engine --threads 2
    python tests/benchmarks/throughput.py --sections profile                               # the top ten of a step

Everything compared is run alternately in this one process (A B A B ...); a ratio is the median of the turns' ratios, a
rate is of the fastest turn. ``--clock cpu`` takes CPU seconds instead of the clock's, for a busy machine (one thread).
A step is forward, loss, backward, clipping by the global norm and AdamW (torch's fused one on every side), fp32.

Freed memory stays with the process, for all sides (``pretrain/host_memory.py``, which the engine does on CPUs).

- *engine*: ``TrainingEngine`` (ZeRO-3, expert layers replaced, one rank) against the same ``IceModel`` in plain torch.
- *utilisation*: model FLOPs a second of the plain and the engine's step at width 1024, over the rate of a 2048 x 2048
  matrix product. FLOPs: ``training_flops`` below, of the loops that ran, backward twice the forward, nothing
  recomputed (``remat none``), attention's causal half only; ``torch.utils.flop_counter``, which counts the whole
  square, is shown beside it.
- *experts*: one MoE layer, forward and backward in 4 loops, with its grouped product, with one product an expert
  (``expert_backend = loop``), and as it is usually written (for each expert: find its tokens, gather, add back).
- *openmythos*: github.com/kyegomez/OpenMythos (MIT licence) at the same width, heads, layers, vocabulary, experts and
  executed loops, with its halting off (a threshold that no sum of probabilities reaches) and its adapter at rank 1.
  ``--openmythos FOLDER`` is a checkout; without it the repository is cloned for the time of the run.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import IceConfig, IceModel
from model.expert_parallel import set_expert_product
from model.gradient_sum import summed_gradients
from model.grouped_product import GroupedProduct, expert_weights, grouped_mm, loop
from model.moe import MoELayer
from pretrain.host_memory import keep_freed_memory

REPOSITORY = "https://github.com/kyegomez/OpenMythos"
Step = Callable[[], object]


def base(**fields: Any) -> IceConfig:
    """What all models here share."""
    common = {
        "vocab_size": 4096,
        "max_seq_len": 512,
        "max_output_tokens": 512,
        "prelude_layers": 1,
        "coda_layers": 1,
        "max_loop_iters": 4,
        "n_heads": 8,
        "n_kv_heads": 4,
        "n_shared_experts": 0,
        "tie_embeddings": True,
    }
    return IceConfig.model_validate(common | fields)


# Each at 4 loops and 1,024 tokens a step.
SMALL = base(dim=512, ffn_dim=1408, n_experts=16, n_experts_per_tok=2, expert_dim=512, n_shared_experts=1)
WIDE = base(dim=1024, ffn_dim=2816, n_experts=8, n_experts_per_tok=2, expert_dim=1024, n_shared_experts=1)
OPENMYTHOS = {
    "64 experts, top 4, dim 512": base(dim=512, ffn_dim=682, n_experts=64, n_experts_per_tok=4, expert_dim=512),
    "256 experts, top 8, dim 256": base(dim=256, ffn_dim=341, n_experts=256, n_experts_per_tok=8, expert_dim=128),
}
BATCH, LENGTH = 4, 256


def turns(steps: dict[str, Step], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each step in each turn, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            gc.collect()
            start = clock()
            step()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times as long ``slow`` takes: median over turns."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def tokens(config: IceConfig) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step."""
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def plain_step(model: nn.Module, config: IceConfig, **call: Any) -> Step:
    """A training step of any model that maps ids to logits, in plain torch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs, targets = tokens(config)

    def step() -> None:
        logits = model(inputs, **call)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(config: IceConfig) -> tuple[Step, Step]:
    """A training step on the engine, one rank, and what frees the engine."""
    from launch.environment import discover_place
    from launch.settings import parse_settings
    from pretrain.config import TrainingConfig
    from pretrain.engine import TrainingEngine
    from pretrain.losses import language_model_loss

    values = {
        "model": config.model_dump(),
        "data": {"path": "unused", "sequence_length": LENGTH, "global_batch_size": BATCH},
        "schedule": {"steps": 10, "warmup_steps": 0},
        "loop": {"remat": "none"},
        "precision": {"dtype": "fp32"},
        "parallel": {"zero_stage": 3, "micro_batch_size": BATCH},
    }
    engine = TrainingEngine(parse_settings(TrainingConfig, values, "benchmark"), discover_place())
    inputs, targets = tokens(config)

    def step() -> None:
        engine.backward(language_model_loss(engine.forward(inputs, config.max_loop_iters).logits, targets))
        engine.step(1e-4)

    return step, engine._engine.destroy


def training_flops(config: IceConfig, batch: int, length: int, loops: int, causal: bool = True) -> int:
    """FLOPs of a training step: three times the forward's, 2 M N K for a matrix product.

    Forward, a token: ``2 D (H + 2 G) C + 2 D H C`` projections and ``4 H C L`` attention in each layer passed (halved
    where causal), ``6 D F`` a SwiGLU of width F, ``2 D E`` a router, ``2 D V`` the head.
    """
    d, c = config.dim, config.head_dim
    attention = 2 * d * (config.n_heads + 2 * config.n_kv_heads) * c + 2 * d * config.n_heads * c
    attention += 4 * config.n_heads * c * length // (2 if causal else 1)
    once = attention + 6 * d * config.ffn_dim
    experts = config.n_experts_per_tok + config.n_shared_experts
    looped = attention + 6 * d * config.expert_dim * experts + 2 * d * config.n_experts
    layers = (config.prelude_layers + config.coda_layers) * once + loops * config.recurrent_layers * looped
    return 3 * batch * length * (layers + 2 * d * config.vocab_size)


def counted_flops(model: IceModel, config: IceConfig) -> int:
    """What ``torch.utils.flop_counter`` sees in a step.

    It knows neither grouped products nor the CPU's flash attention: experts are multiplied one by one, scores written.
    """
    set_expert_product(model, loop)
    inputs, targets = tokens(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    model.zero_grad()
    set_expert_product(model, grouped_mm)
    return int(counter.get_total_flops())


def engine_section(options: argparse.Namespace) -> dict[str, Any]:
    """The engine's overhead on one rank."""
    torch.manual_seed(0)
    on_engine, free = engine_step(SMALL)
    plain = plain_step(IceModel(SMALL), SMALL)
    seconds = turns({"plain torch": plain, "engine, ZeRO-3": on_engine}, options.repeats, options.time)
    free()
    count = BATCH * LENGTH
    return {
        "parameters": parameters(IceModel(SMALL)),
        "tokens_per_second": {name: count / min(values) for name, values in seconds.items()},
        "overhead": ratio(seconds["engine, ZeRO-3"], seconds["plain torch"]) - 1,
    }


def utilisation_section(options: argparse.Namespace) -> dict[str, Any]:
    """Model FLOPs a second over the rate of a matrix product."""
    model = IceModel(WIDE)
    counted = counted_flops(model, WIDE)
    whole_square = training_flops(WIDE, BATCH, LENGTH, WIDE.max_loop_iters, causal=False)
    flops = training_flops(WIDE, BATCH, LENGTH, WIDE.max_loop_iters)
    on_engine, free = engine_step(WIDE)
    a, b, out = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.empty(2048, 2048)
    steps = {
        "gemm": lambda: torch.mm(a, b, out=out),
        "plain torch": plain_step(model, WIDE),
        "engine, ZeRO-3": on_engine,
    }
    seconds = turns(steps, options.repeats, options.time)
    free()
    rates = {name: flops / min(values) for name, values in seconds.items() if name != "gemm"}
    peak = 2 * 2048**3 / min(seconds["gemm"])
    return {
        "gemm_flops_per_second": peak,
        "flops": flops,
        "flops_whole_square": whole_square,
        "flops_counted_by_torch": counted,
        "flops_per_second": rates,
        "utilisation": {name: rate / peak for name, rate in rates.items()},
    }


class UsualExperts(nn.Module):
    """The routed experts as most code writes them; the same weights, the same result."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.router = layer.router
        self.gate_up = nn.ParameterList(w.clone() for w in layer.experts.gate_up_proj.detach().unbind(0))
        self.down = nn.ParameterList(w.clone() for w in layer.experts.down_proj.detach().unbind(0))

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        routes = self.router(x_ND)
        output_ND = torch.zeros_like(x_ND)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, choice = (routes.experts_NK == expert).nonzero(as_tuple=True)
            if token.numel():
                gate, up = F.linear(x_ND[token], gate_up).chunk(2, dim=-1)
                written = F.linear(F.silu(gate) * up, down) * routes.gates_NK[token, choice].unsqueeze(-1)
                output_ND.index_add_(0, token, written)
        return output_ND


def experts_section(options: argparse.Namespace) -> dict[str, Any]:
    """The MoE layer alone."""
    rows = {}
    for n_experts, top_k, dim, expert_dim in ((16, 2, 512, 512), (64, 4, 512, 512), (256, 8, 256, 128)):
        torch.manual_seed(0)
        config = base(dim=dim, n_experts=n_experts, n_experts_per_tok=top_k, expert_dim=expert_dim)
        layer = MoELayer(config)
        usual = UsualExperts(layer)
        x_ND = torch.randn(BATCH * LENGTH, dim, requires_grad=True)

        def looped(product: GroupedProduct, layer: MoELayer = layer, x_ND: Tensor = x_ND) -> None:
            layer.experts.product = product
            with summed_gradients(expert_weights(layer)):
                output = sum(layer.routed(x_ND + t) for t in range(4))
            output.square().sum().backward()
            layer.zero_grad()

        def loop_over_experts(usual: UsualExperts = usual, x_ND: Tensor = x_ND) -> None:
            sum(usual(x_ND + t) for t in range(4)).square().sum().backward()
            usual.zero_grad()

        steps: dict[str, Step] = {
            "grouped_mm": lambda looped=looped: looped(grouped_mm),
            "loop": lambda looped=looped: looped(loop),
            "usual loop": loop_over_experts,
        }
        seconds = turns(steps, options.repeats, options.time)
        rows[f"{n_experts} experts, top {top_k}, dim {dim}, expert_dim {expert_dim}"] = {
            "seconds": {name: min(values) for name, values in seconds.items()},
            "times_faster_than_loop": ratio(seconds["loop"], seconds["grouped_mm"]),
            "times_faster_than_usual_loop": ratio(seconds["usual loop"], seconds["grouped_mm"]),
        }
    return rows


def open_mythos(folder: Path) -> ModuleType:
    """The one module of the checkout that is its model."""
    path = folder / "open_mythos" / "main.py"
    spec = importlib.util.spec_from_file_location("open_mythos_main", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def their_model(module: ModuleType, config: IceConfig) -> nn.Module:
    """OpenMythos at the sizes of ``config``; never halting, so that every loop is executed."""
    theirs: nn.Module = module.OpenMythos(
        module.MythosConfig(
            vocab_size=config.vocab_size,
            dim=config.dim,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            max_seq_len=config.max_seq_len,
            max_loop_iters=config.max_loop_iters,
            prelude_layers=config.prelude_layers,
            coda_layers=config.coda_layers,
            attn_type="gqa",
            n_experts=config.n_experts,
            n_shared_experts=0,
            n_experts_per_tok=config.n_experts_per_tok,
            expert_dim=config.expert_dim,
            act_threshold=1e9,
            lora_rank=1,
            dropout=0.0,
        )
    )
    return theirs


def openmythos_section(options: argparse.Namespace) -> dict[str, Any]:
    """Both models, the optimizer's step included."""
    if options.openmythos is None:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, folder], check=True)
            module = open_mythos(Path(folder))
    else:
        module = open_mythos(options.openmythos)
    rows = {}
    for name, config in OPENMYTHOS.items():
        torch.manual_seed(0)
        theirs, ours = their_model(module, config), IceModel(config)
        sizes = {"OpenMythos": parameters(theirs), "Ice": parameters(ours)}
        on_engine, free = engine_step(config)
        steps = {
            "OpenMythos": plain_step(theirs, config, n_loops=config.max_loop_iters),
            "Ice, plain torch": plain_step(ours, config),
            "Ice, engine": on_engine,
        }
        seconds = turns(steps, options.repeats, options.time)
        free()
        flops = training_flops(config, BATCH, LENGTH, config.max_loop_iters)
        rows[name] = {
            "parameters": sizes,
            "flops": flops,
            "tokens_per_second": {who: BATCH * LENGTH / min(values) for who, values in seconds.items()},
            "gflops_per_second": {who: flops / min(values) / 1e9 for who, values in seconds.items()},
            "times_as_fast": {
                who: ratio(seconds["OpenMythos"], seconds[who]) for who in seconds if who != "OpenMythos"
            },
        }
        del theirs, ours, steps
    return rows


def parameters(model: nn.Module) -> int:
    """Numbers that are trained, each once."""
    return sum(p.numel() for p in model.parameters())


def profile_section(options: argparse.Namespace) -> dict[str, Any]:
    """The ten operators that a step spends most time in, plain and on the engine."""
    from torch.profiler import ProfilerActivity, profile

    result: dict[str, Any] = {}
    for name, config in ({"width 1024": WIDE} | OPENMYTHOS).items():
        on_engine, free = engine_step(config)
        steps = {"plain torch": plain_step(IceModel(config), config), "engine, ZeRO-3": on_engine}
        for who, step in steps.items():
            step()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                step()
            events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
            total = sum(event.self_cpu_time_total for event in events)
            result[f"{name}, {who}"] = [
                {"operator": e.key, "share": e.self_cpu_time_total / total, "calls": e.count} for e in events[:10]
            ]
        free()
    return result


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "engine": engine_section,
    "utilisation": utilisation_section,
    "experts": experts_section,
    "openmythos": openmythos_section,
    "profile": profile_section,
}
MEASURED = ("engine", "utilisation", "experts", "openmythos")


def report(result: dict[str, Any]) -> None:
    """One table a section."""
    console = Console(width=110)
    machine = result["machine"]
    console.print(f"{machine['threads']} thread(s), {machine['clock']} seconds, torch {torch.__version__}, fp32")
    for section, content in result.items():
        if section == "machine":
            continue
        table = Table("what", "value", title=section)
        for key, value in flatten(content):
            table.add_row(key, value if isinstance(value, str) else f"{value:,.3f}" if value % 1 else f"{value:,}")
        console.print(table)


def flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """(path, leaf) of nested dictionaries and lists."""
    if isinstance(value, dict):
        return [leaf for key, child in value.items() for leaf in flatten(child, f"{name} / {key}" if name else key)]
    if isinstance(value, list):
        return [leaf for index, child in enumerate(value) for leaf in flatten(child, f"{name} / {index + 1}")]
    return [(name, value)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=MEASURED)
    parser.add_argument("--openmythos", type=Path, help="a checkout; default a fresh clone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    options = parser.parse_args()
    options.time = time.perf_counter if options.clock == "wall" else time.process_time
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    result: dict[str, Any] = {
        "machine": {"threads": options.threads, "clock": options.clock, "torch": torch.__version__}
    }
    for section in options.sections:
        result[section] = SECTIONS[section](options)
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
