"""Text from a checkpoint: ``python pretrain/generate.py --run runs/ice_tiny --prompt "It was" --loops 8``.

Loads the newest intact checkpoint's plain weights into one process; needs neither DeepSpeed nor the launcher nor the
data set. The text appears on stdout as it is found, and nothing else does; what it cost is the last line on stderr.
Several ``--prompt`` are one batch, printed one after the other. docs/generation.md has the modes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.text import Text

from data_pipeline.tokenizer.interface import Tokenizer
from launch.settings import BadInputError, exit_with_status, render_text
from model.generation import (
    FULL_DEPTH,
    Adaptive,
    Decoding,
    GenerationOptions,
    GenerationStatistics,
    Sampling,
    Speculative,
    stream,
)
from pretrain.loaded_run import load_run

SEPARATOR = "\n---\n"  # between the texts of several prompts
_INCOMPLETE = "\ufffd"  # what the tokenizer makes of bytes that are no character (yet)
_COLOURS = ("blue", "cyan", "green", "yellow", "red")  # from few loops to many
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

# Called with a piece of text and the loops its token took; None: it is not generated.
Write = Callable[[str, int | None], None]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate text from a run's newest checkpoint.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory, such as runs/ice_tiny")
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="repeated: a batch, printed in this order"
    )
    parser.add_argument("--loops", type=int, help="depth; default the trained mean")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--mode",
        choices=("full", "adaptive", "speculative"),
        default="full",
        help="every token at --loops; as deep as the depth heads say; drafted shallow and verified (same text law)",
    )
    parser.add_argument("--threshold", type=float, help="least probability that a loop is worth running; default 0.5")
    parser.add_argument("--draft-loops", type=int, help="speculative: depth of drafts; default a quarter of --loops")
    parser.add_argument("--draft-tokens", type=int, help="speculative: drafts of a round; default 4")
    parser.add_argument("--kv-policy", help="per_loop, ring or last; default what the model was configured with")
    parser.add_argument("--show-loops", action="store_true", help="mark each token with the loops it took")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = parse_arguments(arguments)
    generated = generate_batch(options, _annotated if options.show_loops else _plain)
    print(flush=True)
    print(generated.summary(), file=sys.stderr, flush=True)
    return 0


def generate_text(options: argparse.Namespace) -> str:
    """The prompt and its continuation, up to the end of the document or ``max_new_tokens``; several are separated."""
    return SEPARATOR.join(generate_batch(options).texts)


@dataclass(frozen=True)
class GeneratedTexts:
    """The prompts with their continuations and what they cost."""

    texts: list[str]
    n_loops: int
    statistics: GenerationStatistics
    seconds: float  # the prompts' reading included, the checkpoint's not

    def summary(self) -> str:
        """One line about the cost."""
        numbers = self.statistics
        line = (
            f"{numbers.new_tokens} tokens in {self.seconds:.1f} s: {numbers.new_tokens / self.seconds:.1f} tokens/s, "
            f"mean {numbers.mean_loops:.2f} of {self.n_loops} loops"
        )
        if numbers.acceptance_rate is not None:
            line += f", {numbers.acceptance_rate:.0%} of drafts accepted, {numbers.tokens_per_pass:.2f} tokens a pass"
        return line


def generate_batch(options: argparse.Namespace, write: Write = lambda piece, loops: None) -> GeneratedTexts:
    """Continue every prompt of ``options``; ``write`` is called with the texts' pieces in order, as early as possible.

    Raises:
        BadInputError: For a run, prompt or option that cannot be used.
    """
    for prompt in options.prompt:
        if not prompt.isascii() and _has_surrogates(prompt):
            raise BadInputError(f"--prompt {render_text(ascii(prompt))}: is not valid UTF-8")
    decoding = _decoding(options)
    loaded = load_run(options.run)
    tokenizer, end = loaded.tokenizer, loaded.tokenizer.end_id
    n_loops = loaded.config.mean_loops if options.loops is None else options.loops
    # A document begins after the end of another, so an empty prompt is the end token alone.
    prompts = [[end, *tokenizer.encode(prompt)] for prompt in options.prompt]
    started = time.perf_counter()
    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        tokens = stream(
            loaded.model,
            prompts,
            GenerationOptions(options.max_new_tokens, n_loops, sampling, decoding, (end,), options.kv_policy),
        )
    except ValueError as error:
        raise BadInputError(f"{options.run}: {error}") from None
    texts = InOrder(options.prompt, write)
    decoders = [IncrementalDecoder(tokenizer) for _ in prompts]
    for new in tokens:
        for row, (token, loops) in enumerate(zip(new.ids_B.tolist(), new.loops_B.tolist(), strict=True)):
            if token == end:
                texts.add(row, decoders[row].flush(), loops)
                texts.end(row)
            else:
                texts.add(row, decoders[row].add(token), loops)
    for row, decoder in enumerate(decoders):
        texts.add(row, decoder.flush(), n_loops)
        texts.end(row)
    return GeneratedTexts(texts.whole(), n_loops, tokens.statistics, time.perf_counter() - started)


def _decoding(options: argparse.Namespace) -> Decoding:
    speculative = ("speculative",)
    modes = {"threshold": ("adaptive", *speculative), "draft_loops": speculative, "draft_tokens": speculative}
    given = {name: getattr(options, name) for name in modes if getattr(options, name) is not None}
    for name, value in given.items():
        if options.mode not in modes[name]:
            flag = f"--{name.replace('_', '-')}"
            raise BadInputError(f"{flag} {value}: has no meaning with --mode {options.mode}")
    try:
        match options.mode:
            case "adaptive":
                return Adaptive(**given)
            case "speculative":
                return Speculative(**given)
            case _:
                return FULL_DEPTH
    except ValueError as error:
        raise BadInputError(f"--mode {options.mode}: {error}") from None


def _has_surrogates(text: str) -> bool:
    """Whether ``text`` has bytes of the command line that were no UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


class IncrementalDecoder:
    """Text of a growing sequence of token ids, given out once no later token can change it.

    A character may be spread over up to four byte tokens. Held back are at most the last three, as long as they decode
    to nothing but U+FFFD: they may be the beginning of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that has become certain, perhaps none."""
        self._held.append(token)
        text = self._tokenizer.decode(self._held)
        for count in range(min(3, len(self._held)), 0, -1):
            settled = self._tokenizer.decode(self._held[:-count])
            if text == settled + _INCOMPLETE * count:
                self._held = self._held[-count:]
                return settled
        self._held = []
        return text

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._tokenizer.decode(self._held), []
        return text


class InOrder:
    """Several growing texts written one after the other: the first that has not ended as it grows, later ones after."""

    def __init__(self, beginnings: Sequence[str], write: Write) -> None:
        self._write = write
        self._pieces: list[list[tuple[str, int | None]]] = [[(beginning, None)] for beginning in beginnings]
        self._ended = [False] * len(beginnings)
        self._current = 0
        self._write(beginnings[0], None)

    def add(self, row: int, text: str, loops: int) -> None:
        """Append to a text; nothing once it has ended."""
        if not text or self._ended[row]:
            return
        self._pieces[row].append((text, loops))
        if row == self._current:
            self._write(text, loops)

    def end(self, row: int) -> None:
        """The text is complete; go on with the next that is not written yet."""
        self._ended[row] = True
        while self._current < len(self._ended) - 1 and self._ended[self._current]:
            self._current += 1
            self._write(SEPARATOR, None)
            for text, loops in self._pieces[self._current]:
                self._write(text, loops)

    def whole(self) -> list[str]:
        """All texts."""
        return ["".join(text for text, _ in pieces) for pieces in self._pieces]


def _plain(text: str, loops: int | None) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _annotated(text: str, loops: int | None) -> None:
    """The text with the loops in small digits after it, coloured by them where stdout is a terminal."""
    if loops is None:
        _plain(text, loops)
        return
    colour = _COLOURS[min(loops.bit_length(), len(_COLOURS)) - 1]  # 1, 2-3, 4-7, 8-15, 16 and more
    mark = Text(text, style=colour).append(str(loops).translate(_SUBSCRIPTS), style=f"dim {colour}")
    Console(highlight=False).print(mark, end="", soft_wrap=True)
    sys.stdout.flush()


if __name__ == "__main__":
    exit_with_status(main)
