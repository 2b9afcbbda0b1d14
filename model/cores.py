"""Which core a configuration means. To add a family: a subclass of ``LoopedCore`` in a file, an entry here, a name."""

from __future__ import annotations

from model.apex_core import ApexCore
from model.config import IceConfig
from model.ice_core import IceCore
from model.loop import LoopedCore
from model.msrd import MultiScaleCore
from model.plain_core import PlainCore
from model.refine_core import RefineCore

CORES: dict[str, type[LoopedCore]] = {"ice": IceCore, "apex": ApexCore, "refine": RefineCore, "plain": PlainCore}


def build_core(config: IceConfig) -> LoopedCore | MultiScaleCore:
    """The core that ``config.core`` names; with several ``msrd_scales`` a core for each."""
    return CORES[config.core](config) if config.msrd_scales == (1,) else MultiScaleCore(config)
