"""Fixed seeds, and the slow references importable by the tests beside them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        yield
