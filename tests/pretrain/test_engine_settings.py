"""What is asked of DeepSpeed, before any process group exists."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from launch.settings import BadInputError, load_settings
from model import IceModel
from model.precision import PrecisionChoice, choose_precision
from pretrain.config import TrainingConfig
from pretrain.engine import deepspeed_config, fp8_choice, parameter_groups

TINY = Path(__file__).resolve().parents[2] / "configs" / "ice_tiny.json"
FP32 = PrecisionChoice("fp32", "test")


def tiny(*overrides: str) -> TrainingConfig:
    return load_settings(TrainingConfig, TINY, overrides)


def test_batch_sizes_multiply_out() -> None:
    settings = deepspeed_config(tiny("data.global_batch_size=48"), 4, FP32)
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["train_batch_size"] == 4 * 3 * settings["train_micro_batch_size_per_gpu"]


def test_only_matrices_outside_the_embedding_are_decayed() -> None:
    model = IceModel(tiny().model.scaled_down())
    decayed, rest = parameter_groups(model, tiny("optim.weight_decay=0.1").optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    untouched = {names[id(parameter)] for parameter in rest["params"]}
    assert {
        name for name in names.values() if "norm" in name or "injection" in name or name.endswith("gain")
    } <= untouched
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert any(name.endswith("experts.down_proj") for name in (names[id(p)] for p in decayed["params"]))


def test_muon_takes_hidden_matrices_and_leaves_head_embedding_and_routers() -> None:
    model = IceModel(tiny().model.scaled_down())
    muon, decayed, rest = parameter_groups(model, tiny("optim.kind=muon", "optim.muon_lr=0.03").optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in (muon, decayed, rest)) == len(names)
    assert muon["lr_ratio"] * tiny().optim.lr == pytest.approx(0.03)
    of_muon = {names[id(parameter)].rpartition("ffn.")[2] for parameter in muon["params"]}
    assert {"experts.gate_up_proj", "experts.down_proj", "shared_experts.down_proj.weight"} <= of_muon
    assert {"head.weight", "core.blocks.0.ffn.router.weight"} <= {names[id(p)] for p in decayed["params"]}
    assert "embed.weight" in {names[id(p)] for p in rest["params"]}


def test_group_limited_routing_reaches_the_engine() -> None:
    section = deepspeed_config(tiny("model.moe_n_groups=4", "model.moe_topk_groups=2"), 2, FP32)["expert_parallel"]
    assert (section["num_expert_groups"], section["num_limited_groups"]) == (4, 2)
    assert "num_expert_groups" not in deepspeed_config(tiny(), 2, FP32)["expert_parallel"]


def test_deepep_gets_a_buffer_for_the_largest_batch() -> None:
    assert "comm_backend" not in deepspeed_config(tiny(), 2, FP32)["expert_parallel"]
    config = tiny("parallel.comm_backend=deepep", "parallel.micro_batch_size=2", "eval.micro_batch_size=4")
    section = deepspeed_config(config, 2, FP32)["expert_parallel"]
    assert section["comm_backend"] == "deepep"
    assert section["comm_max_tokens_per_rank"] == 4 * config.data.sequence_length


def test_deepep_gets_a_buffer_for_rows_of_problems_longer_than_any_trained() -> None:
    source = '{"task": {"kind": "copy", "max_length": 16, "beyond": [60]}}'
    sizes = ("data.sequence_length=40", "parallel.micro_batch_size=2", "eval.micro_batch_size=4")
    config = tiny("parallel.comm_backend=deepep", "data.path=", f"data.sources=[{source}]", *sizes)
    assert config.data.longest_row == 60 + 1 + 60 + 1
    section = deepspeed_config(config, 2, FP32)["expert_parallel"]
    assert section["comm_max_tokens_per_rank"] == 4 * 122


def test_a_dense_core_asks_for_no_expert_parallelism() -> None:
    dense = tiny("model.n_experts=0", "parallel.expert_parallel_size=1")
    assert "expert_parallel" not in deepspeed_config(dense, 2, FP32)


def test_offload_and_precision_become_sections() -> None:
    config = tiny("parallel.offload_optimizer=cpu", "precision.initial_loss_scale_power=8")
    settings = deepspeed_config(config, 2, PrecisionChoice("fp16", "test"))
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert settings["fp16"]["initial_scale_power"] == 8
    assert settings["optimizer"]["params"]["torch_adam"] is False  # DeepSpeed's CPUAdam is made for offloading
    assert deepspeed_config(tiny(), 2, PrecisionChoice("bf16", "test"))["bf16"] == {"enabled": True}


def test_precision_says_why() -> None:
    assert choose_precision("bf16", "cpu").dtype is torch.bfloat16
    automatic = choose_precision("auto", "cpu")
    assert automatic.name in ("fp32", "bf16")
    assert automatic.reason


def test_a_recipe_whose_package_is_missing_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.float8", raising=False)
    with pytest.raises(BadInputError, match=r"precision.recipe = fp8_rowwise: .*pip install 'ice-pretrain\[fp8\]'"):
        fp8_choice(tiny("precision.recipe=fp8_rowwise"), "cuda", PrecisionChoice("bf16", "test"))
