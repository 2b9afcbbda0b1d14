"""Texts that tokenizers and encoders get wrong, and the checks made with them.

A tokenizer must give every text back (lossless), must not make special ids of text that looks like a special token, and
its byte lengths must add up. Encoders must agree on these texts; see ``engine.py``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from data_pipeline.inputs.readers import InputFile, read_documents
from data_pipeline.tokenizer.interface import Tokenizer
from launch.settings import BadInputError, render_text

SAMPLE_FILES = 32
SAMPLE_CHARACTERS = 1_000_000
RANDOM_TEXTS = 200

AWKWARD = (
    "",
    " ",
    "  leading and trailing  ",
    "a\0b\x01\x7f\x85",
    "\r\n\r\n\t\v\f \u00a0\u2003\u3000",
    "\ufeffbyte order mark\u2028\u2029\u200b\u200d\u00ad",
    "\u2581\u2581 x\u2581 \u2581",
    "\u2585 \u2047 \ufffd \uffff \U0010ffff \ue000",
    "e\u0301 \u1100\u1161\u11a8 \u212b \ufb01 \uff21\uff11 \u0130 \u1e9e",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇬🇧 日本語テキスト العربية हिन्दी ไทย 한국어",
    "<0x0A><0xFF><unk><pad><mask><s></s>[INST] <<SYS>> <|endoftext|><|im_start|><|begin_of_text|>",
    "0123456789 1,234,567.89e-10 ١٢٣ ½ ²",
    "don't DON'T we'll I've 'tis camelCase snake_case kebab-case",
    "def f(x):\n    return {\n\t'a': x ** 2,\n    }\n\n\n# end\n",
    "http://example.org/a?b=c&d=%20#e C:\\path\\to\\file $x_{i}^2$ <b>bold</b> &amp;",
)
RUNS = ("a", " ", "\n", "\t", "ab", " a", "=", "0", "é", "日", "😀", "\u2581", " \n", "the ", "</s>")
RUN_LENGTHS = (2, 3, 7, 64, 1001)


def adversarial_texts(tokenizer: Tokenizer) -> list[str]:
    """Awkward texts, the same on every machine: listed ones, long runs, random ones of the tokenizer's own parts."""
    generator = random.Random(0)
    texts = [*AWKWARD, *(part * length for part in RUNS for length in RUN_LENGTHS)]
    specials = tokenizer.special_spellings
    texts += [
        f"{before}{special}{after}" for special in specials for before, after in (("", ""), ("x ", " y"), ("<", ">"))
    ]
    characters = [*" \n\t\r\0\u2581<|/>'.,0123456789", *"etaoinshrdlu", *"éß日本😀\u0301\u200d", *AWKWARD, *specials]
    pieces = [tokenizer.decode([generator.randrange(tokenizer.vocab_size)]) for _ in range(RANDOM_TEXTS)]
    for number in range(RANDOM_TEXTS):
        length = generator.randrange(1, 60)
        texts.append("".join(generator.choices(characters if number % 2 else pieces, k=length)))
        texts.append("".join(chr(_scalar_value(generator)) for _ in range(length)))
    return texts


def _scalar_value(generator: random.Random) -> int:
    """A code point that UTF-8 can hold, from every length of encoding equally often."""
    value = generator.randrange(*generator.choice([(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0x10000, 0x110000)]))
    return value


def sample_texts(files: Sequence[InputFile]) -> list[str]:
    """About a megabyte of real documents, from the beginnings of up to 32 files that are spread over all."""
    chosen = [
        files[index * len(files) // min(len(files), SAMPLE_FILES)] for index in range(min(len(files), SAMPLE_FILES))
    ]
    texts = []
    for file in chosen:
        texts += list(_beginning(file, SAMPLE_CHARACTERS // len(chosen)))
    return texts


def _beginning(file: InputFile, characters: int) -> Iterator[str]:
    for document in read_documents(file):
        yield document.text
        characters -= len(document.text)
        if characters <= 0:
            return


def check_tokenizer(tokenizer: Tokenizer, name: str, allow_lossy: bool) -> str | None:
    """What the tokenizer loses, as one line, or None when it gives every text back.

    Raises ``BadInputError`` when text can become special ids, and, unless ``allow_lossy``, when anything is lost.
    """
    texts = adversarial_texts(tokenizer)
    lengths, specials = tokenizer.byte_lengths(), tokenizer.special_ids
    lost: list[str] = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if tokenizer.end_id in ids:
            raise BadInputError(
                f"{name}: makes its end token of the text {render_text(repr(text))}: a document could end itself; "
                "use another tokenizer"
            )
        if not specials.isdisjoint(ids):
            lost.append(f"{render_text(repr(text))} becomes the special ids {sorted(specials.intersection(ids))}")
        elif tokenizer.decode(ids) != text:
            lost.append(f"{render_text(repr(text))} comes back as {render_text(repr(tokenizer.decode(ids)))}")
        elif int(lengths[ids].sum()) != len(text.encode()):
            lost.append(f"{render_text(repr(text))} has not the size of its tokens")
    if not lost:
        return None
    problem = f"{lost[0]}, and {len(lost) - 1} more of {len(texts)} texts" if len(lost) > 1 else lost[0]
    if not allow_lossy:
        raise BadInputError(
            f"{name}: does not give every text back: {problem}; use another tokenizer, or accept the loss with "
            "tokenizer.allow_lossy = true"
        )
    return problem
