"""A sweep's cells evaluated at several depths at test time: what a law of loss against loops is fitted to.

Training evaluates a cell at its own mean depth only. ``launch/sweep.py --evaluate 1,2,4,8`` loads the last checkpoint
of every finished cell into the plain model, in this process, as ``pretrain/evaluate.py`` does, and the rows of
``results.jsonl`` get the losses under ``by_loops``. Depths that a cell already has are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launch.settings import BadInputError
from launch.sweeping.folder import CellFolder
from launch.sweeping.results import losses_by_loops


def evaluate_cells(
    folders: Sequence[CellFolder], depths: Sequence[int], say: Callable[[str], None], done: Callable[[], None]
) -> list[str]:
    """Evaluate every finished cell of ``folders`` at ``depths``; the names of the cells that refused.

    A cell without plain weights, or with damaged ones, is reported and left out. ``done`` is called after each cell.
    """
    from pretrain.evaluate import evaluate_run

    refused = []
    for folder in folders:
        if not folder.is_finished():
            continue
        known = {int(loops) for loops in losses_by_loops(folder) or {}}
        if known >= set(depths):
            continue
        try:
            result = evaluate_run(folder.path, sorted(known | set(depths)))
        except BadInputError as error:
            refused.append(folder.cell.name)
            say(f"{folder.cell.name}: refused: {error}")
            continue
        losses = ", ".join(f"{loops}: {losses.bits_per_byte:.4f}" for loops, losses in result.by_loops.items())
        say(f"{folder.cell.name}: bits a byte by loops: {losses}")
        done()
    return refused
