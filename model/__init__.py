"""Looped Mixture-of-Experts language models in plain PyTorch; knows nothing of engines, files or trackers."""

from model.config import IceConfig
from model.looped_lm import IceModel, LoopedOutput
from model.parameters import ParameterCount, count_parameters, training_flops_per_token
from model.variants import ice_1b, ice_1t, ice_3b, ice_10b, ice_50b, ice_100b, ice_500b, ice_tiny

__all__ = [
    "IceConfig",
    "IceModel",
    "LoopedOutput",
    "ParameterCount",
    "count_parameters",
    "ice_1b",
    "ice_1t",
    "ice_3b",
    "ice_10b",
    "ice_50b",
    "ice_100b",
    "ice_500b",
    "ice_tiny",
    "training_flops_per_token",
]
