r"""How strongly the whole loop, not only its linear part, carries a disturbance on: its measured gain.

    h_(t+1) = f(h_t),   J = df/dh at h_t,   gain = spectral radius of J, by power iteration

``rho(A) < 1`` bounds the linear part; the blocks add their own Jacobian. A gain below 1 at the last state means that
the loop contracts there and more loops settle; above 1, that further loops go on moving. The power iteration multiplies
by J^T (one backward each), which has the same spectral radius, and takes the geometric mean of the growth over the
latter half of the iterations: J is not symmetric, and for a leading complex pair single factors oscillate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from model.loop import LoopedCore
from model.looped_lm import IceModel


def measured_gain(model: IceModel, input_ids: torch.Tensor, n_loops: int, iterations: int = 40) -> list[float]:
    """The gain of each core (one for each MSRD scale) after its share of ``n_loops``, on ``input_ids`` (B, S).

    What carries over from earlier loops besides the state (MoDA's history, cached experts) is held fixed. The model is
    evaluated in evaluation mode and left in its own.
    """
    cores = [module for module in model.modules() if isinstance(module, LoopedCore)]
    calls: dict[int, tuple[Any, ...]] = {}
    originals = [core._step for core in cores]
    was_training = model.training
    model.eval()
    try:
        for index, (core, original) in enumerate(zip(cores, originals, strict=True)):
            core._step = _remembering(original, calls, index)  # type: ignore[method-assign]
        with torch.no_grad():
            model(input_ids, n_loops)
        return [
            _spectral_radius(core, step, calls[index], iterations)
            for index, (core, step) in enumerate(zip(cores, originals, strict=True))
        ]
    finally:
        for core in cores:
            del core._step  # the class's own method shows again
        model.train(was_training)


def _remembering(step: Callable[..., Any], calls: dict[int, tuple[Any, ...]], index: int) -> Callable[..., Any]:
    def remember(*args: Any) -> Any:
        calls[index] = args  # of the last loop when the forward is over
        return step(*args)

    return remember


def _spectral_radius(core: LoopedCore, step: Callable[..., Any], args: tuple[Any, ...], iterations: int) -> float:
    with torch.no_grad():
        h_BSD, carries = step(*args)
    rest = (core.moving(carries), *args[2:-1], args[-1] + 1)
    with torch.enable_grad():
        h_BSD = h_BSD.detach().requires_grad_()
        next_BSD, _ = step(h_BSD, *rest)
        generator = torch.Generator(h_BSD.device).manual_seed(0)
        vector = torch.randn(h_BSD.shape, generator=generator, device=h_BSD.device, dtype=h_BSD.dtype)
        growth = []
        for _ in range(iterations):
            vector = vector / vector.norm()
            (vector,) = torch.autograd.grad(next_BSD, h_BSD, vector, retain_graph=True)
            growth.append(math.log(max(vector.norm().item(), 1e-30)))
    latter = growth[iterations // 2 :]
    return math.exp(sum(latter) / len(latter))
