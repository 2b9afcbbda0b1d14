"""Text from a checkpoint: ``python pretrain/generate.py --run runs/ice_tiny --prompt "It was" --loops 8``.

Loads the newest intact checkpoint's plain weights into one process; needs neither DeepSpeed nor the launcher.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from launch.settings import BadInputError, exit_with_status
from pretrain.loaded_run import load_run


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate text from a run's newest checkpoint.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory, such as runs/ice_tiny")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--loops", type=int, help="depth; default the trained mean")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = parse_arguments(arguments)
    print(generate_text(options))
    return 0


def generate_text(options: argparse.Namespace) -> str:
    """The prompt and its continuation, up to the end of the document or ``max_new_tokens``."""
    loaded = load_run(options.run)
    tokenizer, end = loaded.dataset.tokenizer, loaded.dataset.manifest.end_token_id
    # A document begins after the end of another, so an empty prompt is the end token alone.
    prompt_ids = [end, *tokenizer.encode(options.prompt)]
    try:
        ids = loaded.model.generate(
            torch.tensor([prompt_ids]),
            max_new_tokens=options.max_new_tokens,
            n_loops=loaded.config.mean_loops if options.loops is None else options.loops,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            stop_token_ids=(end,),
        )
    except ValueError as error:
        raise BadInputError(f"{options.run}: {error}") from None
    generated = [token for token in ids[0].tolist()[1:] if token != end]
    return tokenizer.decode(generated)


if __name__ == "__main__":
    exit_with_status(main)
