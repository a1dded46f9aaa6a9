"""ABL's ranking: closed forms, samples that do not count, and the benchmark of it."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bdcore import Context, Labelled
from bdcore_plugins.defenses.abl import rank

ROOT = Path(__file__).parents[1]


class Pixels(nn.Module):
    """The pixels of an image are its logits; of an image that begins with 255 they are NaN."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1).float()
        return torch.where(logits[:, :1] == 255, torch.nan, logits)


def images(pixels: np.ndarray) -> Tensor:
    """uint8 [N, C] as images of N x 1 x 1 x C."""
    return torch.from_numpy(pixels.astype(np.uint8))[:, None, None]


def exact(gaps: np.ndarray) -> np.ndarray:
    """Cross entropy of two logits of which the label's is larger by the gap, in float64."""
    return np.logaddexp(0, -gaps.astype(np.float64))


@given(st.lists(st.integers(-87, 87), min_size=1, max_size=200), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_the_order_is_that_of_float64_and_of_places(gaps: list[int], number: int):
    """Batches of 32 are crossed, and losses run from 87 down to 1e-38."""
    found = np.array(gaps)
    labels = np.arange(len(found)) % 2
    pixels = np.zeros((len(found), 2))
    pixels[np.arange(len(found)), labels] = 100 + found
    pixels[np.arange(len(found)), 1 - labels] = 100
    count = number % (len(found) + 1)
    suspects = rank(Pixels(), Labelled(images(pixels), torch.from_numpy(labels)), count, Context())
    assert suspects.index.tolist() == np.argsort(exact(found), kind="stable")[:count].tolist()
    assert suspects.scores is not None
    np.testing.assert_allclose(-suspects.scores.numpy(), exact(found), rtol=1e-5)


def test_strong_poisons_that_fp32_would_tie_are_told_apart():
    gaps = np.random.default_rng(0).permutation(np.arange(20, 80))
    pixels = np.stack([100 + gaps, np.full(60, 100)], 1)
    data = Labelled(images(pixels), torch.zeros(60, dtype=torch.int64))
    naive = nn.functional.cross_entropy(Pixels()(data.images), data.labels, reduction="none")
    assert (naive == 0).all(), "all of them tie in the usual form"
    assert rank(Pixels(), data, 60, Context()).index.tolist() == np.argsort(-gaps).tolist()


def test_nan_and_ignored_samples_come_last():
    pixels = np.array([[255, 0], [90, 100], [100, 90], [100, 0], [255, 255], [100, 95]])
    labels = torch.tensor([0, 0, 0, -100, 0, 0])
    suspects = rank(Pixels(), Labelled(images(pixels), labels), 6, Context())
    assert suspects.index.tolist() == [2, 5, 1, 0, 3, 4]
    assert suspects.scores is not None
    assert not suspects.scores.isnan().any(), "a ranking by scores must not break on them"
    assert suspects.scores.argsort(stable=True)[:3].tolist() == [0, 3, 4]


def test_the_model_is_asked_in_eval_mode_and_fp32():
    asked: list[tuple[bool, torch.dtype, bool]] = []

    class Spy(Pixels):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            asked.append((self.training, logits.dtype, torch.is_grad_enabled()))
            return logits

    data = Labelled(images(np.full((40, 2), 7)), torch.zeros(40, dtype=torch.int64))
    rank(Spy().train(), data, 1, Context(precision="bf16"))
    assert set(asked) == {(False, torch.float32, False)}


def test_the_benchmark_writes_what_both_contestants_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("scipy")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # at the end: bdcore itself is the installed one
    ranking = importlib.import_module("benchmarks.ranking")
    monkeypatch.setattr(ranking.report, "RESULTS", tmp_path)
    # In this process: what a process of its own is good for is time, which is not of interest here.
    monkeypatch.setattr(ranking, "alone", lambda contest, data, threads: contest(data))
    monkeypatch.setattr(
        sys, "argv", ["ranking.py", "--images", "800", "--peer-images", "200", "--rounds", "2", "--threads", "1"]
    )
    ranking.main()
    written = json.loads((tmp_path / "ranking.json").read_text())
    ours, theirs = written["tables"]["Seconds"]
    assert set(written["seconds"]) == {ours["ranking"], theirs["ranking"]}
    assert all(len(taken) == 2 and min(taken) > 0 for taken in written["seconds"].values())
    # Of 200 images for 800: four times what it took.
    assert float(theirs["seconds, median"]) == pytest.approx(
        4 * np.median(written["seconds"][theirs["ranking"]]), abs=0.06
    )
    assert "200 of 800 images" in (tmp_path / "ranking.md").read_text()
