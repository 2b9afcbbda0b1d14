r"""MSRD, multi-scale recurrent depths: a looped core for each scale, read together.

    h^(s) = core_s(e), run max(1, ceil(T / s)) loops           s in msrd_scales = (1, 2, 4, ...), each from the same e
    z_s = w_s . norm(h^(s)) + u_s . e + b_s                     h = sum_s softmax(z)_s h^(s), for each token

The core of scale 1 thinks T steps, coarser ones fewer: they cost ``1/2 + 1/4 + ...`` more and hold weights of their
own. The gate starts even (w = u = b = 0) and sees both what each core made of the token and the token itself.

Each core is a module of its own whose whole loop is one forward, so each is a ZeRO-3 leaf: never more than one
scale's weights are gathered at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from model import remat
from model.attention import SequenceContext
from model.config import IceConfig
from model.depth import DepthPlan, FollowedDepths
from model.expert_load import ExpertLoad
from model.ice_core import IceCore
from model.loop import CoreOutput
from model.norm import RMSNorm


class ScaleFusion(nn.Module):
    """The per-token gate over K scales."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        scales = len(config.msrd_scales)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.state_weight = nn.Parameter(torch.zeros(scales, config.dim))
        self.input_weight = nn.Parameter(torch.zeros(scales, config.dim))
        self.bias = nn.Parameter(torch.zeros(scales))

    def forward(self, e_BSD: torch.Tensor, states_KBSD: torch.Tensor) -> torch.Tensor:
        """One state (B, S, D) of the K scales' states."""
        normed = self.norm(states_KBSD).float()
        scores_BSK = torch.einsum("kbsd,kd->bsk", normed, self.state_weight.float())
        scores_BSK = scores_BSK + e_BSD.float() @ self.input_weight.float().T + self.bias.float()
        gates_BSK = scores_BSK.softmax(dim=-1).to(states_KBSD.dtype)
        return torch.einsum("bsk,kbsd->bsd", gates_BSK, states_KBSD)


class MultiScaleCore(nn.Module):
    """In the place of one :class:`~model.ice_core.IceCore`: several, and the gate that fuses them."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        self.config = config
        layers = config.recurrent_layers
        self.expert_load = ExpertLoad(len(config.msrd_scales) * layers, config.n_experts)
        self.scales = nn.ModuleList(
            IceCore(config, f"core.{index}", self.expert_load, index * layers)
            for index in range(len(config.msrd_scales))
        )
        self.fusion = ScaleFusion(config)

    def set_remat(self, policy: remat.RematPolicy, offload: bool = False) -> None:
        """Choose what every scale's loops keep for the backward; see ``model/remat``."""
        for core in self.scales:
            assert isinstance(core, IceCore)
            core.set_remat(policy, offload)

    def forward(self, e_BSD: torch.Tensor, context: SequenceContext, plan: DepthPlan) -> CoreOutput:
        """Run every scale and fuse. The ponder cost is the sum over scales, residual and expert share the mean."""
        outputs: list[CoreOutput] = []
        for core, scale in zip(self.scales, self.config.msrd_scales, strict=True):
            own_plan = plan.at_scale(scale)
            if plan.controller is not None and scale > 1:
                # The finest scale, which ran first, decided how deep each token goes.
                own_plan = replace(own_plan, controller=FollowedDepths(plan.controller.loops_BS, scale))
            outputs.append(core(e_BSD, context, own_plan))
        h_BSD = self.fusion(e_BSD, torch.stack([output.h_BSD for output in outputs]))
        states = None
        if plan.read_loops:
            read = torch.stack([output.states_NBSD for output in outputs if output.states_NBSD is not None])
            states = torch.stack([self.fusion(e_BSD, read[:, depth]) for depth in range(read.shape[1])])
        return CoreOutput(
            h_BSD,
            torch.stack([output.ponder_cost for output in outputs]).sum(),
            torch.stack([output.loop_residual for output in outputs]).mean(),
            torch.stack([output.expert_share for output in outputs]).mean(),
            states,
        )
