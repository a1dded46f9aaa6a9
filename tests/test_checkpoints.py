"""Weights from files: every form that people save them in is read, loaded, and written back as it was."""

import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from bdcore.artifacts import Architecture
from bdcore.errors import StoreError, UsageError
from bdcore.models import Classifier, build, load_into, manifest_of, read_checkpoint, write_checkpoint
from bdcore.store import save_tensors, sha256_file

ARCH = Architecture("wrn10_1", 10, (3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
MODEL = build(ARCH, 1)
NET = MODEL.net.state_dict()


def named(prefix: str, state: Mapping[str, Tensor] = NET) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def halves(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def fresh(arch: Architecture = ARCH) -> Classifier:
    return build(arch, 2)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def plain(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def reached(content: Any, wrapping: tuple[str, ...]) -> Any:
    for key in wrapping:
        content = content[key]
    return content


FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a state dict": (NET, ()),
    "a dict": (dict(NET), ()),
    "of the ImageNet example": (
        {"epoch": 90, "arch": "x", "state_dict": named("module."), "best": 0.5, "optimizer": {"state": {}}},
        ("state_dict",),
    ),
    "model": ({"model": named("_orig_mod.module.")}, ("model",)),
    "model_state_dict": ({"model_state_dict": NET, "loss": 0.1}, ("model_state_dict",)),
    "net": ({"net": named("module."), "acc": 93.2, "epoch": 4}, ("net",)),
    "compiled": (named("_orig_mod."), ()),
    "lightning": ({"state_dict": named("model.net."), "hparams_name": None}, ("state_dict",)),
    "normalised in front": (named("1."), ()),
    "two wrappings": ({"checkpoint": {"state_dict": NET, "step": 3}, "tag": "a"}, ("checkpoint", "state_dict")),
    "any other key": ({"weights": NET, "step": 3}, ("weights",)),
    "averaged too": ({"state_dict": fresh().net.state_dict(), "state_dict_ema": NET}, ("state_dict_ema",)),
    "half": (halves(NET, torch.float16), ()),
    "bfloat16": ({"model": halves(named("module."), torch.bfloat16)}, ("model",)),
    "double": (halves(NET, torch.float64), ()),
    "parameters": (
        {name: nn.Parameter(value, requires_grad=value.is_floating_point()) for name, value in NET.items()},
        (),
    ),
    "before num_batches_tracked": ({key: value for key, value in NET.items() if "num_batches" not in key}, ()),
    "a whole classifier": (MODEL.state_dict(), ()),
    "backwards": (OrderedDict(reversed(NET.items())), ()),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_and_written_as_it_was(form: str, old: bool, tmp_path: Path):
    content, wrapping = FORMS[form]
    path = tmp_path / "theirs.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    found = read_checkpoint(path)
    assert (found.form, found.wrapping) == ("pt", wrapping)

    model = fresh()
    load_into(model, found)
    for name, value in model.net.state_dict().items():
        if name in NET and not (form.startswith("before") and "num_batches" in name):
            torch.testing.assert_close(value, NET[name], rtol=1e-2 if form in ("half", "bfloat16") else 0, atol=1e-3)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    out = tmp_path / "ours.pth"
    assert write_checkpoint(out, found, model.state_dict()) == sha256_file(out)
    written, given = plain(out), plain(path)
    weights, before = reached(written, wrapping), reached(given, wrapping)
    assert type(weights) is type(before)
    assert list(weights) == list(before)
    assert [value.dtype for value in weights.values()] == [value.dtype for value in before.values()]
    again = fresh()
    load_into(again, read_checkpoint(out))
    for name, value in again.named_parameters():
        torch.testing.assert_close(value, model.get_parameter(name), rtol=1e-2, atol=1e-2)
        assert not torch.equal(value, MODEL.get_parameter(name))
    level, level_before = written, given
    for key in wrapping:
        kept = [name for name, value in level_before.items() if name == key or not isinstance(value, dict)]
        assert list(level) == kept
        assert all(level[name] == level_before[name] for name in kept if name != key)
        level, level_before = level[key], level_before[key]


def test_old_weights_stay_nowhere_in_the_file(tmp_path: Path):
    """A second set of weights and an optimiser's state are of the network with the backdoor."""
    secret = torch.full((3,), 12345.0)
    content = {
        "state_dict": NET,
        "teacher": {"w": secret},
        "optimizer": {"state": {0: {"exp_avg": secret}}},
        "epoch": 1,
    }
    torch.save(content, tmp_path / "theirs.pt")
    found = read_checkpoint(tmp_path / "theirs.pt")
    write_checkpoint(tmp_path / "ours.pt", found, fresh().net.state_dict())
    assert list(plain(tmp_path / "ours.pt")) == ["state_dict", "epoch"]
    with zipfile.ZipFile(tmp_path / "ours.pt") as archive:
        held = b"".join(archive.read(member) for member in archive.namelist())
    assert secret.numpy().tobytes() not in held


def test_versions_of_modules_are_kept(tmp_path: Path):
    torch.save({"state_dict": NET}, tmp_path / "theirs.pt")
    write_checkpoint(tmp_path / "ours.pt", read_checkpoint(tmp_path / "theirs.pt"), NET)
    assert plain(tmp_path / "ours.pt")["state_dict"]._metadata == NET._metadata
    assert NET._metadata


def test_safetensors_are_read_and_written_as_they_were(tmp_path: Path):
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(halves(named("module."), torch.bfloat16), path, {"format": "pt", "by": "others"})
    found = read_checkpoint(path)
    model = fresh()
    load_into(model, found)
    write_checkpoint(tmp_path / "ours.safetensors", found, model.state_dict())
    assert same(safetensors.torch.load_file(tmp_path / "ours.safetensors"), safetensors.torch.load_file(path))
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "others"}


def test_a_file_is_known_by_its_content_and_not_by_its_name(tmp_path: Path):
    torch.save(NET, tmp_path / "a.safetensors")
    safetensors.torch.save_file(dict(NET), tmp_path / "b.pt")
    assert read_checkpoint(tmp_path / "a.safetensors").form == "pt"
    assert read_checkpoint(tmp_path / "b.pt").form == "safetensors"


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that it makes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("index", torch.arange(3), persistent=False)


def test_tied_weights_and_computed_buffers(tmp_path: Path):
    net = Tied()
    safetensors.torch.save_model(net, str(tmp_path / "tied.safetensors"))
    found = read_checkpoint(tmp_path / "tied.safetensors")
    assert len(found.state) == 3
    other = Tied()
    load_into(other, found)
    assert torch.equal(other.second.weight, net.first.weight)
    write_checkpoint(tmp_path / "again.safetensors", found, other.state_dict())
    assert read_checkpoint(tmp_path / "again.safetensors").state.keys() == found.state.keys()

    torch.save({**net.state_dict(), "index": torch.arange(3)}, tmp_path / "older.pt")
    load_into(Tied(), read_checkpoint(tmp_path / "older.pt"))


def test_older_names_are_read_by_the_networks_own_rules_and_not_written_back(tmp_path: Path):
    """torchvision called the layers of its transformers otherwise before 0.13, and its published weights still do."""
    net = VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)
    published = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): torch.full_like(value, 7)
        for name, value in net.state_dict().items()
    }
    assert published.keys() != net.state_dict().keys()
    torch.save(published, tmp_path / "theirs.pt")
    found = read_checkpoint(tmp_path / "theirs.pt")
    load_into(net, found)
    assert all((value == 7).all() for value in net.state_dict().values())
    clean = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    write_checkpoint(tmp_path / "ours.pt", found, clean)
    written = plain(tmp_path / "ours.pt")
    assert written.keys() == clean.keys()
    assert all((value == 0).all() for value in written.values())


def test_views_are_written_without_what_they_are_views_of(tmp_path: Path):
    torch.save(NET, tmp_path / "theirs.pt")
    flat = torch.zeros(10**6)
    state = {name: flat[: value.numel()].view(value.shape).to(value.dtype) for name, value in NET.items()}
    write_checkpoint(tmp_path / "ours.pt", read_checkpoint(tmp_path / "theirs.pt"), state)
    assert (tmp_path / "ours.pt").stat().st_size < 10**6


def test_tensors_of_a_gpu_come_to_the_cpu(tmp_path: Path):
    """A file says "cuda:0" for where its tensors were; edited in, since this must hold without a GPU as well."""
    buffer = io.BytesIO()
    torch.save(NET, buffer)
    with zipfile.ZipFile(buffer) as given, zipfile.ZipFile(tmp_path / "gpu.pt", "w") as edited:
        for member in given.infolist():
            content = given.read(member)
            if member.filename.endswith("data.pkl"):
                assert b"X\3\0\0\0cpu" in content
                content = content.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")
            edited.writestr(member, content)
    assert same(read_checkpoint(tmp_path / "gpu.pt").state, NET)


def wider(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([value, value]) if value.ndim else value for name, value in state.items()}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            build(Architecture("wrn10_1", 100, ARCH.shape, ARCH.mean, ARCH.std), 0).net.state_dict,
            r"trained for 100 classes, and this network is built for 10.*head.weight is float32 \(100, 64\) where "
            r"float32 \(10, 64\) is needed",
        ),
        (
            build(Architecture("wrn10_1", 10, (1, 8, 8), (0.5,), (0.2,)), 0).net.state_dict,
            r"takes images of 1 channels, and this network is built for 3.*stem.weight",
        ),
        (lambda: named("module.", wider(NET)), r"another width.*\(Names without the prefix 'module\.'"),
        (
            build(Architecture("shufflenet_v2_x0_5", 10, (3, 32, 32), ARCH.mean, ARCH.std), 0).net.state_dict,
            r"another architecture.*Missing: stem\.weight.*and \d+ more.*Not expected: conv1\.0\.weight",
        ),
        (lambda: {**NET, "extra.weight": torch.zeros(1)}, r"larger architecture.*Not expected: extra\.weight"),
        (
            lambda: {name: value for name, value in NET.items() if not name.startswith("head")},
            r"smaller architecture.*Missing: head\.weight, head\.bias",
        ),
        (
            lambda: {name: value.to(torch.int8) for name, value in NET.items()},
            r"integers where the network computes with fractions.*int8",
        ),
        (lambda: {f"layer{number}": torch.zeros(1) for number in range(9)}, "another architecture"),
    ],
)
def test_what_does_not_fit_is_explained(state: Callable[[], dict[str, Tensor]], says: str, tmp_path: Path):
    path = tmp_path / "theirs.pt"
    torch.save(state(), path)
    with pytest.raises(UsageError, match=says) as refusal:
        load_into(fresh(), read_checkpoint(path))
    assert str(refusal.value).startswith(f"{path} does not fit PreActResNet: ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([NET], "it holds a list"),
        ({}, r"no state dict; its keys are \(none\)"),
        ({"epoch": 1, "optimizer": {"lr": 0.1}}, "no state dict; its keys are 'epoch', 'optimizer'"),
        ({"generator": dict(NET), "critic": dict(NET)}, "several sets of weights, generator, critic"),
        ({"model": NET, "accuracy": np.float64(0.5)}, r"object of numpy.*save model\.state_dict\(\) alone"),
        (NET["stem.weight"], "it holds a Tensor"),
        ({"weight": torch.zeros(2, 2).to_sparse()}, "only plain dense ones"),
        ({"weight": torch.zeros(2, 2, device="meta")}, "only plain dense ones"),
    ],
)
def test_what_holds_no_weights_is_refused(content: object, says: str, tmp_path: Path):
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises(UsageError, match=says):
        read_checkpoint(tmp_path / "theirs.pt")


def test_other_protocols_and_torchscript_are_refused(tmp_path: Path):
    torch.save(NET, tmp_path / "theirs.pt", pickle_protocol=4)
    with pytest.raises(UsageError, match="pickle protocol 4"):
        read_checkpoint(tmp_path / "theirs.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # as torch.jit.save lays it out
        for member in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"script/{member}", b"")
    with pytest.raises(UsageError, match=r"TorchScript.*save model\.state_dict\(\)"):
        read_checkpoint(tmp_path / "script.pt")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "theirs.pt"
    torch.save(NET, path)
    before, found = path.read_bytes(), read_checkpoint(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StoreError, match="the disk is full"):
        write_checkpoint(path, found, fresh().state_dict())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_another_network_are_not_written(tmp_path: Path):
    torch.save(NET, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match="none of the names"):
        write_checkpoint(tmp_path / "ours.pt", read_checkpoint(tmp_path / "theirs.pt"), {"other": torch.zeros(1)})
    assert not (tmp_path / "ours.pt").exists()


def ours(folder: Path, **changes: object) -> Path:
    """A model as a run's folder holds it."""
    path = folder / "victim.safetensors"
    sha256 = save_tensors(path, MODEL.state_dict())
    manifest = {"format": "safetensors", "arch": asdict(ARCH), "path": path.name, "sha256": sha256, "run": "x"}
    path.with_suffix(".json").write_text(json.dumps({**manifest, **changes}))
    return path


def test_our_own_models_are_recognised_with_their_normalisation(tmp_path: Path):
    path = ours(tmp_path)
    assert manifest_of(path) == ARCH
    model = build(Architecture("wrn10_1", 10, (3, 8, 8), (0, 0, 0), (1, 1, 1)), 2)
    load_into(model, read_checkpoint(path))
    assert same(model.state_dict(), MODEL.state_dict())
    write_checkpoint(tmp_path / "ours.safetensors", read_checkpoint(path), model.state_dict())
    assert (tmp_path / "ours.safetensors").read_bytes() == path.read_bytes()
    grey = build(Architecture("wrn10_1", 10, (1, 8, 8), (0.5,), (0.2,)), 2)
    with pytest.raises(UsageError, match="takes images of 3 channels, and this network is built for 1"):
        load_into(grey, read_checkpoint(path))


def test_files_without_a_manifest_are_not_ours(tmp_path: Path):
    torch.save(NET, tmp_path / "theirs.pt")
    assert manifest_of(tmp_path / "theirs.pt") is None
    save_tensors(tmp_path / "theirs.safetensors", NET)
    assert manifest_of(tmp_path / "theirs.safetensors") is None
    (tmp_path / "theirs.json").write_text('{"model_type": "vit"}')
    assert manifest_of(tmp_path / "theirs.safetensors") is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arch": {"name": "wrn10_1"}}, "is damaged"),
        ({"sha256": "0"}, "for other weights"),
        ({"arch": asdict(ARCH) | {"name": "os:system,command=id"}}, "names code to run, os:system"),
        ({"arch": asdict(ARCH) | {"name": "evil:make"}}, "--arch evil:make"),
    ],
)
def test_a_manifest_is_not_believed_blindly(changes: dict[str, object], says: str, tmp_path: Path):
    path = ours(tmp_path, **changes)
    with pytest.raises(UsageError, match=says):
        manifest_of(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        manifest_of(path)
