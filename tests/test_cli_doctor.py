"""`bdcore doctor`, against what the machine and torch say of themselves."""

import json
import os
import platform
import sys
from importlib.metadata import version

import pytest
import torch

from bdcore import cli
from bdcore.ops import OPERATORS
from bdcore.ops.native import load


@pytest.fixture
def doctor(capsys):
    def run() -> dict:
        with pytest.raises(SystemExit) as caught:
            cli.main(["doctor", "--json"])
        assert caught.value.code == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_it_reports_versions_threads_operators_and_plugins(doctor):
    report = doctor()
    assert list(report) == ["versions", "devices", "threads", "cache", "native", "operators", "plugins"]
    assert report["versions"]["python"] == platform.python_version()
    for name in ("bdcore", "torch", "torchvision", "numpy", "pluggy", "scikit-learn"):
        assert report["versions"][name] == version(name)
    assert "pytest" not in report["versions"]  # an extra
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert set(report["operators"]) == set(OPERATORS)
    cpu, cuda = load()["cpu"].loaded, load()["cuda"].loaded
    for name, how in report["operators"].items():
        on_cuda = cuda and not name.startswith(("bdcore::lowest_k", "bdcore::batch_norm_relu"))  # PyTorch's own there
        assert how == f"cpu {'native' if cpu else 'reference'}, cuda {'native' if on_cuda else 'reference'}"
    assert report["native"]["cpu"] == load()["cpu"].detail
    assert "mcldef" in {row["name"] for row in report["plugins"]}


def test_it_reports_the_cpu_and_cuda_or_why_there_is_none(doctor):
    devices = doctor()["devices"]
    assert devices["cpu"]["model"]
    assert devices["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert isinstance(devices["cpu"]["native_bf16"], bool)
    assert len(devices["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert ("why_no_cuda" in devices) == (devices["cuda"] == [])
    for index, device in enumerate(devices["cuda"]):
        assert device["model"] == torch.cuda.get_device_name(index)


def test_the_cache_folder_follows_the_environment_and_is_tried(doctor, tmp_path, monkeypatch):
    folder = tmp_path / "not" / "yet" / "there"
    monkeypatch.setenv("BDCORE_CACHE", str(folder))
    cache = doctor()["cache"]
    assert (cache["folder"], cache["exists"], cache["writable"]) == (str(folder), False, "yes")
    assert cache["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "file" / "below"))
    assert doctor()["cache"]["writable"] == "no: Not a directory"

    monkeypatch.setenv("BDCORE_CACHE", "/proc/bdcore")
    assert doctor()["cache"]["writable"].startswith("no: ")


def test_a_part_that_cannot_be_examined_says_why_and_the_others_are_shown(doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "bdcore.ops", None)  # an import of it now fails
    report = doctor()
    assert report["operators"]["error"].startswith("ModuleNotFoundError: ")
    assert report["versions"]["torch"] == version("torch")


def test_the_text_form_in_a_process_of_its_own(new_site):
    site = new_site()
    site.add("bad-dist", {"bad": "bad_plugin"}, {"bad_plugin.py": "print('noise')\nraise RuntimeError('no')"})
    settings = {"CUDA_VISIBLE_DEVICES": "", "BDCORE_OPS": "reference"}
    done = site.bdcore("doctor", BDCORE_CACHE=str(site.folder / "cache"), **settings)
    assert done.returncode == 0
    assert "noise" not in done.stdout
    lines = done.stdout.splitlines()
    for line in (
        f"  torch: {version('torch')}",
        "    cuda: none",
        "  OMP_NUM_THREADS: 1",
        f"  folder: {site.folder / 'cache'}",
        f"  {OPERATORS[0]}: cpu reference, cuda reference",
        "  BDCORE_OPS: reference",
    ):
        assert line.strip() in {shown.strip() for shown in lines}
    assert any("why_no_cuda: " in line for line in lines)
    assert any(line.startswith("bad ") and "RuntimeError: no" in line for line in lines)
