"""Any JSON is a manifest or one line that says what is wrong with it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.dataset.manifest import Manifest, fingerprint_of
from data_pipeline.dataset.reader import open_dataset, read_manifest
from launch.settings import BadInputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["", ".", "..", "a/../../b", "/etc/passwd", "\0", "a\\b", "train/shard_00000.bin", "ü\n", "x" * 300]
)
WRONG = JSON | NAMES | st.sampled_from([-1, 0, 2**63, 2**70, "0" * 64, "A" * 64])


@pytest.fixture(scope="module")
def values(
    made_stage: Path, tmp_path_factory: pytest.TempPathFactory, publish_to: Callable[..., Path]
) -> dict[str, Any]:
    folder = publish_to(made_stage, tmp_path_factory.mktemp("fuzz") / "out")
    loaded: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return loaded


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    result = copy.copy(value)
    result[path[0]] = replaced(value[path[0]], path[1:], new)
    return result


def opens_or_is_bad_input(content: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(content.encode())
        try:
            manifest = read_manifest(Path(folder))
        except BadInputError:
            return
        assert isinstance(manifest, Manifest)
        with pytest.raises(BadInputError):  # there are no files
            open_dataset(folder)


@settings(max_examples=80)
@given(JSON)
def test_any_json_is_a_manifest_or_a_bad_input(value: Any) -> None:
    opens_or_is_bad_input(json.dumps(value))


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_manifest_with_anything_anywhere_is_a_manifest_or_a_bad_input(
    values: dict[str, Any], data: st.DataObject
) -> None:
    place = data.draw(st.sampled_from(places(values)))
    changed = replaced(values, place, data.draw(WRONG))
    if data.draw(st.booleans()) and isinstance(changed, dict):
        try:  # past the fingerprint, as a forger would go
            changed["fingerprint"] = fingerprint_of(changed)
        except (KeyError, TypeError, AttributeError, ValueError):
            return
    opens_or_is_bad_input(json.dumps(changed))


def test_the_fingerprint_covers_what_decides_the_samples_and_nothing_else(values: dict[str, Any]) -> None:
    def changed(*path: Any, new: Any) -> str:
        return fingerprint_of(replaced(values, path, new))

    shard = ("train", "shards", 0)
    same = values["fingerprint"]
    assert fingerprint_of(values) == same
    assert changed("name", new="other") == same
    assert changed("settings_hash", new="1" * 64) == same
    assert changed("sources", new=None) == same
    assert changed(*shard, "files", "tokens", "file", new="other.bin") == same
    others = {
        changed("end_token_id", new=7),
        changed("domains", new=["a"]),
        changed("tokenizer", "sha256", new="1" * 64),
        *(changed(*shard, "files", kind, "sha256", new="1" * 64) for kind in ("tokens", "document_ends", "documents")),
        changed("train", "shards", new=values["train"]["shards"][::-1]),
    }
    assert len(others | {same}) == 8
