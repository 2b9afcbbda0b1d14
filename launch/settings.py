"""How every Ice command reads its settings: one JSON file, ``--set a.b=value`` overrides, pydantic models.

A mistake of the user ends in one line that names the file, the key, the value and what is accepted, and in exit
status 78, before any process group starts. Programs wrap their ``main`` in :func:`exit_with_status`.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_PREEMPTED = 75
EXIT_BAD_INPUT = 78

# Where launchers leave a process's rank: deepspeed, torchrun and our Slurm scripts, Open MPI, PMIx, MPICH.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")

SettingsT = TypeVar("SettingsT", bound=BaseModel)


class BadInputError(Exception):
    """The configuration or the data is wrong; the message is the one line the user sees. Exit status 78."""


class SettingError(ValueError):
    """One setting contradicts another; raised by model validators with the key as it is named inside its section."""

    def __init__(self, key: str, value: object, problem: str) -> None:
        super().__init__(f"{key} = {render_value(value)}: {problem}")


def render_value(value: object) -> str:
    """``value`` as JSON where that is possible, on one line of at most 80 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return render_text(text)


def render_text(text: str) -> str:
    """``text``, cut to at most 80 characters."""
    return text if len(text) <= 80 else text[:77] + "..."


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ``BadInputError`` when the file is missing, unreadable or not an object."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInputError(f"{path}: no such file; name an existing one, such as those in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        value = _parse_json(text)
    except json.JSONDecodeError as error:
        raise BadInputError(f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise BadInputError(f"{path}: holds a {type(value).__name__}; an object with sections is needed")
    return value


def _parse_json(text: str) -> Any:
    """``text`` as JSON, without the two things that Python's reader adds to it: repeated keys, and NaN and Infinity.

    Raises ``json.JSONDecodeError`` for what is not JSON, and other ``ValueError``s and ``RecursionError`` for JSON
    that cannot be used: repeated keys, not-a-number, integers of thousands of digits, bottomless nesting.
    """
    return json.loads(text, object_pairs_hook=_refuse_duplicate_keys, parse_constant=_refuse_constant)


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is written twice; keep one")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON knows; write a finite one")


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write each ``a.b=value`` of ``overrides`` into the nested ``values``, in place.

    The value is read as JSON where it is JSON (``3``, ``0.1``, ``true``, ``null``, ``[1,2]``), otherwise as a string.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise BadInputError(
                f"--set {render_text(override)}: expected section.key=value, as in --set schedule.steps=100"
            )
        try:
            value = _parse_json(text)
        except json.JSONDecodeError:
            value = text
        except (ValueError, RecursionError) as error:
            raise BadInputError(f"--set {render_text(override)}: {error}") from None
        section = values
        for depth, part in enumerate(parts[:-1]):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                name = ".".join(parts[: depth + 1])
                raise BadInputError(f"--set {render_text(override)}: {name} = {render_value(section)} is not a section")
        section[parts[-1]] = value


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings by dotted key as ``--set`` takes them, so that both ways into a configuration are one."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def load_settings(model: type[SettingsT], path: Path, overrides: Sequence[str] = ()) -> SettingsT:
    """Parse ``path`` with ``overrides`` into ``model``; every mistake becomes a one-line ``BadInputError``."""
    values = read_json_object(path)
    apply_overrides(values, overrides)
    return parse_settings(model, values, source=str(path))


def parse_settings(model: type[SettingsT], values: dict[str, Any], source: str) -> SettingsT:
    """Validate ``values`` as ``model``; ``source`` is what an error calls the place they came from.

    A check that involves several keys is a model validator raising ``SettingError``.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first, more = error.errors()[0], error.error_count() - 1
        suffix = f" (and {more} more error{'s' if more > 1 else ''})" if more else ""
        raise BadInputError(f"{source}: {_describe(first, model)}{suffix}") from None


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    location, section = _as_written(model, [str(part) for part in error["loc"]])
    key = ".".join(location) or "(whole file)"
    if error["type"] == "extra_forbidden":
        accepted = sorted(section.model_fields)
        close = difflib.get_close_matches(location[-1], accepted, n=1)
        hint = f"did you mean {close[0]}?" if close else "remove it."
        return f"{key} = {render_value(error['input'])}: unknown key; {hint} Accepted here: {', '.join(accepted)}"
    if error["type"] == "missing":
        return f"{key}: is required and missing"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _describe_kind(error, location)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        # A section's own check: its message begins with the key inside the section.
        return ".".join([*location, message])
    return f"{key} = {render_value(error['input'])}: {message[0].lower()}{message[1:]}"


def _describe_kind(error: ErrorDetails, location: Sequence[str]) -> str:
    """The key that says which of several sections this is has a value that none has, or is missing."""
    context = error["ctx"]
    key = ".".join([*location, context["discriminator"].strip("'")])
    if error["type"] == "union_tag_not_found":
        return f"{key}: is required and missing"
    accepted = context["expected_tags"].replace("'", "")
    return f"{key} = {render_value(context['tag'])}: unknown; accepted: {accepted}"


def _as_written(model: type[BaseModel], location: Sequence[str]) -> tuple[list[str], type[BaseModel]]:
    """An error's location as the user wrote it, and the section that its last part is, or would be, a key of.

    Pydantic names which of several sections it took (by the value of their discriminating key): no key of the file.
    """
    written: list[str] = []
    sections, holder = [model], model
    for part in location:
        if len(sections) > 1 and (tagged := [section for section in sections if part in _tags(section)]):
            sections = tagged
            continue
        written.append(part)
        holder = sections[0]
        field = holder.model_fields.get(part)
        if field is not None:  # else an index into a list of sections, or a key that is not accepted
            sections = list(_sections_in(field.annotation)) or sections
    return written, holder


def _tags(section: type[BaseModel]) -> set[str]:
    """The constants that the section's fields take: among them the one that tells it from its alternatives."""
    return {
        value
        for field in section.model_fields.values()
        if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
        if isinstance(value, str)
    }


def _sections_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The models that ``annotation`` mentions: in ``Section``, ``Section | None``, ``tuple[Section, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _sections_in(part)


def exit_with_status(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and leave the interpreter with its status; a ``BadInputError`` prints one line and gives 78.

    So does a command line that argparse refuses (whose own status would be 2).
    """
    status: int | str | None
    try:
        status = main()
    except SystemExit as error:
        status = EXIT_BAD_INPUT if error.code == 2 else error.code
    except BadInputError as error:
        ranks = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
        if ranks[:1] in ([], ["0"]):  # every rank finds the same mistake; one line is enough
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        status = EXIT_BAD_INPUT
    sys.exit(status)
