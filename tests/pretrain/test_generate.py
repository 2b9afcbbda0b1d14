"""The command that writes: what streams out is the text, whatever the tokens; mistakes end in one line."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.tokenizer.bpe import END_ID, SentencePieceTokenizer, train_tokenizer
from launch.settings import BadInputError, exit_with_status
from model import IceConfig, IceModel
from pretrain import generate
from pretrain.generate import SEPARATOR, IncrementalDecoder, InOrder, generate_text, main, parse_arguments

LINES = [f"The captain of ship {number} wrote to the harbour about {number * 7} barrels." for number in range(200)]
VOCABULARY = 352


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_tokenizer(LINES, VOCABULARY))


@pytest.fixture
def run(tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch) -> IceModel:
    """A run whose model writes anything: random weights, so bytes that are no characters too."""
    torch.manual_seed(0)
    config = IceConfig(slu=True).scaled_down().model_copy(update={"vocab_size": VOCABULARY})
    model = IceModel(config).eval()
    model.head.weight.data.mul_(20)
    loaded = SimpleNamespace(config=SimpleNamespace(mean_loops=4), tokenizer=tokenizer, model=model)
    monkeypatch.setattr(generate, "load_run", lambda path: loaded)
    return model


def command(*flags: str, prompts: tuple[str, ...] = ("The captain",)) -> list[str]:
    arguments = ["--run", "runs/none", "--max-new-tokens", "20", *flags]
    for prompt in prompts:
        arguments += ["--prompt", prompt]
    return arguments


# Decoding piece by piece

# In a SentencePiece model with byte fallback the 256 bytes follow the three special tokens and the newline.
tokens = st.lists(st.integers(2, VOCABULARY - 1), max_size=30)


@given(st.one_of(tokens, st.text()))
@example("😀 é日本")
@example([0xFF + 4, 0xFF + 4, 0xE2 + 4, 0x82 + 4, 0xAC + 4])
def test_pieces_add_up_to_the_text(tokenizer: SentencePieceTokenizer, content: list[int] | str) -> None:
    ids = tokenizer.encode(content) if isinstance(content, str) else content
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.add(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
    if isinstance(content, str) and "\ufffd" not in content:
        assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


def test_a_piece_waits_for_its_character_and_for_nothing_else(tokenizer: SentencePieceTokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    ids = tokenizer.encode("a😀b")
    assert len(ids) == 6
    assert [decoder.add(token) for token in ids] == ["a", "", "", "", "😀", "b"]


def test_texts_are_written_in_order_and_as_early_as_possible() -> None:
    written: list[str] = []
    texts = InOrder(["a", "b", "c"], lambda text, loops: written.append(text))
    texts.add(0, "1", 4)
    texts.add(1, "2", 4)
    assert written == ["a", "1"]
    texts.end(1)
    assert written == ["a", "1"]
    texts.end(0)
    assert written == ["a", "1", SEPARATOR, "b", "2", SEPARATOR, "c"]
    texts.add(2, "3", 4)
    texts.add(0, "late", 4)
    assert written[-1] == "3"
    assert texts.whole() == ["a1", "b2", "c3"]


# The command


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--mode", "adaptive", "--threshold", "0.4"),
        ("--mode", "speculative", "--draft-loops", "1", "--draft-tokens", "3"),
        ("--kv-policy", "last", "--top-k", "20"),
    ],
    ids=["full", "adaptive", "speculative", "last"],
)
def test_stdout_is_the_text_and_stderr_what_it_cost(
    run: IceModel, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(*flags, prompts=("The captain", "A 😀"))
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.out == generate_text(parse_arguments(arguments)) + "\n"
    first, second = output.out.split(SEPARATOR)
    assert first.startswith("The captain")
    assert second.startswith("A 😀")
    assert len(first) > len("The captain") + 10
    pattern = r"\d+ tokens in [\d.]+ s: [\d.]+ tokens/s, mean [1-4]\.\d\d of 4 loops"
    if "speculative" in flags:
        pattern += r", \d+% of drafts accepted, [\d.]+ tokens a pass"
    assert re.fullmatch(pattern + r"\n", output.err)


def test_a_batch_is_each_prompt_alone(run: IceModel) -> None:
    prompts = ("The captain", "", "of ship 12 wrote")
    batch = generate_text(parse_arguments(command("--temperature", "0", prompts=prompts)))
    alone = [generate_text(parse_arguments(command("--temperature", "0", prompts=(prompt,)))) for prompt in prompts]
    assert batch.split(SEPARATOR) == alone


def test_text_streams_token_by_token(run: IceModel) -> None:
    pieces: list[str] = []
    reads: list[int] = []
    run.embed.register_forward_hook(lambda module, args, output: reads.append(len(pieces)))
    generate.generate_batch(parse_arguments(command()), lambda text, loops: pieces.append(text))
    assert reads[0] == 1, "the prompt alone is shown before anything is read"
    assert len(set(reads)) > 5, "pieces were not written between forwards"


def test_the_end_token_ends_the_text_and_is_not_shown(run: IceModel) -> None:
    four = generate_text(parse_arguments(command("--max-new-tokens", "4")))
    heads: list[int] = []

    def end_after_four(module: torch.nn.Module, args: object, logits_BSV: torch.Tensor) -> torch.Tensor:
        heads.append(1)
        return logits_BSV.index_fill(2, torch.tensor(END_ID), -1e9 if len(heads) <= 4 else 1e9)

    run.head.register_forward_hook(end_after_four)
    generated = generate.generate_batch(parse_arguments(command()))
    assert generated.texts == [four]
    assert generated.statistics.new_tokens == 5


def test_show_loops_marks_each_token_and_nothing_else(run: IceModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--show-loops", "--mode", "adaptive", "--threshold", "0.5")) == 0
    marked = capsys.readouterr().out
    assert "₄" in marked
    plain = re.sub("[₀₁₂₃₄₅₆₇₈₉]", "", marked)
    assert plain == generate_text(parse_arguments(command("--mode", "adaptive", "--threshold", "0.5"))) + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-new-tokens", "65"), "max_new_tokens = 65: must be at most max_output_tokens = 64"),
        (("--loops", "0"), "n_loops = 0: must be at least 1"),
        (("--temperature", "-1"), "temperature = -1.0: must be at least 0"),
        (("--kv-policy", "most"), "kv_policy = most: must be one of"),
        (("--mode", "speculative", "--kv-policy", "last"), "kv_policy = last: tokens verified together"),
        (("--mode", "speculative", "--draft-loops", "0"), "--mode speculative: draft_loops = 0: must be at least 1"),
        (("--mode", "adaptive", "--threshold", "2"), "--mode adaptive: threshold = 2.0: must be between 0 and 1"),
        (("--draft-loops", "2"), "--draft-loops 2: has no meaning with --mode full"),
        (("--mode", "adaptive", "--draft-tokens", "2"), "--draft-tokens 2: has no meaning with --mode adaptive"),
        (("--threshold", "0.5"), "--threshold 0.5: has no meaning with --mode full"),
        (("--prompt", "caf\udce9"), r"--prompt 'caf\\udce9': is not valid UTF-8"),
    ],
)
def test_mistakes_are_one_line(run: IceModel, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        generate_text(parse_arguments(command(*flags)))
    assert "\n" not in str(caught.value)


def test_a_mistake_is_one_line_on_stderr_and_status_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["generate.py", "--run", str(tmp_path), "--prompt", "x"])
    with pytest.raises(SystemExit) as left:
        exit_with_status(main)
    output = capsys.readouterr()
    assert (left.value.code, output.out) == (78, "")
    assert output.err.count("\n") == 1
    assert "not a run directory" in output.err
