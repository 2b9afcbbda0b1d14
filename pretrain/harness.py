"""A run under EleutherAI's lm-evaluation-harness: multiple choice, likelihoods and generation, at any loop depth.

``python pretrain/evaluate.py --run DIR --tasks hellaswag,lambada_openai --loops 4,8`` from the command line;
``HarnessModel`` where the harness is called as a library. Three kinds of requests, each batched by length:

    loglikelihood          log p(continuation | context), and whether greedy decoding would write it
    loglikelihood_rolling  log p(text), longer ones in windows that do not overlap in what they predict
    generate_until         the continuation up to a stop string, a number of tokens or the end of the document

A text stands behind the end token, as a document did in training. Rows of a batch are padded where no token of theirs
sees it, so a batch gives what each request alone gives (up to rounding; ``mlca_window`` excepted, docs/generation.md).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import Progress

from data_pipeline.tokenizer.interface import Tokenizer
from launch.settings import BadInputError
from model import IceModel
from model.generation import GenerationOptions, Sampling, stream
from pretrain.generate import IncrementalDecoder

LOGITS_BYTES = 1 << 30  # of a batch's logits, at most, unless one row alone has more
DEFAULT_NEW_TOKENS = 256
_GENERATION_KEYS = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"}

Item = TypeVar("Item")
Scored = tuple[float, bool]


class _Question(NamedTuple):
    """What is to be predicted after what."""

    context: list[int]
    continuation: list[int]

    def inputs(self, longest: int) -> list[int]:
        """The tokens that are read: the last one is only predicted, and what is too long is cut at the left."""
        return [*self.context, *self.continuation][:-1][-longest:]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A plain model as the harness asks one.

    Args:
        model: In evaluation mode, on any device.
        tokenizer: Its tokenizer.
        n_loops: Depth; None: the model's ``max_loop_iters``.
        batch_size: Most requests computed at once.
        seed: Of sampled generations (a task that asks for ``do_sample``).
    """

    def __init__(
        self, model: IceModel, tokenizer: Tokenizer, n_loops: int | None = None, batch_size: int = 16, seed: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        if n_loops is not None and n_loops < 1:
            raise ValueError(f"n_loops = {n_loops}: must be at least 1")
        self.model, self.text_tokenizer, self.batch_size = model, tokenizer, batch_size
        self.n_loops = model.config.max_loop_iters if n_loops is None else n_loops
        self.seed = seed
        self._device = next(model.parameters()).device
        self._said: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, and stands before each."""
        return self.text_tokenizer.end_id

    @property
    def max_length(self) -> int:
        """Most tokens that are read at once."""
        return self.model.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are told apart by."""
        return f"{self.text_tokenizer.library}, {self.text_tokenizer.vocab_size} tokens"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text behind the end token; without it when ``add_special_tokens`` is false."""
        ids = self.text_tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        questions = [_Question(context, continuation) for _, context, continuation in requests]
        scores = self._score(questions, disable_tqdm)
        for (key, _, _), score in zip(requests, scores, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log p of whole texts, each token given as many before it as fit (at least one)."""
        windows: list[_Question] = []
        counts = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.eot_token_id, self.max_length, context_len=1
            )
            own = [_Question(*make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        scores = iter(self._score(windows, disable_tqdm))
        results = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def _score(self, questions: Sequence[_Question], disable_tqdm: bool) -> list[Scored]:
        """Log p of each continuation, and whether each of its tokens is the likeliest. Errors as ``BadInputError``."""
        for question in questions:
            if len(question.continuation) > self.max_length:
                raise BadInputError(
                    f"a continuation of {len(question.continuation)} tokens: the model reads at most {self.max_length}"
                )
        row_bytes = 4 * self.model.config.vocab_size

        def most_rows(question: _Question) -> int:
            return max(1, LOGITS_BYTES // max(1, len(question.inputs(self.max_length)) * row_bytes))

        return self._in_batches(
            questions,
            lambda question: len(question.inputs(self.max_length)),
            most_rows,
            self._score_batch,
            "likelihoods",
            disable_tqdm,
        )

    @torch.no_grad()
    def _score_batch(self, questions: Sequence[_Question]) -> list[Scored]:
        inputs = [question.inputs(self.max_length) for question in questions]
        longest = max(map(len, inputs))
        # Padding lies at the right, where no token of a row sees it.
        ids_BS = torch.tensor([[*row, *[self.eot_token_id] * (longest - len(row))] for row in inputs])
        logits_BSV = self.model(ids_BS.to(self._device), self.n_loops)
        scores = []
        for question, row, logits_SV in zip(questions, inputs, logits_BSV, strict=True):
            if not question.continuation:
                scores.append((0.0, True))
                continue
            wanted = torch.tensor(question.continuation, device=logits_SV.device)
            log_p_SV = logits_SV[len(row) - len(wanted) : len(row)].float().log_softmax(dim=-1)
            total = log_p_SV.gather(-1, wanted.unsqueeze(-1)).double().sum().item()
            scores.append((total, bool((log_p_SV.argmax(dim=-1) == wanted).all())))
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its stop strings, which it does not hold."""
        results: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            wanted = _read_options(requests[numbers[0]].args[1])
            contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            texts = self._in_batches(
                contexts,
                len,
                lambda context: self.batch_size,
                partial(self._generate_batch, wanted),
                "generation",
                disable_tqdm,
            )
            for number, text in zip(numbers, texts, strict=True):
                results[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [text for text in results if text is not None]

    def _generate_batch(self, wanted: _Wanted, contexts: Sequence[list[int]]) -> list[str]:
        config = self.model.config
        most = min(wanted.new_tokens, config.max_output_tokens, config.max_seq_len - 1)
        if most < wanted.new_tokens:
            self._say_once(f"tasks ask for {wanted.new_tokens} new tokens; this model writes at most {most}")
        room = config.max_seq_len - most
        if any(len(context) > room for context in contexts):
            self._say_once(f"contexts are cut at the left to {room} tokens, so that {most} new ones fit")
        prompts = [context[-room:] for context in contexts]
        options = GenerationOptions(most, self.n_loops, wanted.sampling(self.seed), stop_token_ids=(self.eot_token_id,))
        rows = [_StoppedText(IncrementalDecoder(self.text_tokenizer), wanted.until) for _ in prompts]
        for new in stream(self.model, prompts, options):
            for row, token in zip(rows, new.ids_B.tolist(), strict=True):
                row.add(token, self.eot_token_id)
            if all(row.ended for row in rows):
                break
        return [row.finish() for row in rows]

    def _in_batches(
        self,
        items: Sequence[Item],
        length: Callable[[Item], int],
        most_rows: Callable[[Item], int],
        compute: Callable[[Sequence[Item]], list[Any]],
        name: str,
        disable_tqdm: bool,
    ) -> list[Any]:
        """``compute`` over batches of items of like length, longest first; its results in the items' order."""
        order = sorted(range(len(items)), key=lambda number: -length(items[number]))
        results: list[Any] = [None] * len(items)
        with Progress(transient=True, disable=disable_tqdm or not sys.stdout.isatty()) as progress:
            bar = progress.add_task(f"{name} at {self.n_loops} loops", total=len(items))
            start = 0
            while start < len(order):
                rows = min(self.batch_size, most_rows(items[order[start]]))
                batch = order[start : start + rows]
                for number, result in zip(batch, compute([items[number] for number in batch]), strict=True):
                    results[number] = result
                start += rows
                progress.advance(bar, len(batch))
        return results

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            logging.getLogger(__name__).warning(line)


class _Wanted(NamedTuple):
    """A task's ``generation_kwargs``, understood."""

    until: tuple[str, ...]
    new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None

    def sampling(self, seed: int) -> Sampling:
        """How tokens are drawn; temperature 0 is greedy."""
        return Sampling(self.temperature, self.top_k, self.top_p, seed)


def _read_options(given: dict[str, Any]) -> _Wanted:
    unknown = sorted(set(given) - _GENERATION_KEYS)
    if unknown:
        raise BadInputError(
            f"generation_kwargs: {unknown[0]} = {given[unknown[0]]!r}: is not known; accepted: "
            f"{', '.join(sorted(_GENERATION_KEYS))}"
        )
    until = given.get("until") or ()
    new_tokens = given.get("max_gen_toks") or given.get("max_new_tokens") or DEFAULT_NEW_TOKENS
    # As in the harness: a temperature without do_sample means nothing.
    temperature = float(given.get("temperature", 1.0)) if given.get("do_sample") else 0.0
    stops = (until,) if isinstance(until, str) else tuple(until)
    return _Wanted(
        tuple(stop for stop in stops if stop), int(new_tokens), temperature, given.get("top_k"), given.get("top_p")
    )


class _StoppedText:
    """A growing text that ends at the first stop string, or at the end token."""

    def __init__(self, decoder: IncrementalDecoder, until: Sequence[str]) -> None:
        self.ended = False
        self._decoder, self._until, self._text = decoder, until, ""

    def add(self, token: int, end: int) -> None:
        """One more token; nothing once the text has ended."""
        if self.ended:
            return
        if token == end:
            self.ended = True
        else:
            self._text += self._decoder.add(token)
            self.ended = any(stop in self._text for stop in self._until)

    def finish(self) -> str:
        """The text before the first stop string."""
        text = self._text + self._decoder.flush()
        places = [place for place in (text.find(stop) for stop in self._until) if place >= 0]
        return text[: min(places)] if places else text


class HarnessOptions(NamedTuple):
    """What is evaluated, beside the model."""

    tasks: Sequence[str]
    include_path: Path | None = None  # a folder of task files
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16
    seed: int = 0


def evaluate_tasks(
    model: IceModel, tokenizer: Tokenizer, depths: Iterable[int], options: HarnessOptions
) -> dict[int, dict[str, dict[str, Any]]]:
    """The harness's results by depth, then by task, then by metric.

    Raises ``BadInputError`` for a task that is not known or whose data is not there.
    """
    manager = _task_manager(options)
    results: dict[int, dict[str, dict[str, Any]]] = {}
    for depth in depths:
        found = simple_evaluate(
            model=HarnessModel(model, tokenizer, depth, options.batch_size, options.seed),
            tasks=list(options.tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=manager,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
            log_samples=False,
            bootstrap_iters=1000,
        )
        assert found is not None
        results[depth] = {name: dict(numbers) for name, numbers in found["results"].items()}
    return results


def _task_manager(options: HarnessOptions) -> TaskManager:
    """Who knows the tasks; the harness's own, some 15,000 files, are looked through only where one is asked for."""
    manager = None
    if options.include_path is not None:
        if not options.include_path.is_dir():
            raise BadInputError(f"--task-path {options.include_path}: no such folder")
        manager = TaskManager(include_path=str(options.include_path), include_defaults=False)
    if manager is None or not set(options.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if manager is None else str(options.include_path))
    for task in options.tasks:
        if task not in set(manager.all_tasks):
            raise BadInputError(f"--tasks {task}: is no task of lm-evaluation-harness, nor in --task-path")
    return manager


def metrics_of(numbers: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Name, value and standard error of each metric in a task's results."""
    for key, value in numbers.items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = numbers.get(f"{name}_stderr,{filter_name}")
        label = name if filter_name == "none" else f"{name} ({filter_name})"
        yield label, float(value), float(error) if isinstance(error, int | float) else None
