"""A few training steps, twice: by the engine on its ranks, and by plain torch in one process.

The reference knows nothing of engines: ``IceModel``, autograd over the whole global batch, ``clip_grad_norm_``,
``torch.optim.AdamW``, and balancing written out. Both return a :class:`Trace`, which tests compare.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

VOCABULARY, LENGTH, BATCH = 96, 16, 8

# eps is large: Adam divides by the gradient's size, and the rounding of a gradient near zero must not become a step.
BASE: dict[str, Any] = {
    "run": {"seed": 7},
    "model": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "max_seq_len": LENGTH,
        "max_output_tokens": LENGTH,
        "prelude_layers": 1,
        "recurrent_layers": 2,
        "coda_layers": 1,
        "max_loop_iters": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 64,
        "n_experts": 8,
        "n_experts_per_tok": 2,
        "expert_dim": 16,
        "tie_embeddings": True,
    },
    "data": {"path": "unused", "sequence_length": LENGTH, "global_batch_size": BATCH},
    "optim": {"lr": 0.01, "grad_clip": 0.1, "eps": 1e-4, "expert_bias_update_rate": 0.01},
    "schedule": {"steps": 10, "warmup_steps": 0},
    "loop": {"remat": "none"},
    "precision": {"dtype": "fp32"},
    "parallel": {"zero_stage": 3, "expert_parallel_size": 1, "micro_batch_size": 1, "loss_chunk_tokens": None},
}

ROUTINGS = ("ordinary", "experts_without_tokens", "all_tokens_to_one_expert")


def settings(routing: str = "ordinary", **sections: dict[str, Any]) -> dict[str, Any]:
    """``BASE`` with some sections' keys replaced."""
    values = copy.deepcopy(BASE)
    if routing == "all_tokens_to_one_expert":
        # One choice a token; its gate stays the score, since a normalised gate of one expert is 1 with no gradient.
        values["model"].update(n_experts_per_tok=1, route_norm=False)
    for name, keys in sections.items():
        values[name].update(keys)
    return values


def selection_bias(routing: str, n_experts: int) -> Tensor:
    """A bias that forces ``routing``; scores lie in (0, 1)."""
    bias = torch.linspace(-0.05, 0.05, n_experts)  # not zero: it must steer the choice and never the gate
    if routing == "experts_without_tokens":
        bias[[1, 2, 6, 7]] = -10.0  # with 4 ranks and EP = 4, the last rank has no token at all
    if routing == "all_tokens_to_one_expert":
        bias[5] = 10.0
    return bias


@dataclass(frozen=True)
class Step:
    """Depth of one optimizer step."""

    loops: int
    grad_loops: int | None = None
    shallow: int = 1

    def reads(self, config: Any) -> dict[str, Any]:
        """The other depths that contrastive depth learning and the depth heads look at."""
        contrast = {"read_loops": (self.shallow,)} if config.loop.cdl is not None else {}
        probed = config.model.slu or config.model.core == "apex"
        return contrast | ({"probe_loop": self.shallow} if probed else {})


@dataclass
class Trace:
    """What happened: per step, and at the end. Names are the plain model's; logits are of the first step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    logits: Tensor | None = None  # (BATCH, LENGTH, VOCABULARY)
    weights: dict[str, Tensor] = field(default_factory=dict)
    weight_steps: int = 0
    skipped: list[int] = field(default_factory=list)


def tokens_of_step(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the whole global batch."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def orthogonalised(model: Any) -> dict[str, Any]:
    """The matrices Muon updates, by name: of attention, feed-forwards and experts, without routers."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.dim() >= 2 and (".attention." in name or ".ffn." in name) and ".router." not in name
    }


@torch.no_grad()
def muon_step(name: str, parameter: Any, momentum: Tensor, optim: Any) -> None:
    """Jordan et al. 2024, in float64; an expert's gate and up are two matrices, as the engine keeps them."""
    momentum.lerp_(parameter.grad, 1 - optim.muon_momentum)
    ahead = parameter.grad.lerp(momentum, optim.muon_momentum).double()
    parts = ahead.chunk(2, dim=1) if name.endswith("experts.gate_up_proj") else (ahead,)
    parameter.mul_(1 - optim.muon_lr * optim.muon_weight_decay)
    parameter.sub_(optim.muon_lr * torch.cat([newton_schulz(part) for part in parts], dim=-2).to(parameter))


def newton_schulz(matrices: Tensor) -> Tensor:
    """Five steps of the quintic iteration on each matrix, and the scale of its shape."""
    rows, columns = matrices.shape[-2:]
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x * max(1.0, rows / columns) ** 0.5


def reference(values: dict[str, Any], steps: list[Step], routing: str = "ordinary") -> Trace:
    """The steps in this process: one whole batch, one backward, no engine."""
    from launch.settings import parse_settings
    from model import IceModel
    from model.expert_parallel import routed_layers
    from model.fp8 import choose_kernels, convert
    from model.init import decays
    from pretrain.config import TrainingConfig
    from pretrain.losses import training_objective

    config = parse_settings(TrainingConfig, values, "scenario")
    torch.manual_seed(config.run.seed)
    model = IceModel(config.model)
    fp8 = choose_kernels(config.precision.recipe, "cpu", torch.float32)
    if fp8 is not None:
        convert(model, config.model, fp8.kernels, config.precision.fp8_exclude)
    routers = [layer.router for layer in routed_layers(model)]
    for router in routers:
        router.e_score_correction_bias.copy_(selection_bias(routing, config.model.n_experts))
    optim = config.optim
    matrices = orthogonalised(model) if optim.kind == "muon" else {}
    rest = [(n, p) for n, p in model.named_parameters() if n not in matrices]
    groups = [
        {"params": [p for n, p in rest if decays(n, p)], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in rest if not decays(n, p)], "weight_decay": 0.0},
    ]
    momenta = {n: torch.zeros_like(p) for n, p in matrices.items()}
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    trace = Trace(weight_steps=len(steps))
    for number, step in enumerate(steps):
        inputs, targets = tokens_of_step(number)
        # Contrastive depth learning weighs tokens against their micro-batch; every other loss is a mean over tokens.
        size = config.parallel.micro_batch_size if config.loop.cdl is not None else BATCH
        options = {"grad_loops": step.grad_loops, "return_output": True, **step.reads(config)}
        parts = zip(inputs.split(size), targets.split(size), strict=True)
        outputs = [model(part, step.loops, targets=wanted, **options) for part, wanted in parts]
        logits = torch.cat([output.logits for output in outputs])
        objectives = [
            training_objective(output, part, config) for output, part in zip(outputs, targets.split(size), strict=True)
        ]
        by_hand = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(torch.stack([o.terms["loss"] for o in objectives]).mean(), by_hand.detach())
        loss = torch.stack([objective.total for objective in objectives]).mean()
        model.zero_grad()
        loss.backward()
        if number == 0:
            trace.logits = logits.detach()
        trace.losses.append(loss.item())
        for parameter in model.parameters():
            if parameter.grad is None:  # out of this step's reach; the engine sees zeros, and Adam's momentum goes on
                parameter.grad = torch.zeros_like(parameter)
        trace.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)))
        adam.step()
        for name, parameter in matrices.items():
            muon_step(name, parameter, momenta[name], optim)
        load = model.core.expert_load.take()
        trace.loads.append(load if config.model.n_experts else torch.empty(0))
        for layer, router in enumerate(routers):
            counts = load[:, layer].sum(0).double()
            router.e_score_correction_bias += optim.expert_bias_update_rate * torch.sign(counts.mean() - counts).float()
    trace.weights = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "head.weight" or not config.model.tie_embeddings
    }
    return trace
