"""A learned judge of quality: fastText's linear text classifier (Joulin et al. 2016, arXiv:1607.01759) for two classes.

``python data_pipeline/main.py train-classifier --positive GOOD... --negative BAD... --output MODEL`` trains it on
documents of the user's choice, as in GPT-3's, LLaMA's and DCLM's filters: good ones such as encyclopaedias or what
people voted for, bad ones from a raw crawl. ``clean.classifier = {"path": MODEL, "min_score": 0.5}`` drops what scores
below.

**Model.** A document's features are its words and pairs of words, lower case, hashed into ``2**bits`` buckets. With
``c_f`` the count of feature f and ``x_f = c_f / sqrt(sum c^2)``::

    score = sigmoid(bias + sum_f w_f x_f)

fastText averages a vector a feature and multiplies by a vector a class; with two classes that is one number a feature,
the ``w_f`` here. They are trained by AdaGrad (Duchi et al. 2011) on the log loss.

**Why not the fastText library.** With one thread it leaves nine tenths of its start values uninitialised memory
(``DenseMatrix::uniform`` fills one of ten blocks a thread), so the same examples gave other models, or "Encountered
NaN"; with more threads, they race for the weights. And its loader believes what a file says about its own sizes: a
damaged file crashes the process. Here the file is ``1 + 2**bits`` little-endian float32 (bias first), and beside it
lies ``MODEL.json``, written last, with its SHA-256.

**Cost.** About 20 MB/s a core to score. Training holds each example's features in memory, 8 bytes each.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_pipeline.clean.gopher_repetition import NgramHashes
from data_pipeline.clean.settings import ClassifierSettings
from data_pipeline.clean.words import Page
from data_pipeline.section import Section
from launch.files import sha256_of, write_atomically, write_json_atomically
from launch.settings import BadInputError, parse_settings, read_json_object

SAMPLE_CHARACTERS = 20_000
MIN_EXAMPLES = 10
HELD_OUT = 0.1

_MIX = (np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F))  # odd; one for words, one for pairs
_SMALLEST_SQUARE = 1e-8

Features = tuple[NDArray[np.int64], NDArray[np.float32]]


class TrainingSettings(Section):
    """How a model is trained."""

    bits: int = Field(default=20, ge=8, le=28)
    epochs: int = Field(default=5, ge=1)
    learning_rate: float = Field(default=0.5, gt=0)
    seed: int = Field(default=1, ge=0, lt=2**31)


class ModelDescription(Section):
    """What ``MODEL.json`` says; ``accuracy`` is over a tenth of the examples that was held out from training."""

    kind: Literal["ice quality classifier 1"] = "ice quality classifier 1"
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    training: TrainingSettings
    positive: int
    negative: int
    accuracy: float


def description_path(model: Path) -> Path:
    """Where the description of ``model`` lies."""
    return model.with_name(model.name + ".json")


def features_of(text: str, bits: int) -> Features:
    """The buckets of the features in the first 20,000 characters, int64 (n,), and their normalised counts x (n,)."""
    hashes = NgramHashes(Page(text[:SAMPLE_CHARACTERS].lower()))
    mixed = [hashes.of(n) * mix >> np.uint64(64 - bits) for n, mix in enumerate(_MIX, start=1)]
    buckets, counts = np.unique(np.concatenate(mixed), return_counts=True)
    values = counts / math.sqrt(max(float(np.square(counts).sum()), 1.0))
    return buckets.astype(np.int64), values.astype(np.float32)


def _score(weights: NDArray[np.float64] | NDArray[np.float32], features: Features) -> float:
    buckets, values = features
    logit = float(weights[0]) + float((weights[1 + buckets].astype(np.float64) * values).sum())
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))


def _fit(examples: Sequence[tuple[Features, float]], settings: TrainingSettings) -> NDArray[np.float32]:
    weights = np.zeros(1 + 2**settings.bits)
    squares = np.full(weights.size, _SMALLEST_SQUARE)
    order = list(range(len(examples)))
    generator = random.Random(settings.seed)
    for _ in range(settings.epochs):
        generator.shuffle(order)
        for index in order:
            (buckets, values), target = examples[index]
            places = np.concatenate(([0], 1 + buckets))
            gradient = (_score(weights, (buckets, values)) - target) * np.concatenate(([1.0], values))
            squares[places] += gradient**2
            weights[places] -= settings.learning_rate * gradient / np.sqrt(squares[places])
    return weights.astype("<f4")


def train_classifier(
    positive: Iterable[str], negative: Iterable[str], settings: TrainingSettings, output: Path
) -> ModelDescription:
    """Train on two kinds of texts and write ``output`` and its description.

    The result depends on which examples there are, not on their order. Raises ``BadInputError`` for fewer than 10
    different examples of a kind, and for a text that is in both.
    """
    kinds = {"positive": dict.fromkeys(positive), "negative": dict.fromkeys(negative)}
    for kind, texts in kinds.items():
        if len(texts) < MIN_EXAMPLES:
            raise BadInputError(f"--{kind}: {len(texts)} different examples; at least {MIN_EXAMPLES} are needed")
    both = kinds["positive"].keys() & kinds["negative"].keys()
    if both:
        raise BadInputError(f"--negative: {len(both)} documents are positive examples too, such as {min(both)[:60]!r}")
    examples = sorted(
        (hashlib.sha256(text.encode()).digest(), text, float(kind == "positive"))
        for kind, texts in kinds.items()
        for text in texts
    )
    ready = [(features_of(text, settings.bits), target) for _, text, target in examples]
    held_out = max(1, int(HELD_OUT * len(ready)))
    weights = _fit(ready[held_out:], settings)
    right = sum((_score(weights, features) >= 0.5) == bool(target) for features, target in ready[:held_out])
    content = weights.tobytes()
    description = ModelDescription(
        sha256=hashlib.sha256(content).hexdigest(),
        training=settings,
        positive=len(kinds["positive"]),
        negative=len(kinds["negative"]),
        accuracy=right / held_out,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        description_path(output).unlink(missing_ok=True)
        write_atomically(output, content)
        write_json_atomically(description_path(output), json.loads(description.model_dump_json()))
    except OSError as error:
        raise BadInputError(f"--output {output}: cannot be written ({error.strerror})") from None
    return description


def check_classifier(settings: ClassifierSettings) -> ModelDescription:
    """The description of a model whose file is the one that was written; ``BadInputError`` otherwise."""
    path = Path(settings.path)
    if not path.is_file() or not description_path(path).is_file():
        missing = description_path(path) if path.is_file() else path
        raise BadInputError(
            f"clean.classifier.path = {settings.path!r}: {missing.name} is missing; "
            "train a model with: python data_pipeline/main.py train-classifier"
        )
    described = description_path(path)
    description = parse_settings(ModelDescription, read_json_object(described), str(described))
    size = 4 * (1 + 2**description.training.bits)
    if path.stat().st_size != size or sha256_of(path) != description.sha256:
        raise BadInputError(f"{path}: is not the model that {described.name} describes; train it again")
    return description


@functools.lru_cache(maxsize=2)
def _load(path: str) -> tuple[NDArray[np.float32], int]:
    description = check_classifier(ClassifierSettings(path=path))
    return np.fromfile(path, dtype="<f4"), description.training.bits


def quality_score(text: str, settings: ClassifierSettings) -> float:
    """The model's probability that ``text`` is one of the positive kind, in [0, 1], to six digits."""
    weights, bits = _load(settings.path)
    return round(_score(weights, features_of(text, bits)), 6)


def read_examples(paths: Sequence[Path]) -> Iterator[str]:
    """The texts of JSON-lines files, plain or compressed."""
    from data_pipeline.inputs.readers import InputFile, read_documents

    for path in paths:
        if not path.is_file():
            raise BadInputError(f"{path}: no such file; examples are JSON lines with a text, plain or compressed")
        for document in read_documents(InputFile(path)):
            yield document.text
