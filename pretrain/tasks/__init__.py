"""Tasks with exact answers as training data: generated, split once and for all, scored by exact match.

``interface`` what a task is; ``addition``, ``p_hop``, ``mano``, ``parity``, ``copying``, ``sudoku`` one each
(``strings`` what two of them share); ``dataset`` what a task has instead of a folder (vocabulary, tokenizer, held-out
problems); ``scoring`` exact-match accuracy by generation, by difficulty and loop depth. Its rows go through the same
loader as token shards: ``pretrain.data.task_rows``.

To add a task: a subclass of ``Task`` in a file of its own, and its name in ``AnyTask``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretrain.tasks.addition import Addition
from pretrain.tasks.copying import Copy
from pretrain.tasks.interface import Problem, Task
from pretrain.tasks.mano import Mano
from pretrain.tasks.p_hop import PHop
from pretrain.tasks.parity import Parity
from pretrain.tasks.sudoku import Sudoku

AnyTask = Annotated[
    Addition | Copy | Mano | Parity | PHop | Sudoku,
    Field(discriminator="kind", description="a generated task instead of a prepared data set"),
]

__all__ = ["Addition", "AnyTask", "Copy", "Mano", "PHop", "Parity", "Problem", "Sudoku", "Task"]
