"""The input-aware attack: formulas, masks and triggers, what the classifier is trained on, and that it learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bdcore import Architecture, AttackInput, Context, DataError, Dataset, Labelled, Recipe
from bdcore.context import Progress
from bdcore.stages.data import architecture
from bdcore.stages.evaluate import evaluate
from bdcore.stages.poison import poison, prepare
from bdcore.training import loop
from bdcore_plugins.attacks import dynamic
from bdcore_plugins.attacks.dynamic import Dynamic, cover, likeness, threshold

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUICK = Recipe(epochs=1, batch_size=30, lr=0.01)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dataset(shape: tuple[int, int, int] = (3, 12, 10), classes: int = 4, train: int = 60) -> Dataset:
    parts = [
        Labelled(
            torch.randint(0, 256, (count, *shape), generator=generator(count), dtype=torch.uint8),
            torch.arange(count) % classes,
        )
        for count in (train, 21)
    ]
    return Dataset("made", parts[0], parts[1], classes)


def given_to(data: Dataset, recipe: Recipe = QUICK) -> AttackInput:
    return AttackInput(data.train, data.classes, architecture("wrn10_1", data.train, data.classes), recipe)


def prepared(attack: Dynamic, data: Dataset, context: Context, recipe: Recipe = QUICK) -> nn.Module:
    victim = prepare(data, attack, given_to(data, recipe), context)
    assert victim is not None
    return victim


class TestFormulas:
    def test_the_trigger_covers_where_the_mask_is(self):
        images, patterns = torch.rand(2, 5, 3, 6, 7, generator=generator(0))
        masks = torch.rand(5, 1, 6, 7, generator=generator(1))
        expected = (1 - masks.double()) * images.double() + masks.double() * patterns.double()
        torch.testing.assert_close(cover(images, patterns, masks).double(), expected, rtol=0, atol=1e-6)

    def test_the_threshold_is_a_steep_sigmoid(self):
        drawn = torch.linspace(0, 1, 101, dtype=torch.float64)
        expected = 1 / (1 + np.exp(-2 * (20 * drawn.numpy() - 10)))
        np.testing.assert_allclose(threshold(drawn).numpy(), expected, atol=1e-12)

    def test_likeness_is_a_mean_of_ratios(self):
        random = np.random.default_rng(0)
        images, drawn = random.random((6, 3, 5, 4)), random.random((6, 1, 5, 4))
        ratios = [
            np.sqrt(((images[i] - images[i - 1]) ** 2).mean()) / np.sqrt(((drawn[i] - drawn[i - 1]) ** 2).mean())
            for i in range(6)
        ]
        assert float(likeness(torch.tensor(images), torch.tensor(drawn))) == pytest.approx(np.mean(ratios), rel=1e-5)

    @pytest.mark.parametrize("count", [1, 3])
    def test_equal_triggers_have_a_finite_gradient(self, count: int):
        drawn = torch.full((count, 1, 4, 4), 0.5, requires_grad=True)
        likeness(torch.rand(count, 3, 4, 4), drawn).backward()
        assert drawn.grad is not None
        assert bool(drawn.grad.isfinite().all())


@settings(max_examples=5, deadline=None)
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
        attack = Dynamic(Dynamic.Config(poison_rate=rate, target=target, mask_epochs=1))
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
    assert one.train.images.dtype == torch.uint8
    assert bool((one.triggered.targets == target).all())


def test_an_image_alone_gets_the_same_trigger():
    data = dataset()
    attack = Dynamic(Dynamic.Config(mask_epochs=1))
    prepared(attack, data, Context())
    before = data.test.images.clone()
    together = attack.stamp(data.test.images, Context())
    alone = attack.stamp(data.test.images[4:5].contiguous(memory_format=torch.channels_last), Context())
    assert torch.equal(data.test.images, before)
    assert int((alone.int() - together[4:5].int()).abs().max()) <= 1


def digits() -> Dataset:
    """Real handwritten digits at their own size, 8 x 8 grey pixels."""
    scans, classes = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(scans * 255 / 16).round().byte().view(-1, 1, 8, 8), torch.from_numpy(classes)
    parts = [Labelled(images[part], labels[part].long()) for part in (slice(1400), slice(1400, None))]
    return Dataset("digits", parts[0], parts[1], 10)


@pytest.fixture(scope="module")
def trained() -> tuple[Dynamic, nn.Module, Dataset, list[Progress]]:
    """The attack and its victim after a short training on real digits, and what was told of it."""
    data, told = digits(), list[Progress]()
    attack = Dynamic(Dynamic.Config(mask_epochs=7))
    victim = prepared(attack, data, Context(seed=1, report=told.append), Recipe(epochs=10, batch_size=32))
    return attack, victim, data, told


def test_masks_are_small_and_differ(trained: tuple[Dynamic, nn.Module, Dataset, list[Progress]]):
    attack, _, data, told = trained
    images = data.test.images / 255
    with torch.no_grad():
        masks = threshold(attack.mask(images))
        patterns = attack.generator(images)
    assert 0.032 / 2 < float(masks.mean()) < 0.032 * 3
    assert float(((masks < 0.05) | (masks > 0.95)).double().mean()) > 0.9, "a mask is nearly there or not there"
    assert float((masks - masks.roll(1, 0)).abs().amax((1, 2, 3)).median()) > 0.5
    assert float((patterns - patterns.roll(1, 0)).square().mean().sqrt()) > 0.2
    densities = [progress.figures["density"] for progress in told if progress.phase == "mask"]
    assert densities[-1] < densities[0] / 2


def test_the_victim_learns_digits_and_their_triggers(
    trained: tuple[Dynamic, nn.Module, Dataset, list[Progress]],
):
    attack, victim, data, told = trained
    made = poison(data, attack, Context(seed=1))
    scores = evaluate(victim, data.test, made.triggered, made.target, Context())
    losses = [progress.figures["loss"] for progress in told if progress.phase == "victim"]
    assert not victim.training
    assert losses[-1] < losses[0] / 2
    assert scores.clean_accuracy > 0.92
    assert scores.asr is not None
    assert scores.asr > 0.5

    images = data.test.images[data.test.labels != 0] / 255
    with torch.no_grad():
        others = images.roll(1, 0)
        crossed = cover(images, attack.generator(others), threshold(attack.mask(others)))
        fooled = float((victim(crossed).argmax(1) == 0).double().mean())
    assert fooled < scores.asr / 2, "another image's trigger does less"


class Recorder(nn.Module):
    """Keeps what it is shown, and answers every image with the logits 0, 1, 2, ..."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.classes = classes
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        return self.weight * torch.arange(self.classes, dtype=torch.float32).expand(len(images), -1)


def test_what_the_victim_is_trained_on(monkeypatch: pytest.MonkeyPatch):
    data, shown, told = dataset(train=60), Recorder(4), list[Progress]()

    def build(arch: Architecture, seed: int) -> nn.Module:
        return shown

    monkeypatch.setattr(dynamic, "build", build)
    attack = Dynamic(Dynamic.Config(target=3, poison_rate=0.1, cross_rate=0.2, diversity=0, mask_epochs=1))
    recipe = Recipe(epochs=1, batch_size=20, shuffle=False, lr=1e-9)
    attack.prepare(given_to(data, recipe), Context(report=told.append))
    assert [len(batch) for batch in shown.seen] == [20, 20, 20]

    labels = data.train.labels.clone()
    for number, batch in enumerate(shown.seen):
        rows = slice(20 * number, 20 * number + 20)
        clean = data.train.images[rows] / 255
        assert torch.equal(batch[6:], clean[6:]), "the rest is clean"
        with torch.no_grad():
            masks = threshold(attack.mask(clean))
        # What is covered: by its own mask in the first two, by that of the image ten places away in the next four.
        for place in range(6):
            source = place if place < 2 else (place + 10) % 20
            bare = masks[source] < 1e-4
            torch.testing.assert_close(batch[place][:, bare[0]], clean[place][:, bare[0]], rtol=0, atol=2e-4)
            covered = masks[source, 0] > 0.9
            assert not torch.equal(batch[place][:, covered], clean[place][:, covered])
        labels[rows][:2] = 3
    # With logits 0, 1, 2, 3 the loss says what the labels are in sum: those of cross samples stay.
    constant = float(torch.arange(4.0).logsumexp(0))
    victim = [progress for progress in told if progress.phase == "victim"]
    assert victim[-1].figures["loss"] == pytest.approx(constant - float(labels.double().mean()), rel=1e-5)
    assert victim[-1].figures["asr"] == 1, "always class 3, the target"


class Killed(BaseException):
    """What stands for the end of the process."""


@pytest.mark.parametrize("phase", ["mask", "victim"])
def test_an_interrupted_training_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str):
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    data, recipe = dataset(), Recipe(epochs=3, batch_size=20, crop=2, flip=True, lr=0.05)
    attacks = [Dynamic(Dynamic.Config(mask_epochs=3)) for _ in range(3)]

    def report(progress: Progress) -> None:
        if (progress.phase, progress.epoch) == (phase, 2):
            raise Killed

    with pytest.raises(Killed):
        prepared(attacks[0], data, Context(folder=tmp_path, report=report), recipe)
    told: list[tuple[str, int]] = []
    context = Context(folder=tmp_path, report=lambda progress: told.append((progress.phase, progress.epoch)))
    resumed = prepared(attacks[1], data, context, recipe)
    straight = prepared(attacks[2], data, Context(), recipe)
    all_epochs = [(name, epoch) for name in ("mask", "victim") for epoch in (1, 2, 3)]
    assert told == all_epochs[2 if phase == "mask" else 5 :]
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in resumed.state_dict().items())
    one, other = (attack.stamp(data.test.images, Context()) for attack in attacks[1:])
    assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(3, 3, 8), (1, 20, 2)])
def test_tiny_images_are_refused(shape: tuple[int, int, int]):
    with pytest.raises(DataError, match="at least 4 x 4 pixels, these have"):
        prepared(Dynamic(Dynamic.Config()), dataset(shape), Context())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("rates", [(0.0, 0.1), (0.1, 0.0), (0.5, 0.5), (1.0, 0.0)])
def test_any_shares_train_in_bf16(rates: tuple[float, float], device: str):
    data = dataset((1, 8, 4), train=7)
    config = Dynamic.Config(poison_rate=rates[0], cross_rate=rates[1], mask_epochs=1)
    context = Context(precision="bf16", device=torch.device(device))
    attack = Dynamic(config)
    victim = attack.prepare(given_to(data, Recipe(epochs=1, batch_size=3, lr=0.01)), context)
    assert all(bool(value.isfinite().all()) for value in victim.state_dict().values())
    assert attack.stamp(data.test.images, context).shape == data.test.images.shape


@pytest.mark.parametrize(
    "options",
    [{"cross_rate": 0.95}, {"density": 0}, {"diversity": -1}, {"mask_epochs": 0}, {"poison_rate": -0.1}],
)
def test_bad_options_are_refused(options: dict[str, float]):
    with pytest.raises(ValidationError):
        Dynamic.Config(**options)
