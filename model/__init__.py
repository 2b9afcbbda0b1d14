"""Looped Mixture-of-Experts language models in plain PyTorch; knows nothing of engines, files or trackers."""

from model.apex import ApexModel, RefinementController
from model.config import IceConfig
from model.families import apex_base, apex_small, rrslm_1_5m, rrslm_800m
from model.looped_lm import IceModel, LoopedOutput
from model.parameters import ParameterCount, count_parameters, training_flops_per_token
from model.variants import ice_1b, ice_1t, ice_3b, ice_10b, ice_50b, ice_100b, ice_500b, ice_tiny

__all__ = [
    "ApexModel",
    "IceConfig",
    "IceModel",
    "LoopedOutput",
    "ParameterCount",
    "RefinementController",
    "apex_base",
    "apex_small",
    "count_parameters",
    "ice_1b",
    "ice_1t",
    "ice_3b",
    "ice_10b",
    "ice_50b",
    "ice_100b",
    "ice_500b",
    "ice_tiny",
    "rrslm_1_5m",
    "rrslm_800m",
    "training_flops_per_token",
]
