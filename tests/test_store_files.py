"""Files of tensors and JSON: what comes back, equal bytes, damage, atomic writes."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bdcore.errors import StoreError
from bdcore.store import Damaged, digest, load_tensors, save_tensors, sha256_file, write_json

MODEL = {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_tensors_of_every_kind_come_back(tmp_path: Path):
    base = torch.arange(24.0).view(2, 3, 4)
    tensors = {
        "transposed": base.permute(2, 0, 1),
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "part": base[1:, ::2],
        "whole": base,
        "same": base,
        "expanded": torch.tensor([1, 2]).expand(3, 2),
        "empty": torch.zeros(0, 3),
        "also_empty": torch.zeros(0),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "pixels": torch.arange(256, dtype=torch.uint8),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "x.safetensors"
    sha256 = save_tensors(path, tensors, {"arch": "wrn16_1", "über": '"quoted"\n'})
    loaded, metadata = load_tensors(path)
    assert equal(loaded, tensors)
    assert all(loaded[name].dtype == tensors[name].dtype for name in tensors)
    assert metadata == {"arch": "wrn16_1", "über": '"quoted"\n'}
    assert equal(load_file(path), tensors)  # the library's own reader agrees
    assert sha256 == sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_loaded_tensors_are_copies(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, MODEL)
    before = path.read_bytes()
    load_tensors(path)[0]["weight"].add_(1)
    assert path.read_bytes() == before


def test_equal_content_gives_equal_bytes(tmp_path: Path):
    metadata = {f"key{i}": str(i) for i in range(12)}
    one = save_tensors(tmp_path / "one", MODEL, metadata)
    for path in ("two", "three"):
        backwards = dict(reversed(metadata.items()))
        assert save_tensors(tmp_path / path, dict(reversed(MODEL.items())), backwards) == one
    assert save_tensors(tmp_path / "four", {**MODEL, "steps": torch.tensor(8)}, metadata) != one


@pytest.mark.parametrize("length", [0, 4, 8, 60, -9, -1])
def test_a_truncated_file_is_damaged(tmp_path: Path, length: int):
    path = tmp_path / "x.safetensors"
    save_tensors(path, MODEL)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(Damaged, match=r"x\.safetensors is damaged"):
        load_tensors(path)


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "text").write_text("no tensors at all, only prose")
    with pytest.raises(Damaged, match="text is damaged"):
        load_tensors(tmp_path / "text")
    for read in (load_tensors, sha256_file):
        with pytest.raises(StoreError, match=r"cannot read .*absent: there is no such file"):
            read(tmp_path / "absent")


def test_json_is_readable_and_in_order(tmp_path: Path):
    value = {"z": [1, 2.5, None], "a": {"ü": "é", "path": "caf\udce9"}, "tuple": (True,)}
    sha256 = write_json(tmp_path / "record.json", value)
    text = (tmp_path / "record.json").read_text("utf-8")
    assert json.loads(text) == {**value, "tuple": [True]}
    assert list(json.loads(text)) == ["z", "a", "tuple"]
    assert text.startswith('{\n  "z": [\n')
    assert text.endswith("}\n")
    assert '"ü": "é"' in text
    assert sha256 == sha256_file(tmp_path / "record.json")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "record.json", {"loss": float("nan")})
    assert (tmp_path / "record.json").read_text("utf-8") == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, json_values)
def test_digests_are_equal_for_equal_json_alone(one: object, other: object):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest(one) == digest(other)) is same
    assert digest(json.loads(json.dumps(one))) == digest(one)


def test_digest():
    assert digest({"b": 1, "a": [0.1, "é"]}) == digest({"a": (0.1, "é"), "b": 1})
    assert digest({"b": 1, "a": []}) == hashlib.sha256(b'{"a":[],"b":1}').hexdigest()
    with pytest.raises(ValueError, match="JSON"):
        digest(float("inf"))
    with pytest.raises(TypeError, match="Path"):
        digest({"path": Path()})


def test_what_stood_there_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "record.json"
    write_json(path, {"run": 1})

    def fails(descriptor: int):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StoreError, match=r"cannot write .*record\.json: the disk is full"):
        write_json(path, {"run": 2})
    assert json.loads(path.read_text()) == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
