"""What someone with transformers and without this package does; run as ``python -I elsewhere.py FOLDER``.

``FOLDER/jobs.pt`` says which exported folders to load and what to ask them; the answers go to ``FOLDER/answers.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


class Absent:
    """Our packages are not there, whatever this environment has installed."""

    ours = frozenset({"model", "pretrain", "launch", "data_pipeline"})

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in self.ours:
            raise ModuleNotFoundError(f"{name} is not there", name=name)


sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]

import torch  # noqa: E402  (after the packages were hidden)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()


@torch.no_grad()
def answer(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """What the model in ``folder`` says."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    ids, padded, loops = job["ids"], job["padded"], job["loops"]
    mask = (torch.arange(padded.shape[1]) >= job["padding"].view(-1, 1)).long()
    greedy: dict[str, Any] = {"max_new_tokens": job["new"], "do_sample": False}
    with torch.enable_grad():
        loss = model(ids, labels=ids, n_loops=loops).loss
        loss.backward()
    return {
        "troubles": {name: list(value) for name, value in info.items() if value},
        "logits": model(ids).logits,
        "deeper": model(ids, n_loops=loops).logits,
        "loss": loss.detach(),
        "gradient": model.get_input_embeddings().weight.grad.clone(),
        "greedy": model.generate(ids, **greedy),
        "greedy_deeper": model.generate(ids, n_loops=loops, **greedy),
        "padded": model.generate(padded, attention_mask=mask, **greedy),
        "uncached": model.generate(ids, use_cache=False, **greedy),
        "beams": model.generate(padded, attention_mask=mask, num_beams=2, **greedy) if job["beams"] else None,
        "beams_uncached": model.generate(padded, attention_mask=mask, num_beams=2, use_cache=False, **greedy)
        if job["beams"]
        else None,
        "right_padded": model(padded.flip(1), attention_mask=mask.flip(1)).logits,
    }


def half_precision(folder: str, ids: torch.Tensor) -> dict[str, Any]:
    """The model in bf16: which types its parts have."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    with torch.no_grad():
        return {
            "logits": model(ids).logits.float(),
            "weights": {str(weight.dtype) for weight in model.parameters()},
            "biases": {str(buffer.dtype) for buffer in model.buffers()},
        }


def tokenise(folder: str, texts: list[str]) -> dict[str, Any]:
    """What the tokenizer makes of ``texts``."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return {
        "fast": tokenizer.is_fast,
        "ids": ids,
        "first": [tokenizer(text).input_ids[0] for text in texts],
        "texts": [tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) for text in texts],
    }


def main() -> None:
    """Answer every job."""
    place = Path(sys.argv[1])
    jobs = torch.load(place / "jobs.pt", weights_only=True)
    answers: dict[str, Any] = {name: answer(job["folder"], job) for name, job in jobs["models"].items()}
    first = next(iter(jobs["models"].values()))
    answers["half"] = half_precision(first["folder"], first["ids"])
    answers["tokenizer"] = tokenise(jobs["tokenizer"]["folder"], jobs["tokenizer"]["texts"])
    answers["loaded"] = sorted(name for name in sys.modules if name.split(".")[0] in Absent.ours)
    torch.save(answers, place / "answers.pt")


main()
