"""Exact match by generation: a problem is solved when greedy decoding writes its whole answer and then the end token.

    accuracy = solved / problems                          by difficulty, on held-out problems, at one loop depth
    loops used                                            of the positions that write the answer, where the core counts
                                                          them (core = refine), by difficulty

Nothing of the answer is given: the model reads the prompt and continues it alone, token by token, through its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from model import IceModel
from pretrain.tasks.dataset import TaskDataset
from pretrain.tasks.interface import Problem

BATCH = 256


@dataclass(frozen=True)
class Score:
    """How problems of one difficulty went."""

    problems: int
    solved: int
    loops_used: float | None  # mean over the positions that write answers; None: the core does not count

    @property
    def accuracy(self) -> float:
        """The share of problems solved."""
        return self.solved / self.problems


def exact_match(
    model: IceModel,
    dataset: TaskDataset,
    problems: Sequence[Problem],
    n_loops: int | None = None,
    watch: Callable[[list[list[Problem]]], Iterable[list[Problem]]] = iter,
) -> dict[str, Score]:
    """Scores by difficulty at ``n_loops``; ``model`` in evaluation mode, on any device.

    ``watch`` gives back the batches one by one: where progress can be shown.
    """
    solved: dict[str, list[bool]] = {}
    used: dict[str, list[float]] = {}
    for batch in watch(_same_length(problems)):
        prompts = [[dataset.end_token_id, *dataset.tokenizer.encode(problem.prompt)] for problem in batch]
        wanted = [[*dataset.tokenizer.encode(problem.answer), dataset.end_token_id] for problem in batch]
        ids_BS = torch.tensor(prompts, device=next(model.parameters()).device)
        longest = max(map(len, wanted))
        written = model.generate(ids_BS, longest, n_loops, temperature=0.0, stop_token_ids=(dataset.end_token_id,))[
            :, ids_BS.shape[1] :
        ].tolist()
        loops = _loops_of_answers(model, ids_BS, wanted, n_loops)
        for row, (problem, answer) in enumerate(zip(batch, wanted, strict=True)):
            solved.setdefault(problem.difficulty, []).append(written[row][: len(answer)] == answer)
            if loops is not None:
                used.setdefault(problem.difficulty, []).append(loops[row])
    return {
        name: Score(len(solved[name]), sum(solved[name]), sum(used[name]) / len(used[name]) if name in used else None)
        for name in dataset.domains
        if name in solved
    }


@torch.no_grad()
def _loops_of_answers(
    model: IceModel, prompts_BS: torch.Tensor, answers: Sequence[Sequence[int]], n_loops: int | None
) -> list[float] | None:
    """Mean loops of the positions that predict each answer's tokens, in a forward of prompt and right answer."""
    longest = max(map(len, answers))
    padded = torch.tensor([[*answer, *([answer[-1]] * (longest - len(answer)))] for answer in answers])
    ids_BS = torch.cat((prompts_BS, padded.to(prompts_BS.device)), dim=1)[:, :-1]
    output = model(ids_BS, n_loops, return_output=True)
    if output.loops_used_BS is None:
        return None
    first = prompts_BS.shape[1] - 1
    loops = output.loops_used_BS[:, first:].float().tolist()
    return [sum(row[: len(answer)]) / len(answer) for row, answer in zip(loops, answers, strict=True)]


def _same_length(problems: Iterable[Problem]) -> list[list[Problem]]:
    """The problems in batches of prompts of one length, so that none is padded."""
    by_length: dict[int, list[Problem]] = {}
    for problem in problems:
        by_length.setdefault(len(problem.prompt), []).append(problem)
    return [group[start : start + BATCH] for group in by_length.values() for start in range(0, len(group), BATCH)]
