"""launch/settings.py: every mistake in a settings file or on a command line is one clear line and status 78."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from launch.settings import (
    EXIT_BAD_INPUT,
    EXIT_PREEMPTED,
    BadInputError,
    apply_overrides,
    exit_with_status,
    load_settings,
    parse_settings,
    read_json_object,
    render_value,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Optim(Section):
    lr: float = Field(0.1, gt=0)
    kind: Literal["adamw", "sgd"] = "adamw"


class Schedule(Section):
    steps: int = 10
    warmup_steps: int = 1

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps}: must be below steps = {self.steps}")
        return self


class Source(Section):
    path: str
    pattern: str = "*"


class Settings(Section):
    name: str
    optim: Optim = Optim()
    schedule: Schedule | None = None
    sources: tuple[Source, ...] = ()
    extra: Annotated[Source, Field(description="annotated")] | None = None


def problem_of(values: dict[str, Any]) -> str:
    with pytest.raises(BadInputError) as caught:
        parse_settings(Settings, values, source="run.json")
    message = str(caught.value)
    assert message.startswith("run.json: ")
    assert "\n" not in message
    return message


def test_a_good_file_with_overrides_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"name": "a", "optim": {"lr": 0.5}}')
    settings = load_settings(Settings, path, ["optim.lr=0.25", "schedule.steps=7", "name=b=c"])
    assert settings.optim.lr == 0.25
    assert settings.schedule is not None
    assert settings.schedule.steps == 7
    assert settings.name == "b=c"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "line 1, column 2: not JSON"),
        (b'{\n "a": 1,\n}', "line 3, column 1: not JSON"),
        (b"", "line 1, column 1: not JSON"),
        (b"[1]", "holds a list"),
        (b'{"a": {"b": 1, "b": 2}}', "key 'b' is written twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digit"),
        (b'{"a": ' + b"[" * 100_000, "recursion"),
        (b"\xff\xfe{}", "cannot be read as UTF-8"),
    ],
)
def test_a_broken_file_is_one_line_with_its_name(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such file"):
        read_json_object(tmp_path / "absent.json")
    with pytest.raises(BadInputError, match="cannot be read"):
        read_json_object(tmp_path)


def test_an_unknown_key_gets_the_nearest_known_one() -> None:
    message = problem_of({"name": "a", "optim": {"l_r": 1}})
    assert "optim.l_r = 1: unknown key; did you mean lr? Accepted here: kind, lr" in message


def test_an_unknown_key_like_no_other_is_to_be_removed() -> None:
    assert "zzz = 1: unknown key; remove it. Accepted here: extra, name, " in problem_of({"name": "a", "zzz": 1})


@pytest.mark.parametrize(
    ("values", "accepted"),
    [
        ({"schedule": {"stepz": 1}}, "steps, warmup_steps"),
        ({"sources": [{"path": "x"}, {"path": "x", "patern": 1}]}, "path, pattern"),
        ({"extra": {"path": "x", "patern": 1}}, "path, pattern"),
    ],
)
def test_accepted_keys_are_those_of_the_section_also_when_optional_or_in_a_list(
    values: dict[str, Any], accepted: str
) -> None:
    assert problem_of({"name": "a", **values}).endswith(f"Accepted here: {accepted}")


def test_a_missing_key_is_named() -> None:
    assert problem_of({}) == "run.json: name: is required and missing"


def test_a_wrong_value_says_what_is_accepted() -> None:
    assert "optim.lr = -1: input should be greater than 0" in problem_of({"name": "a", "optim": {"lr": -1}})
    assert "'adamw' or 'sgd'" in problem_of({"name": "a", "optim": {"kind": "adam"}})


def test_a_check_of_several_keys_names_the_key_in_its_section() -> None:
    message = problem_of({"name": "a", "schedule": {"steps": 1, "warmup_steps": 2}})
    assert message == "run.json: schedule.warmup_steps = 2: must be below steps = 1"


def test_further_errors_are_counted() -> None:
    assert "(and 1 more error)" in problem_of({"optim": {"lr": -1}})
    assert "(and 2 more errors)" in problem_of({"optim": {"lr": -1}, "zzz": 1})


@pytest.mark.parametrize("override", ["", "=", "lr", "=3", ".a=1", "a.=1", "a..b=1"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(BadInputError, match=r"expected section\.key=value"):
        apply_overrides({}, [override])


def test_an_override_into_something_that_is_no_section_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"optim\.lr = 3 is not a section"):
        apply_overrides({"optim": {"lr": 3}}, ["optim.lr.x=1"])


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "NaN", "1" * 5000, "[" * 100_000])
def test_an_override_with_unusable_json_is_one_short_line(text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        apply_overrides({}, [f"optim.lr={text}"])
    assert len(str(caught.value)) < 400


def test_a_long_value_is_cut() -> None:
    assert len(render_value("x" * 1000)) == 80
    assert render_value(object()).startswith("<object")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(json_values)
def test_an_override_that_is_json_arrives_as_that_value(value: Any) -> None:
    values: dict[str, Any] = {}
    apply_overrides(values, [f"a.b={json.dumps(value)}"])
    assert values == {"a": {"b": value}}


@given(st.text())
def test_any_other_override_arrives_as_its_text_or_is_refused(text: str) -> None:
    values: dict[str, Any] = {}
    try:
        apply_overrides(values, [f"a={text}"])
    except BadInputError:
        assert any(name in text for name in ("NaN", "Infinity")) or "{" in text
    else:
        assert values["a"] == text or json.loads(text) == values["a"]
        assert not (isinstance(values["a"], float) and math.isnan(values["a"]))


def leave(main: Callable[[], int]) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        exit_with_status(main)
    return caught.value.code


def raise_bad_input() -> int:
    raise BadInputError("run.json: lr = 1:\n  too\tbig")


def test_status_of_a_program_is_what_its_main_returned() -> None:
    assert leave(lambda: EXIT_PREEMPTED) == EXIT_PREEMPTED


def test_bad_input_prints_one_line_and_gives_78(capfd: pytest.CaptureFixture[str]) -> None:
    assert leave(raise_bad_input) == EXIT_BAD_INPUT
    captured = capfd.readouterr()
    assert captured.err == "error: run.json: lr = 1: too big\n"
    assert captured.out == ""


def test_only_the_first_rank_prints_what_all_found(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert leave(raise_bad_input) == EXIT_BAD_INPUT
    assert capfd.readouterr().err == ""


def test_a_command_line_that_argparse_refuses_gives_78_and_help_gives_0(capfd: pytest.CaptureFixture[str]) -> None:
    def main(arguments: list[str]) -> int:
        argparse.ArgumentParser().parse_args(arguments)
        return 1

    assert leave(lambda: main(["--no-such-flag"])) == EXIT_BAD_INPUT
    assert "unrecognized arguments" in capfd.readouterr().err
    assert leave(lambda: main(["--help"])) == 0


def test_another_exception_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_with_status(lambda: 1 // 0)
