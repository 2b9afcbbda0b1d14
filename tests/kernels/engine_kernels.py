"""DeepSpeed's Triton kernels where no GPU is, for the scripts beside this file; import it before anything of DeepSpeed.

DeepSpeed defines them only where Triton sees a device, and importing it costs 15 s of CPU; its kernels need neither.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from triton.backends import backends

backends["nvidia"].driver.is_active = staticmethod(lambda: True)

_found = importlib.util.find_spec("deepspeed")
assert _found is not None
assert _found.origin is not None
_folder = Path(_found.origin).parent
for _name, _path in (("deepspeed", _folder), ("deepspeed.ops", _folder / "ops")):
    _package = ModuleType(_name)
    _package.__path__ = [str(_path)]
    sys.modules[_name] = _package
