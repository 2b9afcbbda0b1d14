"""What must hold on a GPU, each as a function of the device: outcomes beside this machine's CPU, in float64 or fp32.

Every check also runs on the CPU (``test_checks.py``), in a size that costs nothing, so that what is carried to the one
GPU of an afternoon has run before. Not a pytest file by name: ``run_all.py`` runs it where a GPU is, and says so where
none is, which a skipped test would not.

A check returns figures for the table and raises ``AssertionError`` with both values when something is off. ``Size``
scales it: ``TINY`` for the CPU, ``REAL`` for a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model import IceConfig, IceModel
from model.attention import Memory, SequenceContext, attention_mask, causal_attention, rope_tables
from model.attention.flex import block_mask, probe
from model.attention.joint_softmax import joint_attention, written_out
from model.depth import DepthPlan
from model.expert_parallel import set_expert_product
from model.fp8.conversion import convert
from model.fp8.products import Emulated, Kernels
from model.fp8.recipe import RECIPES, RecipeName, choose_kernels
from model.grouped_product import grouped_mm, loop
from model.megablocks import megablocks
from model.moe import Choice, plan_dispatch
from model.precision import choose_precision
from model.token_loss import chunked_token_losses, token_losses

Figures = dict[str, float | str]


class Size(NamedTuple):
    """How large the models and matrices are."""

    dim: int
    experts: int
    tokens: int
    vocabulary: int
    loops: int


TINY = Size(dim=64, experts=4, tokens=32, vocabulary=256, loops=3)
REAL = Size(dim=1024, experts=64, tokens=2048, vocabulary=32000, loops=8)

STRUCTURES: dict[str, dict[str, Any]] = {
    "gqa": {"qk_norm": True},
    "gqa, sliding window": {"sliding_window": 16, "full_attention_every": 2},
    "mla": {"attn_type": "mla", "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32},
    "moda": {"attn_type": "moda_v2", "n_kv_heads": 4, "moda_history_window": 2},
    "every idea": {"msrd_scales": (1, 2), "act": True, "aec": True, "lora_rank": 8, "sandwich_norm": True},
}


def config_of(size: Size, **fields: Any) -> IceConfig:
    """A small looped MoE model with the widths of ``size``."""
    values: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "dim": size.dim,
        "max_seq_len": max(size.tokens, 64),
        "prelude_layers": 1,
        "coda_layers": 1,
        "max_loop_iters": size.loops,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 2 * size.dim,
        "n_experts": size.experts,
        "n_experts_per_tok": 2,
        "expert_dim": size.dim,
    }
    return IceConfig.model_validate(values | fields)


def twins(config: IceConfig, device: torch.device, dtype: torch.dtype) -> tuple[IceModel, IceModel]:
    """One model on the CPU in fp32, and the same on ``device`` in ``dtype`` (selection biases stay fp32)."""
    torch.manual_seed(0)
    reference = IceModel(config)
    model = IceModel(config)
    model.load_state_dict(reference.state_dict())
    return reference, model.to(device=device, dtype=dtype)


def ids_of(config: IceConfig, tokens: int) -> Tensor:
    """Two rows of ids, the same on every device."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size, (2, tokens // 2 + 1), generator=generator)


def step(model: IceModel, ids: Tensor, loops: int, **options: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients (on the CPU, fp32) of one step."""
    device = next(model.parameters()).device
    ids = ids.to(device)
    model.zero_grad(set_to_none=True)
    output = model(ids[:, :-1], loops, targets=ids[:, 1:], return_output=True, **options)
    loss = output.losses_BS.mean() + 0.01 * output.ponder_cost
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """``||got - expected|| / ||expected||`` over all gradients."""
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    difference = sum(float((got[name] - expected[name]).double().square().sum()) for name in expected)
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in expected.values()))


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Fp32 products in fp32, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronised_seconds(device: torch.device, function: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call, the fastest of ``repeats`` after one to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    function()
    best = math.inf
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        function()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def what_is_there(device: torch.device, size: Size) -> Figures:
    """The device, what its libraries are, and what ``precision.dtype = "auto"`` makes of it."""
    choice = choose_precision("auto", device.type)
    figures: Figures = {"torch": torch.__version__, "auto": f"{choice.name} ({choice.reason})"}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        figures |= {
            "device": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "GiB": round(total / 2**30, 1),
            "GiB free": round(free / 2**30, 1),
        }
    return figures


def fp32_is_the_cpus(device: torch.device, size: Size) -> Figures:
    """Loss and gradients of every kind of attention and idea, in fp32, beside the CPU's."""
    figures: Figures = {}
    with exact_fp32():
        for name, fields in STRUCTURES.items():
            config = config_of(size._replace(dim=min(size.dim, 256), tokens=min(size.tokens, 256)), **fields)
            reference, model = twins(config, device, torch.float32)
            ids = ids_of(config, min(size.tokens, 256))
            expected_loss, expected = step(reference, ids, size.loops)
            loss, gradients = step(model, ids, size.loops)
            assert math.isclose(loss, expected_loss, rel_tol=1e-4), f"{name}: loss {loss}, on the CPU {expected_loss}"
            figures[name] = distance(gradients, expected)
            # A token whose two best experts tie to rounding goes elsewhere: some gradients may differ in a few rows.
            assert figures[name] < 1e-2, f"{name}: gradients off by {figures[name]:.2e}"
    return figures


def bf16_is_near_fp32(device: torch.device, size: Size) -> Figures:
    """The loss of a step in bf16 beside fp32's on the same device."""
    figures: Figures = {}
    for name, fields in STRUCTURES.items():
        config = config_of(size, **fields)
        reference, model = twins(config, device, torch.bfloat16)
        reference.to(device)
        ids = ids_of(config, size.tokens)
        (expected, _), (loss, gradients) = step(reference, ids, size.loops), step(model, ids, size.loops)
        figures[name] = abs(loss - expected) / expected
        assert figures[name] < 0.02, f"{name}: loss {loss} in bf16, {expected} in fp32"
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values()), f"{name}: gradients"
    return figures


def every_policy_gives_the_same_bits(device: torch.device, size: Size) -> Figures:
    """Gradients under each recomputation policy, offloaded or not; and the peak memory of each."""
    config = config_of(size, n_experts_per_tok=2)
    _, model = twins(config, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    ids, figures = ids_of(config, size.tokens), Figures()
    expected: dict[str, Tensor] | None = None
    for policy, offload in (
        ("none", False),
        ("loop", False),
        ("routes", False),
        ("dispatch", False),
        ("sqrt", False),
        ("loop", True),
        ("sqrt", True),
    ):
        model.set_remat(policy, None, offload)  # type: ignore[arg-type]
        name = f"{policy}, offloaded" if offload else policy
        step(model, ids, 2 * size.loops)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _, gradients = step(model, ids, 2 * size.loops)
        if device.type == "cuda":
            figures[f"{name}, MiB"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
        expected = gradients if expected is None else expected
        for parameter, gradient in gradients.items():
            assert torch.equal(gradient, expected[parameter]), f"{name}: {parameter}"
    return figures


def experts_are_multiplied_right(device: torch.device, size: Size) -> Figures:
    """The grouped product beside one product an expert: values, and how much faster a step of the layer is."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = config_of(size)
    _, model = twins(config, device, dtype)
    layer = model.core.blocks[0].ffn
    x_BSD = torch.randn(2, size.tokens, size.dim, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    outcomes, seconds = [], []
    for product in (grouped_mm, loop):
        set_expert_product(model, product)

        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            output: Tensor = layer(x_BSD)
            output.square().mean().backward()
            return output.detach()

        output = run()
        outcomes.append((output, layer.experts.gate_up_proj.grad.clone(), layer.experts.down_proj.grad.clone()))
        seconds.append(synchronised_seconds(device, run, 3))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    worst = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(*outcomes, strict=True))
    assert worst < tolerance, f"grouped product off by {worst:.2e}"
    return {"difference": worst, "times faster than a loop over experts": round(seconds[1] / seconds[0], 2)}


def rows_are_moved_right(device: torch.device, size: Size) -> Figures:
    """Dispatch and gated sum by what ``row_moves = auto`` chooses here, beside their definition in float64."""
    from pretrain.row_moves import choose_moves, torch_moves  # DeepSpeed's import takes seconds

    choice = choose_moves("auto", device.type)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(6)
    scores_NE = torch.rand(size.tokens, size.experts, generator=generator).to(device)
    experts_NK = scores_NE.topk(2).indices
    counts_E = torch.bincount(experts_NK.flatten(), minlength=size.experts)
    plan = plan_dispatch(Choice(experts_NK, counts_E), 1 if device.type == "cpu" else 8)
    x_ND = torch.randn(size.tokens, size.dim, generator=generator).to(device, dtype).requires_grad_()
    gates_NK = torch.rand(size.tokens, 2, generator=generator).to(device).requires_grad_()
    factor_ND = torch.randn(size.tokens, size.dim, generator=generator).to(device, dtype)

    def moved(moves: Any) -> tuple[Tensor, ...]:
        y_ND = moves.combine(2 * moves.dispatch(x_ND, plan), plan, gates_NK)
        return (y_ND, *torch.autograd.grad(y_ND, (x_ND, gates_NK), factor_ND))

    x, gates, factor = x_ND.detach().double(), gates_NK.detach().double(), factor_ND.double()
    total = gates.sum(1, keepdim=True)
    by_definition = (2 * x * total, 2 * factor * total, (2 * x * factor).sum(1, keepdim=True).expand(-1, 2))
    found = moved(choice.moves)
    worst = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, by_definition, strict=True))
    assert worst < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"rows moved by {choice.reason} are off by {worst:.2e}"
    seconds = [synchronised_seconds(device, lambda m=moves: moved(m), 3) for moves in (choice.moves, torch_moves)]
    return {"by": choice.reason, "difference": worst, "times torch's speed": round(seconds[1] / seconds[0], 2)}


def every_attention_has_a_kernel(device: torch.device, size: Size) -> Figures:
    """Which of torch's attention operators each kind runs, forward; beyond a window, by blocks where that is chosen."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures: Figures = {}
    for name, fields in STRUCTURES.items():
        config = config_of(size._replace(dim=min(size.dim, 512)), **fields)
        _, model = twins(config, device, dtype)
        ids = ids_of(config, size.tokens)[:, :-1].to(device)
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(ids, 2)
        prefix = "aten::_scaled_dot_product_"
        keys = (event.key for event in profile.key_averages())
        kernels = sorted(key.removeprefix(prefix) for key in keys if key.startswith(prefix))
        assert kernels, f"{name}: no attention operator ran"
        figures[name] = ", ".join(kernels)
    return figures


def joint_softmax_is_the_written_out(device: torch.device, size: Size) -> Figures:
    """MoDA's softmax over a sequence and a position's own keys, with and without a mask, beside its definition."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(7)
    length = min(size.tokens, 512)

    def heads(count: int) -> Tensor:
        return torch.randn(2, count, length, 64, generator=generator).to(device, dtype)

    inputs = [heads(4), heads(2), heads(2), heads(2), heads(2)]
    factor, figures = heads(4), Figures()
    window = attention_mask(length, Memory((inputs[1],)), window=length // 2)
    for name, mask in (("causal", None), ("window", window)):
        found = []
        for attend, kind in ((joint_attention, dtype), (written_out, torch.float64)):
            q, k, v, *own = (x.to(kind).requires_grad_() for x in inputs)
            out = attend(q, k, v, tuple(own), 0.125, None if mask is None else mask.to(kind))
            found.append((out, *torch.autograd.grad(out, (q, k, v, *own), factor.to(kind))))
        worst = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
        assert worst < (3e-2 if dtype == torch.bfloat16 else 1e-4), f"{name}: joint softmax off by {worst:.2e}"
        figures[name] = worst
    return figures


def windows_are_attended_by_blocks(device: torch.device, size: Size) -> Figures:
    """``flex_attention`` beside the mask written out, as a run probes it; and how much faster a long sequence is."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures: Figures = {}
    for name, widths in (("gqa", (128, 128)), ("mla", (192, 128))):
        why_not = probe(device, dtype, *widths)
        assert device.type == "cpu" or why_not is None, f"{name}: {why_not}"
        figures[name] = why_not or "agrees with SDPA, forward and backward"
    if device.type == "cuda":
        length, window = 8192, 1024
        q, k, v = (torch.randn(1, heads, length, 128, device=device, dtype=dtype) for heads in (8, 2, 2))
        blocks = block_mask(length, device, window)
        written = attention_mask(length, Memory((k,)), window)
        seconds = [
            synchronised_seconds(device, lambda m=mask: causal_attention(q, k, v, 0.1, m), 5)
            for mask in (written, blocks)
        ]
        figures["8,192 tokens, window 1,024: times SDPA's speed"] = round(seconds[0] / seconds[1], 2)
    return figures


def loops_run_as_a_cuda_graph(device: torch.device, size: Size) -> Figures:
    """Forward and backward of the core, captured once and replayed on other inputs; on CPUs, run twice."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures: Figures = {}
    for name, fields in {"dense": {"n_experts": 0}, "experts on one rank": {}}.items():
        config = config_of(size._replace(dim=min(size.dim, 512)), **fields)
        _, model = twins(config, device, dtype)
        core = model.core
        core.expert_load.enabled = False  # a count in a graph would not add up from replay to replay
        length = min(size.tokens, 256)
        context = SequenceContext(rope_tables(config, 0, length, device))
        generator = torch.Generator().manual_seed(8)
        first, second = (torch.randn(2, length, config.dim, generator=generator).to(device, dtype) for _ in range(2))
        e_BSD = first.clone().requires_grad_()
        weights = [p for p in core.parameters() if p.requires_grad]

        def run(core: Any = core, e: Tensor = e_BSD, context: Any = context, weights: Any = weights) -> list[Tensor]:
            h_BSD = core(e, context, DepthPlan(size.loops)).h_BSD
            gradients = torch.autograd.grad(h_BSD.float().square().mean(), (e, *weights), allow_unused=True)
            return [h_BSD.detach(), *(gradient for gradient in gradients if gradient is not None)]

        captured = _captured(device, run)
        with torch.no_grad():
            e_BSD.copy_(second)
        replayed = [tensor.clone() for tensor in captured()]
        expected = run()
        assert all(map(torch.equal, replayed, expected)), f"{name}: the replay differs"
        eager, graph = (synchronised_seconds(device, function, 5) for function in (run, captured))
        figures[f"{name}, times eager's speed"] = round(eager / graph, 2)
    return figures


def _captured(device: torch.device, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return outcome

    return replay


def host_copies_hide_behind_loops(device: torch.device, size: Size) -> Figures:
    """A step with loop states in host memory beside one without: the time it takes longer, and the memory it frees."""
    config = config_of(size)
    _, model = twins(config, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    ids, figures, seconds = ids_of(config, 2 * size.tokens), Figures(), []
    for offload in (False, True):
        model.set_remat("loop", None, offload)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds.append(synchronised_seconds(device, lambda: step(model, ids, 2 * size.loops), 3))
        if device.type == "cuda":
            name = "offloaded, MiB" if offload else "kept, MiB"
            figures[name] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    assert min(seconds) > 0
    return figures | {"times the step's time": round(seconds[1] / seconds[0], 3)}


def megablocks_products_are_the_default_ones(device: torch.device, size: Size) -> Figures:
    """MegaBlocks' products beside grouped_mm, where its packages are; on CPUs they need Triton's interpreter."""
    try:
        product = megablocks()
    except ModuleNotFoundError as error:
        return {"not installed": str(error)}
    if device.type == "cpu":
        return {"not run": "tests/kernels compares them under Triton's interpreter"}
    generator = torch.Generator().manual_seed(9)
    rows, weight = torch.randn(1024, size.dim, generator=generator), torch.randn(4, 512, size.dim, generator=generator)
    ends = torch.tensor([256, 256, 640, 1024], dtype=torch.int32, device=device)
    found = []
    for multiply in (product, grouped_mm):
        inputs = [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in (rows, weight)]
        output = multiply(*inputs, ends)
        found.append((output, *torch.autograd.grad(output.float().square().sum(), inputs)))
    worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*found, strict=True))
    assert worst < 2e-2, f"MegaBlocks' products off by {worst:.2e}"
    return {"difference": worst}


def chunked_loss_is_the_whole_one(device: torch.device, size: Size) -> Figures:
    """Losses and gradients with and without whole logits, and what each takes at its peak."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(size.vocabulary, size.dim, generator=generator).mul(size.dim**-0.5).to(device, dtype)
    x = torch.randn(1, 2 * size.tokens, size.dim, generator=generator).to(device, dtype)
    targets = torch.randint(0, size.vocabulary, (1, 2 * size.tokens), generator=generator).to(device)
    found, figures = [], Figures()
    for name, losses_of in (
        ("whole", lambda x, w: token_losses(x @ w.T, targets)),
        ("chunked", lambda x, w: chunked_token_losses(x, w, targets, max(size.tokens // 8, 1))),
    ):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        losses = losses_of(*inputs)
        losses.mean().backward()
        if device.type == "cuda":
            figures[f"{name}, MiB"] = round((torch.cuda.max_memory_allocated(device) - before) / 2**20)
        found.append((losses.detach(), *(tensor.grad for tensor in inputs)))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*found, strict=True))
    assert worst < tolerance, f"chunked loss off by {worst:.2e}"
    return figures | {"difference": worst}


def fp8_kernels_are_the_emulated_ones(device: torch.device, size: Size) -> Figures:
    """Each recipe's products beside the emulation's, dense and grouped, forward and backward; and the speed of one."""
    figures: Figures = {}
    dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(4)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows, weight, gradient = (
        matrix(size.tokens, size.dim),
        matrix(2 * size.dim, size.dim),
        matrix(size.tokens, 2 * size.dim),
    )
    experts = matrix(size.experts, 2 * size.dim, size.dim)
    for name, recipe in RECIPES.items():
        choice = choose_kernels(name, device.type, dtype)  # type: ignore[arg-type]
        assert choice is not None
        figures[name] = choice.reason
        kernels, emulated = choice.kernels, Emulated(recipe)
        pairs = [
            (k.product(rows, weight), k.input_gradient(gradient, weight), *_grouped(k, rows, gradient, experts))
            for k in (kernels, emulated)
        ]
        worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*pairs, strict=True))
        assert worst < 1e-2, f"{name}: products off by {worst:.2e} ({choice.reason})"
        figures[f"{name}, difference"] = worst
        eight = synchronised_seconds(device, lambda k=kernels: k.product(rows, weight), 5)
        high = synchronised_seconds(device, lambda: rows @ weight.T, 5)
        figures[f"{name}, times bf16's speed"] = round(high / eight, 2)
    return figures


def _grouped(kernels: Kernels, rows: Tensor, gradient: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    share = rows.shape[0] // len(experts) // max(kernels.row_alignment, 1) * max(kernels.row_alignment, 1)
    share = max(share, kernels.row_alignment, 1)
    used = min(rows.shape[0] // share, len(experts))
    ends = torch.arange(1, len(experts) + 1, device=rows.device).clamp_max(used).mul(share).int()
    last = int(ends[-1])
    return (
        kernels.grouped_product(rows[:last], experts, ends),
        kernels.grouped_input_gradient(gradient[:last], experts, ends),
    )


def a_model_learns_in_every_recipe(device: torch.device, size: Size) -> Figures:
    """Thirty steps of AdamW on one batch: the loss falls, with FP8 as without."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    recipes: tuple[RecipeName, ...] = ("bf16", "fp8_rowwise", "fp8_blockwise")
    figures: Figures = {}
    steps = 30 if device.type == "cuda" else 6
    for recipe in recipes:
        config = config_of(size._replace(dim=min(size.dim, 256)))
        _, model = twins(config, device, dtype)
        choice = choose_kernels(recipe, device.type, dtype)
        if choice is not None:
            convert(model, config, choice.kernels, ())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = ids_of(config, min(size.tokens, 256))
        first = last = math.nan
        for number in range(steps):
            last, _ = step(model, ids, size.loops)
            first = last if number == 0 else first
            optimizer.step()
        assert last < 0.97 * first, f"{recipe}: loss {first} became {last}"
        figures[recipe] = f"{first:.3f} to {last:.3f}"
    return figures


def decoding_is_the_full_forward(device: torch.device, size: Size) -> Figures:
    """Greedy text with a cache beside the forward's own choices, for every kind of attention."""
    figures: Figures = {}
    with exact_fp32():
        for name, fields in STRUCTURES.items():
            config = config_of(size._replace(dim=min(size.dim, 256)), max_output_tokens=16, **fields)
            torch.manual_seed(5)
            model = IceModel(config).to(device).eval()
            prompt = ids_of(config, 24)[:, :12].to(device)
            text = model.generate(prompt, max_new_tokens=8, n_loops=size.loops, temperature=0.0)
            with torch.no_grad():
                logits_BSV = model(text[:, :-1], size.loops)[:, 11:]
            chosen = logits_BSV.gather(-1, text[:, 12:].unsqueeze(-1)).squeeze(-1)
            short = float((logits_BSV.amax(-1) - chosen).max())
            assert short < 1e-3, f"{name}: a chosen token is {short:.1e} below the best"
            figures[name] = short
    return figures


def rates(device: torch.device, size: Size) -> Figures:
    """A step's model FLOPs beside the machine's matrix products in the same dtype."""
    from model.parameters import training_flops_per_token

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = 8192 if device.type == "cuda" else 128
    square = torch.randn(side, side, device=device, dtype=dtype)
    gemm = 2 * side**3 / synchronised_seconds(device, lambda: square @ square, 5)
    config = config_of(size)
    _, model = twins(config, device, dtype)
    model.set_loss_chunk(1024)
    ids = ids_of(config, 2 * size.tokens)
    tokens = ids.numel() - len(ids)
    seconds = synchronised_seconds(device, lambda: step(model, ids, size.loops), 3)
    flops = training_flops_per_token(config, size.loops, context=tokens // len(ids)) * tokens / seconds
    assert flops > 0
    return {
        "matrix product, TFLOP/s": round(gemm / 1e12, 2),
        "step, TFLOP/s": round(flops / 1e12, 3),
        "utilisation of it": f"{100 * flops / gemm:.0f}%",
        "tokens/s": round(tokens / seconds),
    }


CHECKS: tuple[Callable[[torch.device, Size], Figures], ...] = (
    what_is_there,
    fp32_is_the_cpus,
    bf16_is_near_fp32,
    every_policy_gives_the_same_bits,
    experts_are_multiplied_right,
    rows_are_moved_right,
    every_attention_has_a_kernel,
    joint_softmax_is_the_written_out,
    windows_are_attended_by_blocks,
    loops_run_as_a_cuda_graph,
    host_copies_hide_behind_loops,
    megablocks_products_are_the_default_ones,
    chunked_loss_is_the_whole_one,
    fp8_kernels_are_the_emulated_ones,
    a_model_learns_in_every_recipe,
    decoding_is_the_full_forward,
    rates,
)
