"""The benchmarks are scripts, not a package: make their modules importable by the tests beside them."""

import sys
from pathlib import Path

# Last: data_pipeline.py here is a benchmark, not the package.
sys.path.append(str(Path(__file__).parent))
