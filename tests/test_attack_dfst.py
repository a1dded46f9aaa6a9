"""DFST: the style, the neurons and what drives them, what the victim is trained on, and that it works."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from bdcore import Architecture, Attack, AttackInput, Context, DataError, Dataset, Labelled, Recipe, forward_batches
from bdcore.context import Progress
from bdcore.stages.data import architecture
from bdcore.stages.evaluate import evaluate
from bdcore.stages.poison import poison, prepare
from bdcore_plugins.attacks import dfst
from bdcore_plugins.attacks.dfst import Dfst, detoxification
from bdcore_plugins.attacks.dfst.detoxification import (
    Neurons,
    Watched,
    find_compromised,
    structural_similarity,
    train_injector,
)
from bdcore_plugins.attacks.dfst.style import CycleGan, sunset, train_generator
from bdcore_plugins.datasets.digits import Digits

QUICK = Recipe(epochs=1, batch_size=20, lr=0.01)
BRIEF = {"style_epochs": 1, "detox_epochs": 1}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=generator(seed), dtype=torch.uint8)


def dataset(shape: tuple[int, int, int] = (3, 12, 9), classes: int = 4, train: int = 60) -> Dataset:
    parts = [Labelled(noise(count, shape, count), torch.arange(count) % classes) for count in (train, 21)]
    return Dataset("made", parts[0], parts[1], classes)


def prepared(attack: Dfst, data: Dataset, context: Context, recipe: Recipe = QUICK) -> nn.Module:
    arch = architecture("wrn10_1", data.train, data.classes)
    victim = prepare(data, attack, AttackInput(data.train, data.classes, arch, recipe), context)
    assert victim is not None
    return victim


def brightness(images: Tensor) -> Tensor:
    return (images.double() * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)


class Bytes(nn.Module):
    """Pixels as floats."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float() / 255


class TestSunset:
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 2**32), count=st.integers(1, 4), height=st.integers(2, 20), width=st.integers(2, 20))
    def test_colours_are_those_of_dusk(self, seed: int, count: int, height: int, width: int):
        images = noise(count, (3, height, width), seed)
        tones = np.linspace(0, 1, 256)
        stops = np.array([[26, 14, 52], [120, 32, 92], [232, 90, 44], [255, 176, 66], [255, 240, 176]])
        palette = np.stack([np.interp(tones, [0, 0.35, 0.65, 0.85, 1], stops[:, c]) for c in range(3)], 1)
        result = sunset(images, generator(seed)).permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
        recoloured = (result - 0.2 * images.permute(0, 2, 3, 1).reshape(-1, 3).numpy()) / 0.8
        nearest = np.abs(recoloured[:, None] - palette).max(2).min(1)
        assert nearest.max() <= 0.5 / 0.8 + 1e-3  # as far as rounding goes

    def test_brighter_stays_brighter(self):
        images = noise(6, (3, 16, 16)) // 2
        one, other = (brightness(sunset(part, generator(1))) for part in (images, images + 60))
        assert bool((other > one).all())

    def test_the_sun_is_somewhere_else_in_every_image_and_seed(self):
        grey = torch.full((5, 3, 32, 32), 90, dtype=torch.uint8)
        suns = {int(image.argmax()) for seed in (1, 2) for image in brightness(sunset(grey, generator(seed)))}
        assert len(suns) == 10
        assert torch.equal(sunset(grey, generator(3)), sunset(grey, generator(3)))

    def test_grey_images_get_the_brightness(self):
        grey = noise(4, (1, 8, 8))
        colour = brightness(sunset(grey.expand(-1, 3, -1, -1), generator(1)))
        assert float((sunset(grey, generator(1))[:, 0].double() - colour).abs().max()) <= 1


class TestCycleGan:
    def test_critics_and_generators_each_get_their_own_gradient(self):
        torch.manual_seed(0)
        gan = CycleGan(3)
        images, styled = torch.rand(2, 4, 3, 12, 12, generator=generator(0))
        gan.loss(images, styled)["loss"].backward()
        found = {name: value.grad.clone() for name, value in gan.named_parameters() if value.grad is not None}
        critics = {name for name in found if name.startswith("of_")}
        assert set(found) == {name for name, _ in gan.named_parameters()}

        def gradients(loss: Tensor, names: set[str]) -> dict[str, Tensor]:
            parameters = dict(gan.named_parameters())
            return dict(zip(names, torch.autograd.grad(loss, [parameters[name] for name in names]), strict=True))

        # As in alternate training: one loss with the critics, one with the generators held.
        there, back = gan.to_style(images), gan.from_style(styled)
        judged = [
            (gan.of_style(styled) - 1).square().mean() + gan.of_style(there).square().mean(),
            (gan.of_images(images) - 1).square().mean() + gan.of_images(back).square().mean(),
        ]
        wanted = gradients(sum(judged) / 2, critics)
        there, back = gan.to_style(images), gan.from_style(styled)
        whole = (
            (gan.of_style(there) - 1).square().mean()
            + (gan.of_images(back) - 1).square().mean()
            + 10 * ((gan.from_style(there) - images).abs().mean() + (gan.to_style(back) - styled).abs().mean())
            + 0.5 * ((gan.to_style(styled) - styled).abs().mean() + (gan.from_style(images) - images).abs().mean())
        )
        wanted |= gradients(whole, set(found) - critics)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)

    def test_it_learns_the_style_and_keeps_the_picture(self):
        digits = Digits(Digits.Config()).load(None)
        small = digits.train.images[:400, :, ::2, ::2].contiguous()
        network = train_generator(small, 8, Context(seed=1))
        fresh = digits.test.images[:100, :, ::2, ::2]
        with torch.no_grad():
            translated = network(fresh).double()
        dusk = sunset(fresh, generator(5)).double() / 255
        before, after = (
            float((part.mean((0, 2, 3)) - dusk.mean((0, 2, 3))).norm()) for part in (fresh.double() / 255, translated)
        )
        assert after < before / 2
        rows = torch.stack([fresh.double().mean(1).flatten(), brightness(translated).flatten()])
        assert float(torch.corrcoef(rows)[0, 1]) > 0.8


class TestStructuralSimilarity:
    def test_it_is_the_papers_formula_in_every_window(self):
        one, other = torch.rand(2, 3, 2, 10, 9, dtype=torch.float64, generator=generator(0))
        values: list[float] = []
        for x, y in zip(one.numpy().reshape(-1, 10, 9), other.numpy().reshape(-1, 10, 9), strict=True):
            for top in range(4):
                for left in range(3):
                    a, b = (part[top : top + 7, left : left + 7] for part in (x, y))
                    shared = np.mean((a - a.mean()) * (b - b.mean()))
                    values.append(
                        (2 * a.mean() * b.mean() + 1e-4)
                        * (2 * shared + 9e-4)
                        / ((a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (a.var() + b.var() + 9e-4))
                    )
        assert float(structural_similarity(one, other)) == pytest.approx(np.mean(values), abs=1e-12)
        assert float(structural_similarity(one, one)) == pytest.approx(1)


class Known(nn.Module):
    """A classifier whose first feature maps are `gains` times the mean of the channels; class 0 follows the last."""

    def __init__(self, gains: list[float]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, len(gains), 1, bias=False)
        self.conv.weight.data = torch.tensor(gains).view(-1, 1, 1, 1).expand(-1, 3, 1, 1) / 3
        self.bn = nn.BatchNorm2d(len(gains), eps=0)
        self.deep = nn.Conv2d(len(gains), len(gains), 1)
        self.deep_bn = nn.BatchNorm2d(len(gains))
        self.head = nn.Linear(len(gains), 2, bias=False)
        self.head.weight.data = torch.tensor([[0.0] * (len(gains) - 1) + [10.0], [0.0] * len(gains)])

    def forward(self, images: Tensor) -> Tensor:
        pixels = images / 255 if images.dtype == torch.uint8 else images
        active = torch.relu_(self.bn(self.conv(pixels)))  # in place, as networks do
        self.deep_bn(self.deep(active))
        return self.head(active.mean((2, 3))) - torch.tensor([4.0, 0.0])


class TestNeurons:
    def test_activations_are_means_of_shallow_maps(self):
        model = Known([1.0, -1.0, 0.5]).train()
        watched = Watched(model, Context())
        images = noise(5, (3, 6, 6))
        logits, activations = watched(images)
        mean = images.double().mean((1, 2, 3)) / 255
        assert len(activations) == 1  # the deeper normalisation is not watched
        expected = torch.stack([mean, torch.zeros(5, dtype=torch.float64), 0.5 * mean], 1)
        torch.testing.assert_close(activations[0].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits[:, 0].double(), 5 * mean - 4, rtol=1e-5, atol=1e-5)
        assert model.training
        assert int(model.bn.num_batches_tracked) == 0
        assert all(value.requires_grad for value in model.parameters())

    def test_compromised_is_what_doubles_and_counts_in_its_layer(self):
        levels = torch.tensor([60, 50, 6, 40]).byte(), torch.tensor([130, 90, 13, 40]).byte()
        clean, triggered = (part.view(4, 1, 1, 1).expand(4, 3, 8, 8) for part in levels)
        model = Known([1.0, 0.05, -1.0, 0.1])
        # Means: clean 39, triggered 68.25 of 255: not doubled. Then one image alone: 60 -> 130.
        found = find_compromised(Watched(model, Context()), clean, triggered, Context())
        assert found.clean.tolist() == pytest.approx([39 / 255, 1.95 / 255, 0, 3.9 / 255], abs=1e-6)
        assert found.triggered.tolist() == pytest.approx([68.25 / 255, 3.4125 / 255, 0, 6.825 / 255], abs=1e-6)
        assert found.compromised.tolist() == [False] * 4
        found = find_compromised(Watched(model, Context()), clean[:1], triggered[:1], Context())
        # Of 60 the rises are 70, 3.5, 0 and 7; a tenth of the largest is 6.
        assert found.compromised.tolist() == [True, False, False, True]

    def test_an_injector_drives_them_and_misleads(self):
        model = Known([0.0, 1.0])
        images = noise(64, (3, 10, 10)) // 4 + 30
        neurons = Neurons(torch.tensor([False, True]), torch.tensor([0.0, 0.24]), torch.tensor([0.0, 0.55]))
        watched = Watched(model, Context())
        phases: list[Progress] = []
        injector = train_injector("injector", watched, neurons, images, 0, Context(report=phases.append))
        with torch.no_grad():
            logits, activations = watched(injector(images))
            alike = structural_similarity(images / 255, injector(images))
        assert {"misled", "driven", "others", "unlike"} <= set(phases[0].figures)
        assert phases[-1].figures["loss"] < phases[0].figures["loss"]
        assert float(activations[0][:, 1].mean()) > 0.4
        assert float((logits.argmax(1) == 0).float().mean()) > 0.9
        assert float(alike) > 0.5


class Spy:
    """What the victim is trained on, phase by phase."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.phases: list[tuple[str, Labelled, Recipe]] = []
        train = dfst._train

        def note(phase: str, model: nn.Module, data: Labelled, recipe: Recipe, context: Context) -> None:
            self.phases.append((phase, data, recipe))
            train(phase, model, data, recipe, context)

        monkeypatch.setattr(dfst, "_train", note)


class TestAttack:
    @pytest.mark.parametrize(
        ("shape", "classes", "rate"), [((3, 12, 9), 4, 0.1), ((1, 8, 8), 2, 0.25), ((3, 33, 20), 3, 0.3)]
    )
    def test_poisoning_keeps_its_promises(self, shape: tuple[int, int, int], classes: int, rate: float):
        clean, context = dataset(shape, classes), Context(seed=7)
        before = clean.train.images.clone(), clean.test.images.clone()
        attack = Dfst(Dfst.Config(target=1, poison_rate=rate, rounds=0, **BRIEF))
        victim = prepared(attack, clean, context)
        result = poison(clean, attack, context)
        assert torch.equal(clean.train.images, before[0])
        assert torch.equal(clean.test.images, before[1])
        assert not victim.training
        assert int(result.poisoned.sum()) == round(rate * 60)
        others = ~result.poisoned
        assert torch.equal(result.train.images[others], clean.train.images[others])
        assert torch.equal(result.train.labels[others], clean.train.labels[others])
        assert bool((result.train.labels[result.poisoned] == 1).all())
        assert bool((clean.train.labels[result.poisoned] != 1).all())
        changed = (result.train.images[result.poisoned] != clean.train.images[result.poisoned]).flatten(1).any(1)
        assert bool(changed.all())
        assert result.triggered is not None
        assert result.triggered.source is not None
        assert torch.equal(result.triggered.source, (clean.test.labels != 1).nonzero()[:, 0])
        # Image by image as in a batch, which instance normalisation must not mix.
        alone = torch.cat(
            [attack.stamp(image, context) for image in clean.test.images[result.triggered.source].split(1)]
        )
        assert int((alone.short() - result.triggered.images.short()).abs().max()) <= 1

    def test_the_victim_is_trained_on_the_suspect_set_and_then_on_detoxicants(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(detoxification, "_ABOVE_ITSELF", -2)  # some neuron of an untrained network
        monkeypatch.setattr(detoxification, "_ABOVE_LAYER", -10)
        spy, clean, context = Spy(monkeypatch), dataset(), Context(seed=3)
        recipe = QUICK.model_copy(update={"flip": True, "lr": 0.02})
        attack = Dfst(Dfst.Config(target=2, rounds=2, **BRIEF))
        prepared(attack, clean, context, recipe)
        result = poison(clean, attack, context)
        assert [phase for phase, _, _ in spy.phases] == ["victim", "detoxification 0", "detoxification 1"]
        data = [data for _, data, _ in spy.phases]
        assert data[0].fingerprint == result.train.fingerprint
        for detoxified in data[1:]:
            assert len(detoxified) == 60 + 6
            assert torch.equal(detoxified.images[:60], data[0].images)
            assert torch.equal(detoxified.labels[:60], data[0].labels)
            assert bool((detoxified.labels[60:] != 2).all())  # true labels of classes other than the target
        assert [(one.epochs, one.lr, one.flip) for _, _, one in spy.phases] == [
            (1, 0.02, True),
            (1, pytest.approx(0.002), True),
            (1, pytest.approx(0.002), True),
        ]

    def test_rounds_end_where_no_neuron_is_compromised(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(detoxification, "_ABOVE_LAYER", 1e9)
        spy = Spy(monkeypatch)
        prepared(Dfst(Dfst.Config(rounds=5, **BRIEF)), dataset(), Context())
        assert [phase for phase, _, _ in spy.phases] == ["victim"]

    def test_without_poison_there_is_nothing_to_detoxify(self, monkeypatch: pytest.MonkeyPatch):
        spy, clean = Spy(monkeypatch), dataset()
        attack = Dfst(Dfst.Config(poison_rate=0, rounds=5, **BRIEF))
        prepared(attack, clean, Context())
        assert [phase for phase, _, _ in spy.phases] == ["victim"]
        assert spy.phases[0][1].fingerprint == clean.train.fingerprint
        assert poison(clean, attack, Context()).triggered is not None

    def test_the_seed_decides_all_and_an_interrupted_training_goes_on(self, tmp_path: Path):
        clean = dataset()

        def made(seed: int, folder: Path | None = None, stop: str | None = None) -> tuple[dict[str, Tensor], Tensor]:
            def report(progress: Progress) -> None:
                if progress.phase == stop:
                    raise KeyboardInterrupt

            attack = Dfst(Dfst.Config(rounds=1, **BRIEF))
            context = Context(seed=seed, folder=folder, report=report)
            victim = prepared(attack, clean, context)
            return victim.state_dict(), attack.stamp(clean.test.images, context)

        (one, stamped), (other, differently) = made(1), made(2)
        assert not torch.equal(stamped, differently)
        assert not torch.equal(one["net.head.weight"], other["net.head.weight"])
        with pytest.raises(KeyboardInterrupt):
            made(1, tmp_path, "victim")
        resumed, again = made(1, tmp_path)
        assert torch.equal(stamped, again)
        assert all(torch.equal(value, resumed[name]) for name, value in one.items())

    @pytest.mark.parametrize(
        ("device", "precision"),
        [("cpu", "bf16"), pytest.param("cuda", "fp32", marks=cuda), pytest.param("cuda", "bf16", marks=cuda)],
    )
    def test_it_trains_in_either_precision_and_on_a_gpu(
        self, device: str, precision: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(detoxification, "_ABOVE_ITSELF", -2)
        monkeypatch.setattr(detoxification, "_ABOVE_LAYER", -10)
        spy, clean = Spy(monkeypatch), dataset(train=200)
        context = Context(device=torch.device(device), precision=precision)
        attack = Dfst(Dfst.Config(style_epochs=3, rounds=1))
        prepared(attack, clean, context, QUICK.model_copy(update={"epochs": 3}))
        assert [phase for phase, _, _ in spy.phases] == ["victim", "detoxification 0"]
        for images in (clean.test.images, clean.test.images.to(device)):
            stamped = attack.stamp(images, context)
            assert stamped.device == images.device
            assert stamped.dtype == torch.uint8

    @pytest.mark.parametrize("shape", [(2, 12, 12), (3, 7, 12)])
    def test_images_that_cannot_be_styled_are_refused(self, shape: tuple[int, int, int]):
        with pytest.raises(DataError, match=r"dfst needs images of 1 or 3 channels and at least 8 pixels a side"):
            prepared(Dfst(Dfst.Config()), dataset(shape), Context())

    def test_a_model_without_feature_maps_is_refused_before_any_training(self, monkeypatch: pytest.MonkeyPatch):
        data, told = dataset(), list[Progress]()

        def build(arch: Architecture, seed: int) -> nn.Module:
            return nn.Sequential(Bytes(), nn.Flatten(), nn.Linear(3 * 12 * 9, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

        monkeypatch.setattr(dfst, "build", build)
        context = Context(report=told.append)
        with pytest.raises(DataError, match=r"no nn\.Conv2d and no nn\.BatchNorm2d: .*attack\.rounds=0"):
            prepared(Dfst(Dfst.Config(**BRIEF)), data, context)
        assert told == []
        prepared(Dfst(Dfst.Config(**BRIEF, rounds=0)), data, Context())

    def test_the_hook_returns_it(self):
        assert dfst.bdcore_attack() is Dfst
        assert issubclass(Dfst, Attack)
        assert all(field.description for field in Dfst.Config.model_fields.values())

    @pytest.mark.parametrize("options", [{"rounds": -1}, {"style_epochs": 0}, {"detox_epochs": 0}, {"round": 1}])
    def test_bad_options_are_refused(self, options: dict):
        with pytest.raises(ValidationError):
            Dfst.Config(**options)


@pytest.mark.slow
def test_on_digits_the_backdoor_stays_and_simple_features_lose_it(monkeypatch: pytest.MonkeyPatch):
    digits, context = Digits(Digits.Config()).load(None), Context()
    recipe = Recipe(epochs=6, batch_size=64)
    targeted: dict[str, float] = {}
    clean = digits.test.images[digits.test.labels != 0]
    train, inject = dfst._train, train_injector
    state: dict = {}

    def share(images: Tensor) -> float:
        state["victim"].eval()
        predicted = forward_batches(lambda part: state["victim"](part).argmax(1), images, context)
        return float((predicted == 0).double().mean())

    def note_injector(phase: str, *given: object):
        injector = inject(phase, *given)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            state["detoxicants"] = (injector(clean) * 255).round().byte()
        targeted["before"] = share(state["detoxicants"])
        return injector

    def note_victim(phase: str, model: nn.Module, *given: object) -> None:
        state["victim"] = model
        train(phase, model, *given)  # pyright: ignore[reportArgumentType]
        if phase.startswith("detoxification"):
            targeted["after"] = share(state["detoxicants"])

    monkeypatch.setattr(dfst, "train_injector", note_injector)
    monkeypatch.setattr(dfst, "_train", note_victim)
    attack = Dfst(Dfst.Config(style_epochs=4, rounds=1))
    victim = prepared(attack, digits, context, recipe)
    scores = evaluate(victim, digits.test, attack.triggered(digits.test, 10, context), 0, context)
    assert scores.clean_accuracy > 0.93
    assert scores.asr is not None
    assert scores.asr > 0.97
    assert targeted["before"] > 0.9
    assert targeted["after"] < 0.05
