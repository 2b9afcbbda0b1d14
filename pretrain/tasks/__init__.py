"""Tasks with exact answers as training data: generated, split once and for all, scored by exact match.

``interface`` what a task is, ``addition`` the first one, ``dataset`` what a task has instead of a folder (vocabulary,
tokenizer, held-out problems), ``scoring`` exact-match accuracy by generation, by difficulty and loop depth. Its rows go
through the same loader as token shards: ``pretrain.data.task_rows``.

To add a task: a subclass of ``Task`` in a file of its own, and its name in ``AnyTask``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretrain.tasks.addition import Addition
from pretrain.tasks.interface import Problem, Task

# With a second task: ``Addition | Other``, and ``discriminator="kind"``.
AnyTask = Annotated[Addition, Field(description="a generated task instead of a prepared data set")]

__all__ = ["Addition", "AnyTask", "Problem", "Task"]
