"""A stranger's model, from training elsewhere to a purified file; minutes: `pytest -m slow tests/test_strangers.py`."""

import json
import subprocess
import sys
from pathlib import Path

import foreign_models
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def bdcore(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a process of its own, in `folder`."""
    script = Path(sys.executable).with_name("bdcore")
    return subprocess.run([script, *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arch", foreign_models.NAMES)
def test_a_backdoor_is_found_and_removed(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    foreign_models.bring(tmp_path, arch, backdoored=True)
    net = foreign_models.network(arch).eval()
    net.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    accuracy, success = foreign_models.figures(net, tmp_path)
    assert success > 0.9, "the backdoor took hold"
    brought = ("--model", "model.pt", "--arch", foreign_models.NAMES[arch], "--clean", "folder:clean")

    scanned = bdcore(tmp_path, "scan", *brought, "--json")
    assert scanned.returncode == 3, scanned.stderr
    verdict = json.loads(scanned.stdout)["verdict"]
    assert verdict["target"] == foreign_models.TARGET
    print(f"{arch}: {verdict}")

    defended = bdcore(tmp_path, "defend", "--plugin", "mcldef", *brought, "--out", "purified.pt")
    assert defended.returncode == 0, defended.stderr
    net.load_state_dict(torch.load(tmp_path / "purified.pt", weights_only=True))
    accuracy_after, success_after = foreign_models.figures(net, tmp_path)
    print(f"{arch}: accuracy {accuracy:.3f} -> {accuracy_after:.3f}, success {success:.3f} -> {success_after:.3f}")
    assert success_after <= 0.1
    assert accuracy_after >= accuracy - 0.03


@pytest.mark.parametrize("arch", foreign_models.NAMES)
def test_a_clean_model_is_called_clean(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    foreign_models.bring(tmp_path, arch, backdoored=False)
    brought = ("--model", "model.pt", "--arch", foreign_models.NAMES[arch], "--clean", "folder:clean")
    scanned = bdcore(tmp_path, "scan", *brought, "--json")
    assert scanned.returncode == 0, scanned.stdout + scanned.stderr
    print(f"{arch}: {json.loads(scanned.stdout)['verdict']}")
