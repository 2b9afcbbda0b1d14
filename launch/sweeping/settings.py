"""What a sweep's file says: a base configuration, and the axes of a grid.

    {
      "name": "ice_small",
      "config": "configs/ice_tiny.json",
      "set": {"optim.lr": 0.002},
      "sizes": {"d64": {"model.dim": 64, "model.ffn_dim": 176}, "d128": {}},
      "flops": [1e12, 3e12],
      "mean_loops": [1, 2, 4, 8],
      "seeds": [0]
    }

A size is a name and the settings that make it. ``flops`` are levels of an isoFLOP study: each cell of a level trains on
as many tokens as its training FLOPs pay for. ``tokens`` gives every cell the same instead. With neither, a cell trains
for the configuration's own ``schedule.steps``. A ``comparison`` in place of configuration and sizes trains the members
of ``configs/baselines/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from launch.comparison import Name, Settings
from launch.settings import SettingError

# What the sweep itself decides for each cell.
OWN_KEYS = ("run.name", "run.dir", "run.seed", "logging.wandb_group", "logging.wandb_id", "logging.annotations")


class SweepSettings(BaseModel):
    """A grid over one base configuration, and how its cells are run. The sweep lives in ``dir/name``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Name
    dir: str = "runs"
    config: str = Field("", description="the base configuration's file")
    comparison: str | None = Field(None, description="instead of config, set and sizes: see launch/comparison.py")
    set: Settings = Field(default_factory=dict, description="settings of every cell, as --set section.key=value")
    sizes: dict[Name, Settings] = Field(default_factory=dict)
    tokens: tuple[PositiveInt, ...] = ()
    flops: tuple[PositiveFloat, ...] = Field((), description="training FLOPs of a cell: forward and backward")
    mean_loops: tuple[PositiveInt, ...] = Field(
        (), description="also model.max_loop_iters; draws up to twice that; none keeps the configuration's depth"
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((0,), min_length=1)
    warmup_fraction: float | None = Field(None, ge=0, lt=1, description="of a cell's steps; null keeps warmup_steps")
    tolerance: float = Field(0.02, gt=0, description="by which whole steps may miss a cell's tokens or FLOPs")

    ranks: PositiveInt = Field(1, description="processes of a cell")
    parallel: PositiveInt = Field(1, description="cells at once")
    retries: int = Field(2, ge=0, description="ends of a cell in a row that may come without a newer checkpoint")

    @property
    def path(self) -> Path:
        """The sweep's folder; the cells' run directories are in it."""
        return Path(self.dir) / self.name

    @model_validator(mode="after")
    def _axes_agree(self) -> SweepSettings:
        if self.comparison is not None:
            for key in ("config", "set", "sizes", "tokens", "flops", "mean_loops", "warmup_fraction"):
                if getattr(self, key):
                    raise SettingError(key, getattr(self, key), "the comparison decides it; remove it, or comparison")
        else:
            for key in ("config", "sizes"):
                if not getattr(self, key):
                    raise SettingError(key, getattr(self, key), "is needed, or comparison in its place")
        if self.tokens and self.flops:
            raise SettingError("flops", list(self.flops), "FLOPs decide the tokens; give tokens or flops, not both")
        for axis in ("tokens", "flops", "mean_loops", "seeds"):
            values: tuple[Any, ...] = getattr(self, axis)
            for value in values:
                if values.count(value) > 1:
                    raise SettingError(axis, list(values), f"has {value:g} twice; keep one")
        named = {"set": self.set, **{f"sizes.{name}": size for name, size in self.sizes.items()}}
        for place, chosen in named.items():
            for key in chosen:
                if key in OWN_KEYS:
                    raise SettingError(f"{place}.{key}", chosen[key], "the sweep decides it for each cell; remove it")
        return self
