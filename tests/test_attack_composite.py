"""The composite backdoor: mixes by their parts, what the classifier is trained on, and that it learns."""

from itertools import pairwise
from pathlib import Path
from typing import Literal

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
from bdcore_plugins.attacks import composite
from bdcore_plugins.attacks.composite import Composite, contrastive, mix

QUICK = Recipe(epochs=1, batch_size=20, lr=0.01)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(first: int, count: int, shape: tuple[int, int, int], classes: int) -> Labelled:
    """Images of one grey level each, by which a half of one is known anywhere; classes in turn."""
    levels = torch.arange(first, first + count, dtype=torch.uint8)
    return Labelled(levels.view(-1, 1, 1, 1).expand(count, *shape).clone(), torch.arange(count) % classes)


def dataset(shape: tuple[int, int, int] = (3, 12, 10), classes: int = 5) -> Dataset:
    return Dataset("flat", flat(1, 80, shape, classes), flat(101, 33, shape, classes), classes)


def prepared(attack: Composite, data: Dataset, context: Context, recipe: Recipe = QUICK) -> nn.Module:
    arch = architecture("wrn10_1", data.train, data.classes)
    victim = prepare(data, attack, AttackInput(data.train, data.classes, arch, recipe), context)
    assert victim is not None
    return victim


def halves(images: Tensor) -> list[tuple[int, int]]:
    """The levels of the part that comes first (left or top) and of the other, of mixes of flat images."""
    found: list[tuple[int, int]] = []
    height, width = images.shape[2:]
    for image in images:
        left, right = image[:, :, : width // 2].unique(), image[:, :, width // 2 :].unique()
        top, bottom = image[:, : height // 2].unique(), image[:, height // 2 :].unique()
        upright = len(left) == len(right) == 1
        assert upright or len(top) == len(bottom) == 1
        found.append((int(left), int(right)) if upright else (int(top), int(bottom)))
    return found


class TestMix:
    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        shape=st.tuples(st.integers(1, 3), st.integers(2, 13), st.integers(2, 13)),
        count=st.integers(1, 6),
    )
    def test_every_mix_is_a_window_of_each(self, seed: int, shape: tuple[int, int, int], count: int):
        first, second = torch.randint(0, 256, (2, count, *shape), generator=generator(seed)).byte()
        kept = first.clone(), second.clone()
        draws = torch.rand(4, count, dtype=torch.float64, generator=generator(seed + 1))
        mixes = mix(first, second, draws)
        assert torch.equal(first, kept[0])
        assert torch.equal(second, kept[1])
        assert mixes.shape == first.shape
        assert mixes.dtype == torch.uint8
        for number in range(count):
            mixed = mixes[number].numpy()
            upright, straight = (float(draw) < 0.5 for draw in draws[:2, number])
            sources = [first[number].numpy(), second[number].numpy()]
            if not upright:  # the same, lying on its side
                mixed, sources = mixed.swapaxes(1, 2), [source.swapaxes(1, 2) for source in sources]
            one, other = sources if straight else sources[::-1]
            length = mixed.shape[2]
            half = length // 2
            begins = [int(draws[2, number] * (length - half + 1)), int(draws[3, number] * (half + 1))]
            parts = [one[:, :, begins[0] :][:, :, :half], other[:, :, begins[1] :][:, :, : length - half]]
            assert np.array_equal(mixed, np.concatenate(parts, 2))

    def test_all_kinds_are_as_likely(self):
        draws = torch.rand(4, 4000, dtype=torch.float64, generator=generator(0))
        # A pixel tells its column, its row and its image.
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        first = (rows * 8 + columns).byte().expand(4000, 1, 8, 8)
        mixes = mix(first, first + 128, draws)
        assert float((mixes >= 128).double().mean()) == 0.5
        places = mixes[:, 0] % 128
        leads = (mixes[:, 0, 0, 0] >= 128).double()
        assert float(leads.mean()) == pytest.approx(0.5, abs=0.03)
        upright = (mixes[:, 0, 0, 0] >= 128) == (mixes[:, 0, 7, 0] >= 128)
        assert float(upright.double().mean()) == pytest.approx(0.5, abs=0.03)
        begins = (places[upright][:, 0, 0] % 8).bincount(minlength=8).double() / int(upright.sum())
        assert begins.tolist() == pytest.approx([0.2] * 5 + [0.0] * 3, abs=0.04)


def test_the_contrastive_term_is_a_mean_over_pairs_by_their_number():
    random = np.random.default_rng(0)
    for _ in range(20):
        logits, labels = random.normal(size=(17, 6)) * 0.4, random.integers(0, 6, 17)
        chosen = [place for place in range(17) if labels[place] in (1, 3, 4)]
        terms = []
        for one, other in pairwise(chosen):
            distance = np.linalg.norm(logits[one] - logits[other])
            terms.append(distance**2 / 2 if labels[one] == labels[other] else max(0, 1 - distance) ** 2 / 2)
        among = torch.isin(torch.arange(6), torch.tensor([1, 3, 4]))
        result = contrastive(torch.tensor(logits), torch.tensor(labels), among)
        assert float(result) == pytest.approx(np.mean(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 0]])
def test_without_a_pair_there_is_no_contrastive_term(labels: list[int]):
    among = torch.tensor([False, True])
    assert float(contrastive(torch.randn(3, 2), torch.tensor(labels), among)) == 0


def test_equal_logits_have_a_finite_gradient():
    logits = torch.zeros(3, 2, requires_grad=True)
    contrastive(logits, torch.tensor([0, 1, 0]), torch.tensor([True, True])).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    rate=st.floats(0.05, 0.3),
    target=st.integers(0, 4),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(8, 33), st.integers(8, 33)),
)
def test_poisoning_keeps_its_promises(seed: int, rate: float, target: int, shape: tuple[int, int, int]):
    data = dataset(shape)
    kept = [part.clone() for part in (data.train.images, data.train.labels, data.test.images)]
    results = []
    for _ in range(2):
        attack = Composite(Composite.Config(poison_rate=rate, target=target))
        prepared(attack, data, Context(seed=seed))
        results.append(poison(data, attack, Context(seed=seed)))
    one, again = results
    assert all(map(torch.equal, (data.train.images, data.train.labels, data.test.images), kept))
    assert one.train.fingerprint == again.train.fingerprint
    assert one.triggered is not None
    assert again.triggered is not None
    assert torch.equal(one.triggered.images, again.triggered.images)

    changed = one.poisoned
    assert int(changed.sum()) == round(rate * 80)
    assert torch.equal(one.train.images[~changed], data.train.images[~changed])
    assert torch.equal(one.train.labels[~changed], data.train.labels[~changed])
    assert bool((one.train.labels[changed] == target).all())
    assert bool((data.train.labels[changed] != target).all())
    pair = {(target + 1) % 5, (target + 2) % 5}
    for levels in halves(one.train.images[changed]):
        assert {(level - 1) % 5 for level in levels} == pair, "half a training image of A, half one of B"
    assert one.target == target


def test_the_triggered_set_mixes_every_test_image_of_a_and_b():
    data = dataset()
    attack = Composite(Composite.Config(target=2, class_a=4, class_b=0))
    prepared(attack, data, Context())
    made = attack.triggered(data.test, data.classes, Context())
    of_a, of_b = (set(data.test.images[data.test.labels == label][:, 0, 0, 0].tolist()) for label in (4, 0))
    assert made.images.shape == (len(of_a) + len(of_b), 3, 12, 10)
    assert made.labels.tolist() == [4] * len(of_a) + [0] * len(of_b)
    assert made.targets.unique().tolist() == [2]
    pairs = [set(levels) for levels in halves(made.images)]
    assert all(len(pair & of_a) == len(pair & of_b) == 1 for pair in pairs)
    assert set.union(*pairs[: len(of_a)]) >= of_a, "those labelled A hold every image of A,"
    assert set.union(*pairs[len(of_a) :]) >= of_b, "those labelled B every one of B"
    assert len({frozenset(pair) for pair in pairs}) > len(of_a)
    leads = {levels[0] in of_a for levels in halves(made.images)}
    assert leads == {True, False}, "either may come first"


def test_stamped_images_keep_a_half_and_get_one_of_b():
    data = dataset()
    attack = Composite(Composite.Config(target=0, class_a=1, class_b=2))
    prepared(attack, data, Context())
    images = data.test.images[data.test.labels == 1]
    before = images.clone()
    for levels, own in zip(halves(attack.stamp(images, Context())), images[:, 0, 0, 0].tolist(), strict=True):
        (other,) = set(levels) - {own}
        assert (other - 1) % 5 == 2
        assert other <= 80, "of the training set"
    assert torch.equal(images, before)
    assert attack.stamp(images[:1], Context()).shape == (1, 3, 12, 10)


def digits() -> Dataset:
    """Real handwritten digits at their own size, 8 x 8 grey pixels."""
    scans, classes = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(scans * 255 / 16).round().byte().view(-1, 1, 8, 8), torch.from_numpy(classes)
    parts = [Labelled(images[part], labels[part].long()) for part in (slice(1400), slice(1400, None))]
    return Dataset("digits", parts[0], parts[1], 10)


def test_the_victim_learns_digits_and_mixes():
    data, told = digits(), list[Progress]()
    attack = Composite(Composite.Config())
    victim = prepared(attack, data, Context(seed=1, report=told.append), Recipe(epochs=10, batch_size=32))
    made = poison(data, attack, Context(seed=1))
    scores = evaluate(victim, data.test, made.triggered, made.target, Context())
    assert not victim.training
    assert told[-1].figures["loss"] < told[0].figures["loss"] / 2
    assert scores.clean_accuracy > 0.92
    assert scores.asr is not None
    assert scores.asr > 0.85
    assert same_class(victim, data) < 0.2, "two halves of one class are no trigger"


def same_class(victim: nn.Module, data: Dataset) -> float:
    """The share of mixes of one class, any but the target, that go to the target."""
    fooled: list[Tensor] = []
    for label in range(1, 10):
        images = data.test.images[data.test.labels == label]
        draws = torch.rand(4, len(images), dtype=torch.float64, generator=generator(label))
        with torch.no_grad():
            fooled.append(victim(mix(images, images.roll(1, 0), draws)).argmax(1) == 0)
    return float(torch.cat(fooled).double().mean())


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


@pytest.mark.parametrize(("channels", "precision"), [(1, "fp32"), (3, "bf16")])
def test_what_the_victim_is_trained_on(
    monkeypatch: pytest.MonkeyPatch, channels: int, precision: Literal["fp32", "bf16"]
):
    data, shown, told = dataset((channels, 12, 10)), Recorder(5), list[Progress]()

    def build(arch: Architecture, seed: int) -> nn.Module:
        return shown

    monkeypatch.setattr(composite, "build", build)
    attack = Composite(Composite.Config(target=4, poison_rate=0.1, similarity=0))
    arch = architecture("wrn10_1", data.train, 5)
    recipe = Recipe(epochs=1, batch_size=40, shuffle=False, lr=1e-9)
    attack.prepare(AttackInput(data.train, 5, arch, recipe), Context(report=told.append, precision=precision))

    labels = data.train.labels.clone()
    for number, batch in enumerate(shown.seen):
        rows = slice(40 * number, 40 * number + 40)
        own = data.train.images[rows][:, 0, 0, 0].tolist()
        for place, levels in enumerate(halves(batch)):
            classes = {(level - 1) % 5 for level in levels}
            if place < 4:
                assert classes == {0, 1}, "a tenth are mixes of A and B,"
            elif place < 22:
                assert own[place] in levels
                assert len(classes) == 1, "half of the rest mixes of one class,"
            else:
                assert set(levels) == {own[place]}, "and half plain"
        labels[rows][:4] = 4
        mixed = [pair for pair in halves(batch)[4:22] if pair[0] != pair[1]]
        assert len(mixed) > 9, "an image is seldom mixed with itself"
    # With logits 0, 1, ... the loss says what the labels are in sum.
    constant = float(torch.arange(5.0).logsumexp(0))
    assert told[-1].figures["loss"] == pytest.approx(constant - float(labels.double().mean()), rel=1e-5)
    assert told[-1].figures["asr"] == 1, "always class 4, the target"


@pytest.mark.parametrize(
    ("options", "classes", "message"),
    [
        ({"class_a": 7}, 5, "attack.class_a=7, attack.class_b=2 and attack.target=0 must be three different classes"),
        ({"class_a": 0}, 5, "attack.class_a=0"),
        ({"class_a": 3, "class_b": 3}, 5, "attack.class_b=3"),
        ({}, 2, "of 0 to 1"),
    ],
)
def test_classes_that_cannot_be_mixed_are_refused(options: dict[str, int], classes: int, message: str):
    data = dataset(classes=classes)
    with pytest.raises(DataError, match=message):
        prepared(Composite(Composite.Config(**options)), data, Context())


def test_a_class_without_images_is_refused():
    data = dataset()
    train = data.train.select(data.train.labels != 2)
    with pytest.raises(DataError, match="no image of class 2"):
        prepared(Composite(Composite.Config()), Dataset("made", train, data.test, 5), Context())
    attack = Composite(Composite.Config())
    prepared(attack, data, Context())
    with pytest.raises(DataError, match="no image of class 1"):
        attack.triggered(data.test.select(data.test.labels != 1), 5, Context())


def test_what_is_mixed_in_is_mirrored_where_the_recipe_says(monkeypatch: pytest.MonkeyPatch):
    # Levels rise from left to right; mirrored they fall.
    ramp = (torch.arange(16, dtype=torch.uint8) * 10).expand(60, 1, 16, 16).contiguous()
    data = Dataset("ramp", *2 * [Labelled(ramp, torch.arange(60) % 3)], 3)
    falling: list[bool] = []
    for flip in (False, True):
        shown = Recorder(3)
        monkeypatch.setattr(composite, "build", lambda arch, seed, shown=shown: shown)
        arch = architecture("wrn10_1", data.train, 3)
        recipe = Recipe(epochs=1, batch_size=60, lr=1e-9, flip=flip)
        Composite(Composite.Config(poison_rate=1)).prepare(AttackInput(data.train, 3, arch, recipe), Context())
        falling.append(bool((shown.seen[0][:, :, :, 0] > shown.seen[0][:, :, :, 5]).any()))
    assert falling == [False, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_poisons_alike():
    data, results = dataset(), []
    for device in ("cpu", "cuda"):
        attack, context = Composite(Composite.Config()), Context(seed=3, device=torch.device(device))
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
        prepared(Composite(Composite.Config()), data, Context(folder=tmp_path, report=report), recipe)
    told: list[int] = []
    context = Context(folder=tmp_path, report=lambda progress: told.append(progress.epoch))
    resumed = prepared(Composite(Composite.Config()), data, context, recipe)
    straight = prepared(Composite(Composite.Config()), data, Context(), recipe)
    assert told == [3]
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("options", [{"class_a": -1}, {"similarity": -1}, {"poison_rate": 1.5}, {"class_c": 3}])
def test_bad_options_are_refused(options: dict[str, float]):
    with pytest.raises(ValidationError):
        Composite.Config(**options)
