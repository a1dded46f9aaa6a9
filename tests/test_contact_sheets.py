"""The command that draws the attacks, on attacks that need no training."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from bdcore import Context
from bdcore_plugins.attacks.badnets import BadNets
from bdcore_plugins.datasets.digits import Digits

ROOT = Path(__file__).parents[1]
TILE, MARGIN, GAP = 96, 8, 4


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # at the end: bdcore itself is the installed one
    return importlib.import_module("benchmarks.contact_sheets")


def draw(sheets: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["contact_sheets", "--device", "cpu", *arguments])
    sheets.main()


def tile(picture: Image.Image, row: int, column: int, columns: int) -> np.ndarray:
    bottom = picture.height - MARGIN - (2 - row) * (TILE + GAP)
    right = picture.width - MARGIN - (columns - 1 - column) * (TILE + GAP)
    return np.asarray(picture)[bottom - TILE : bottom, right - TILE : right]


def test_every_attack_gets_a_sheet_and_a_column_of_the_last_one(
    sheets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "pictures"
    attacks = "badnets,blended,sig"
    draw(
        sheets,
        monkeypatch,
        "--dataset",
        "digits",
        "--attacks",
        attacks,
        "--out",
        str(out),
        "--images",
        "3",
        "--place",
        "5",
    )
    names = {"badnets.png", "blended.png", "sig.png", "attacks.png"}
    assert {path.name for path in out.iterdir()} == names
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == names
    test = Digits(Digits.Config()).load(None).test
    assert int(test.labels[5]) != 0
    image = test.images[5:6]
    stamped = BadNets(BadNets.Config()).stamp(image, Context())
    shown = Image.open(out / "attacks.png")
    for row, expected in enumerate([image, stamped]):
        pixels = np.kron(expected[0].numpy(), np.ones((1, 3, 3), dtype=np.uint8)).transpose(1, 2, 0)
        assert np.array_equal(tile(shown, row, 0, 3), pixels)
    sheet = Image.open(out / "badnets.png")
    first = test.images[(test.labels != 0).nonzero()[2, 0]].numpy()
    assert np.array_equal(tile(sheet, 0, 2, 3), np.kron(first, np.ones((1, 3, 3), dtype=np.uint8)).transpose(1, 2, 0))


def test_bands_stand_below_each_other(sheets: ModuleType):
    black, white = torch.zeros(1, 3, 32, 32).byte(), torch.full((1, 3, 32, 32), 255).byte()
    one = sheets.overview({"a": (black, white)})
    five = sheets.overview({name: (black, white) for name in "abcde"}, across=3)
    three = sheets.overview({name: (black, white) for name in "abc"})
    assert five.size == (three.width, 2 * one.height)
    assert np.array_equal(np.asarray(five)[: one.height], np.asarray(three))


def test_what_cannot_be_drawn_is_said(
    sheets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        draw(sheets, monkeypatch, "--dataset", "digits", "--attacks", "nonesuch", "--out", str(tmp_path))
    assert ended.value.code == 2
    assert "nonesuch" in capsys.readouterr().err
