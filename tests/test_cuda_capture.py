"""Training by recorded steps ends where training by plain ones does."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore import Recipe, fit
from bdcore.context import Context, Progress
from bdcore.models import Classifier, metered
from bdcore.ops import isolation_loss
from bdcore.training import loop

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SAMPLES = 46  # five batches of 8 and one of 6: two sizes, both recorded from the second epoch on


def network() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(288, 4)]
        return Classifier(nn.Sequential(*layers), (3, 8, 8), (0.5,) * 3, (0.25,) * 3).train()


def columns() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(SAMPLES) % 4
    images = torch.randint(0, 256, (SAMPLES, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 0] = (labels * 60)[:, None, None].byte()
    return {"images": images, "labels": labels}


class Interrupted(Exception):
    """What ends a training before its time."""


def train(
    model: Classifier, device: str, *, capturable: bool, folder: Path | None = None, stop: int = 0, **options: object
) -> tuple[list[dict[str, float]], int]:
    """The figures of each epoch, and how many images were forwarded; interrupted after epoch `stop`, if that is one."""
    told: list[Progress] = []

    def report(progress: Progress) -> None:
        told.append(progress)
        if progress.epoch == stop:
            raise Interrupted

    context = Context(device=torch.device(device), report=report, folder=folder)

    def loss(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = model(batch["images"]).float()
        noisy = logits + 0.01 * torch.randn_like(logits)
        return {"loss": F.cross_entropy(noisy, batch["labels"]), "index": batch["index"].float().mean()}

    recipe = Recipe(**{"epochs": 5, "batch_size": 8, "lr": 0.05, "crop": 1, "flip": True} | options)
    with metered(context.meter):
        fit("t", model, columns(), loss, recipe, context, capturable=capturable)
    return [one.figures for one in told], context.meter.images


def test_on_a_cpu_it_changes_nothing():
    one, other = network(), network()
    assert train(one, "cpu", capturable=True) == train(other, "cpu", capturable=False)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_recorded_steps_train_as_plain_ones_do(optimizer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    lr = 0.05 if optimizer == "sgd" else 0.003
    begun = network()
    plain, recorded = copy.deepcopy(begun), copy.deepcopy(begun)
    figures, images = train(plain, "cuda", capturable=False, optimizer=optimizer, lr=lr)
    found, counted = train(recorded, "cuda", capturable=True, optimizer=optimizer, lr=lr)
    assert counted == images == 5 * SAMPLES
    for one, other in zip(found, figures, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name, value in recorded.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-3, atol=1e-5)
    moved = (begun.net[0].weight - plain.net[0].weight.cpu()).detach().abs().max()
    assert moved > 0.01, "too short a way for a comparison to mean anything"


@needs_gpu
def test_an_interrupted_one_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    whole, resumed = network(), network()
    figures, images = train(whole, "cuda", capturable=True)
    with pytest.raises(Interrupted):
        train(network(), "cuda", capturable=True, folder=tmp_path, stop=3)
    found, counted = train(resumed, "cuda", capturable=True, folder=tmp_path)
    assert (found, counted) == (figures[3:], images)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@needs_gpu
def test_references_of_operators_read_values_back_and_are_not_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BDCORE_OPS", "reference")
    model, data = network(), columns()
    context = Context(device=torch.device("cuda"))

    def loss(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": isolation_loss(model(batch["images"]).float(), batch["labels"], 0.5).mean()}

    fit("t", model, data, loss, Recipe(epochs=5, batch_size=8, lr=0.01), context, capturable=True)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
