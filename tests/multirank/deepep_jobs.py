"""A job for a rank pool: a scenario whose rows travel by (a stand-in of) DeepEP."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import fake_deep_ep
import torch
from rank_jobs import end_engine, start_engine, train_on
from scenarios import Step, Trace


def train_by_deepep(values: dict[str, Any], steps: list[Step], routing: str) -> tuple[Trace, dict[str, int]]:
    """The scenario's trace, and what was asked of DeepEP; in fp32, which the real one refuses, to compare exactly."""
    from deepspeed.module_inject import auto_ep_comm

    from pretrain import deepep_transport

    fake_deep_ep.calls.clear()
    # Not mock.patch.dict, which would also forget every module that is imported meanwhile.
    sys.modules["deep_ep"] = fake_deep_ep.module()
    try:
        with (
            mock.patch.object(auto_ep_comm, "SUPPORTED_DTYPES", (torch.float32,)),
            mock.patch.object(deepep_transport, "_DEVICES", ("cpu",)),
        ):
            engine = start_engine(values, routing)
            assert engine.stock_expert_layer is None
            assert any("DeepEP" in line for line in engine.kernels)
            trace = train_on(engine, steps, gradients=True)
            end_engine(engine)
    finally:
        del sys.modules["deep_ep"]
    return trace, dict(fake_deep_ep.calls)
