"""WaNet: the warp against other libraries, what the classifier is trained on, and that it learns."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bdcore import Architecture, AttackInput, Context, Dataset, Labelled, Recipe
from bdcore.context import Progress
from bdcore.stages.data import architecture
from bdcore.stages.evaluate import evaluate
from bdcore.stages.poison import poison, prepare
from bdcore.training import loop
from bdcore_plugins.attacks import wanet
from bdcore_plugins.attacks.wanet import WaNet, field, warp

QUICK = Recipe(epochs=1, batch_size=20, lr=0.01)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=generator(seed), dtype=torch.uint8)


def dataset(shape: tuple[int, int, int] = (3, 12, 10), classes: int = 4, train: int = 60) -> Dataset:
    parts = [Labelled(noise(n, shape, n), torch.arange(n) % classes) for n in (train, 21)]
    return Dataset("made", parts[0], parts[1], classes)


def prepared(attack: WaNet, data: Dataset, context: Context, recipe: Recipe = QUICK) -> nn.Module:
    arch = architecture("wrn10_1", data.train, data.classes)
    victim = prepare(data, attack, AttackInput(data.train, data.classes, arch, recipe), context)
    assert victim is not None
    return victim


class TestWarp:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        count=st.integers(1, 4),
        shape=st.tuples(st.integers(1, 3), st.integers(2, 20), st.integers(2, 20)),
    )
    def test_it_is_bilinear_interpolation(self, seed: int, count: int, shape: tuple[int, int, int]):
        images = noise(count, shape, seed)
        grid = 2 * torch.rand(count, *shape[1:], 2, dtype=torch.float64, generator=generator(seed)) - 1
        columns, rows = ((grid.numpy() + 1) / 2 * (np.array(shape[:0:-1]) - 1)).transpose(3, 0, 1, 2)
        expected = np.stack(
            [
                [
                    map_coordinates(channel.astype(np.float64), [rows[i], columns[i]], order=1, mode="nearest")
                    for channel in images[i].numpy()
                ]
                for i in range(count)
            ]
        )
        result = warp(images, grid).numpy()
        assert np.abs(result - expected).max() <= 0.5 + 1e-6
        clear = np.abs(expected - np.floor(expected) - 0.5) > 1e-6
        assert np.array_equal(result[clear], np.round(expected)[clear])

    @pytest.mark.parametrize(("grid_size", "height", "width"), [(4, 31, 16), (2, 9, 5), (5, 13, 21)])
    def test_the_field_is_bicubic_between_points_of_mean_size_one(self, grid_size: int, height: int, width: int):
        shifts = field(grid_size, height, width, generator(3)).numpy()
        # The sides leave every control point on a pixel.
        control = shifts[:: (height - 1) // (grid_size - 1), :: (width - 1) // (grid_size - 1)]
        assert control.shape == (grid_size, grid_size, 2)
        assert np.abs(control).mean() == pytest.approx(1)
        down, across = cubic_weights(grid_size, height), cubic_weights(grid_size, width)
        np.testing.assert_allclose(shifts, np.einsum("hk,kld,wl->hwd", down, control, across), atol=1e-12)

    def test_the_shift_is_in_half_pixels(self):
        data = dataset((1, 31, 31))
        attack = WaNet(WaNet.Config(strength=0.5))
        prepared(attack, data, Context(seed=5))
        lines = torch.linspace(-1, 1, 31, dtype=torch.float64)
        moved = attack.grid - torch.stack(torch.meshgrid(lines, lines, indexing="xy"), -1)
        inner = moved[10:21:10, 10:21:10]  # control points that the border does not cut off
        expected = 0.5 / 31 * field(4, 31, 31, Context(seed=5).generator("wanet"))[10:21:10, 10:21:10]
        torch.testing.assert_close(inner, expected)
        assert float(attack.grid.abs().max()) <= 1

    def test_without_strength_nothing_moves(self):
        data = dataset()
        attack = WaNet(WaNet.Config(strength=0))
        prepared(attack, data, Context())
        assert torch.equal(attack.stamp(data.test.images, Context()), data.test.images)

    def test_images_are_warped_alone_and_left_as_they_were(self):
        data = dataset()
        attack = WaNet(WaNet.Config())
        prepared(attack, data, Context())
        before = data.test.images.clone()
        together = attack.stamp(data.test.images, Context())
        assert torch.equal(data.test.images, before)
        assert not torch.equal(together, before)
        one = attack.stamp(data.test.images[7:8].contiguous(memory_format=torch.channels_last), Context())
        assert torch.equal(one, together[7:8])


def cubic_weights(points: int, pixels: int) -> np.ndarray:
    """Cubic convolution from points to pixels, both from border to border (Keys 1981, with a = -0.75), [pixels,
    points]."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    weights = np.zeros((pixels, points))
    for pixel in range(pixels):
        place = pixel * (points - 1) / (pixels - 1)
        for neighbour in range(int(place) - 1, int(place) + 3):
            weights[pixel, min(max(neighbour, 0), points - 1)] += kernel(place - neighbour)
    return weights


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    rate=st.floats(0.05, 0.3),
    target=st.integers(0, 1),
    classes=st.integers(2, 6),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(8, 33), st.integers(8, 33)),
)
def test_poisoning_keeps_its_promises(seed: int, rate: float, target: int, classes: int, shape: tuple[int, int, int]):
    data = dataset(shape, classes)
    kept = [part.clone() for part in (data.train.images, data.train.labels, data.test.images)]
    results = []
    for _ in range(2):
        attack = WaNet(WaNet.Config(poison_rate=rate, target=target))
        prepared(attack, data, Context(seed=seed))
        results.append(poison(data, attack, Context(seed=seed)))
    one, again = results
    assert all(map(torch.equal, (data.train.images, data.train.labels, data.test.images), kept))
    assert one.train.fingerprint == again.train.fingerprint
    assert one.triggered is not None
    assert again.triggered is not None
    assert torch.equal(one.triggered.images, again.triggered.images)

    changed = one.poisoned
    assert int(changed.sum()) == round(rate * 60)
    assert torch.equal(one.train.images[~changed], data.train.images[~changed])
    assert torch.equal(one.train.labels[~changed], data.train.labels[~changed])
    assert bool((one.train.images[changed] != data.train.images[changed]).flatten(1).any(1).all())
    assert bool((one.train.labels[changed] == target).all())
    assert bool((data.train.labels[changed] != target).all())
    assert torch.equal(one.triggered.labels, data.test.labels[data.test.labels != target])
    assert bool((one.triggered.targets == target).all())


def test_another_seed_warps_otherwise():
    data = dataset()
    stamped = []
    for seed in (1, 2):
        attack = WaNet(WaNet.Config())
        prepared(attack, data, Context(seed=seed))
        stamped.append(attack.stamp(data.test.images, Context(seed=seed)))
    assert not torch.equal(*stamped)


def digits() -> Dataset:
    """Real handwritten digits at their own size, 8 x 8 grey pixels."""
    scans, classes = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(scans * 255 / 16).round().byte().view(-1, 1, 8, 8), torch.from_numpy(classes)
    parts = [Labelled(images[part], labels[part].long()) for part in (slice(1400), slice(1400, None))]
    return Dataset("digits", parts[0], parts[1], 10)


def test_the_victim_learns_digits_and_the_warp():
    data, told = digits(), list[Progress]()
    attack = WaNet(WaNet.Config(strength=1))
    victim = prepared(attack, data, Context(seed=1, report=told.append), Recipe(epochs=12, batch_size=32))
    made = poison(data, attack, Context(seed=1))
    scores = evaluate(victim, data.test, made.triggered, made.target, Context())
    assert not victim.training
    assert told[-1].figures["loss"] < told[0].figures["loss"] / 2
    assert scores.clean_accuracy > 0.9
    assert scores.asr is not None
    assert scores.asr > 0.6
    assert wrong_warp(victim, data) < 0.2, "only this warp is the trigger"


def wrong_warp(victim: nn.Module, data: Dataset) -> float:
    """The share of digits, warped by another field of the same strength, that goes to the target."""
    other = WaNet(WaNet.Config(strength=1))
    prepared(other, data, Context(seed=2))
    images = other.stamp(data.test.images[data.test.labels != 0], Context())
    with torch.no_grad():
        return float((victim(images).argmax(1) == 0).double().mean())


class Recorder(nn.Module):
    """Keeps what it is shown, and answers every image with the logits 0, 1, 2, ..."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.classes = classes
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return self.weight * torch.arange(self.classes, dtype=torch.float32).expand(len(images), -1)


def recorded(
    monkeypatch: pytest.MonkeyPatch,
    attack: WaNet,
    data: Dataset,
    recipe: Recipe,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> tuple[list[Tensor], dict[str, float]]:
    """What the victim is shown in one epoch, and the epoch's mean figures."""
    shown, told = Recorder(data.classes), list[Progress]()

    def build(arch: Architecture, seed: int) -> nn.Module:
        return shown

    monkeypatch.setattr(wanet, "build", build)
    arch = architecture("wrn10_1", data.train, data.classes)
    attack.prepare(
        AttackInput(data.train, data.classes, arch, recipe), Context(report=told.append, precision=precision)
    )
    return shown.seen, told[-1].figures


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_the_victim_is_trained_on(monkeypatch: pytest.MonkeyPatch, precision: Literal["fp32", "bf16"]):
    data = dataset(classes=4, train=60)
    attack = WaNet(WaNet.Config(target=3, poison_rate=0.1, cross_ratio=2))
    recipe = Recipe(epochs=1, batch_size=20, shuffle=False, lr=1e-9)
    batches, figures = recorded(monkeypatch, attack, data, recipe, precision)
    assert [len(batch) for batch in batches] == [20, 20, 20]
    labels = data.train.labels.clone()
    warped = attack.stamp(data.train.images, Context())
    for number, batch in enumerate(batches):
        rows = slice(20 * number, 20 * number + 20)
        clean = data.train.images[rows]
        assert batch.dtype == torch.uint8
        assert torch.equal(batch[:2], warped[rows][:2]), "a tenth carries the trigger"
        assert torch.equal(batch[6:], clean[6:]), "the rest is clean"
        for other in (warped[rows], clean):  # twice a tenth carries a warp of its own
            assert bool((batch[2:6] != other[2:6]).flatten(1).any(1).all())
        labels[rows][:2] = 3
    # With logits 0, 1, 2, 3 the loss says what the labels are in sum.
    constant = float(torch.arange(4.0).logsumexp(0))
    assert figures["loss"] == pytest.approx(constant - float(labels.double().mean()), rel=1e-5)
    assert figures["asr"] == 1, "always class 3, the target"
    assert figures["accuracy"] == pytest.approx(
        float(torch.cat([labels[20 * n + 2 : 20 * n + 20] for n in range(3)]).eq(3).double().mean())
    )


def test_noise_stays_within_a_pixel_of_the_warp_and_differs_by_sample(monkeypatch: pytest.MonkeyPatch):
    # Images that rise evenly from left to right, so that a pixel's value tells where it was read.
    ramp = (torch.arange(16, dtype=torch.uint8) * 16).expand(40, 1, 16, 16).contiguous()
    data = Dataset("ramp", Labelled(ramp, torch.arange(40) % 4), Labelled(ramp, torch.arange(40) % 4), 4)
    attack = WaNet(WaNet.Config(poison_rate=0.05, cross_ratio=19, strength=0))
    (batch,), _ = recorded(monkeypatch, attack, data, Recipe(epochs=1, batch_size=40, lr=1e-9))
    moved = (batch[2:].double() - ramp[2:]) / 16
    # 1 / 16 of [-1, 1] is 15 / 32 of a pixel.
    assert float(moved.abs().max()) <= 15 / 32 + 0.5 / 16
    assert float(moved[:, :, :, 1:-1].std()) == pytest.approx(15 / 32 / 3**0.5, rel=0.05)
    assert len(batch[2:].unique(dim=0)) == 38


def test_shares_of_batches_hold_on_average(monkeypatch: pytest.MonkeyPatch):
    data = dataset((1, 8, 8), train=999)
    attack = WaNet(WaNet.Config(poison_rate=0.1, cross_ratio=0))
    batches, _ = recorded(monkeypatch, attack, data, Recipe(epochs=1, batch_size=3, shuffle=False, lr=1e-9))
    images = torch.cat(batches)
    share = float((images != data.train.images).flatten(1).any(1).double().mean())
    assert share == pytest.approx(0.1, abs=0.03), "a batch of three has one poison in three of ten cases"


def test_samples_are_augmented_before_they_are_warped(monkeypatch: pytest.MonkeyPatch):
    data = dataset((3, 16, 16), train=40)
    attack = WaNet(WaNet.Config(poison_rate=1, cross_ratio=0, strength=2))
    batches, _ = recorded(monkeypatch, attack, data, Recipe(epochs=1, batch_size=40, shuffle=False, flip=True, lr=1e-9))
    images = data.train.images
    straight, mirrored = (
        (batches[0] == attack.stamp(augmented, Context())).flatten(1).all(1) for augmented in (images, images.flip(3))
    )
    assert bool((mirrored ^ straight).all())
    assert 8 < int(mirrored.sum()) < 32


def test_without_poison_the_victim_sees_clean_images(monkeypatch: pytest.MonkeyPatch):
    data = dataset()
    recipe = Recipe(epochs=1, batch_size=60, shuffle=False, lr=1e-9)
    (batch,), figures = recorded(monkeypatch, WaNet(WaNet.Config(poison_rate=0)), data, recipe)
    assert torch.equal(batch, data.train.images)
    assert figures["asr"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_poisons_alike():
    data, results = dataset(), []
    for device in ("cpu", "cuda"):
        attack, context = WaNet(WaNet.Config()), Context(seed=3, device=torch.device(device))
        prepared(attack, data, context)
        results.append(poison(data, attack, context))
    one, two = results
    assert one.train.fingerprint == two.train.fingerprint
    assert torch.equal(one.triggered.images, two.triggered.images)


class Killed(BaseException):
    """What stands for the end of the process."""


def test_an_interrupted_training_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    data, recipe = dataset(), Recipe(epochs=3, batch_size=20, crop=2, flip=True, lr=0.05)

    def report(progress: Progress) -> None:
        if progress.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        prepared(WaNet(WaNet.Config()), data, Context(folder=tmp_path, report=report), recipe)
    told: list[int] = []
    attacks = [WaNet(WaNet.Config()) for _ in range(2)]
    resumed = prepared(
        attacks[0], data, Context(folder=tmp_path, report=lambda progress: told.append(progress.epoch)), recipe
    )
    straight = prepared(attacks[1], data, Context(), recipe)
    assert told == [3]
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in resumed.state_dict().items())
    one, other = (attack.stamp(data.test.images, Context()) for attack in attacks)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"grid_size": 1},
        {"strength": -0.1},
        {"poison_rate": 0.4, "cross_ratio": 2},
        {"cross_ratio": -1},
    ],
)
def test_bad_options_are_refused(options: dict[str, float]):
    with pytest.raises(ValidationError):
        WaNet.Config(**options)
