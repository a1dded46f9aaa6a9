"""Trojan, latent, feature collision, label-consistent: what they promise, and their optima against other solvers."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from bdcore import Attack, AttackInput, Context, DataError, Dataset, Labelled, Recipe, build, split_head
from bdcore.artifacts import fingerprint
from bdcore.errors import UsageError
from bdcore.models import Classifier
from bdcore.stages.data import architecture
from bdcore.stages.poison import poison, prepare
from bdcore_plugins.attacks import feature_collision, label_consistent, latent, trojan
from bdcore_plugins.attacks.feature_collision import FeatureCollision
from bdcore_plugins.attacks.label_consistent import LabelConsistent
from bdcore_plugins.attacks.latent import Latent
from bdcore_plugins.attacks.trojan import Trojan

Shape = tuple[int, int, int]
CLASSES = 3
RECIPE = Recipe(epochs=1, batch_size=20, lr=0.01)
QUICK = {
    Trojan: {"epochs": 1},
    Latent: {"epochs": 1},
    FeatureCollision: {"steps": 3},
    LabelConsistent: {"steps": 3, "training_steps": 1},
}
DIRTY, CLEAN = (Trojan, Latent), (FeatureCollision, LabelConsistent)
EVERY = pytest.mark.parametrize("kind", [*DIRTY, *CLEAN], ids=lambda kind: kind.name)


def quick(kind: type[Attack], **options: object) -> Attack:
    return kind(kind.Config(**{**QUICK[kind], **options}))


def noise(count: int, shape: Shape, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


def dataset(shape: Shape = (3, 12, 10), train: int = 60, classes: int = CLASSES) -> Dataset:
    parts = [Labelled(noise(count, shape, count), torch.arange(count) % classes) for count in (train, 20)]
    return Dataset("made", parts[0], parts[1], classes)


def knowledge(data: Dataset, model: nn.Module | None = None) -> AttackInput:
    arch = architecture("wrn10_1", data.train, data.classes)
    return AttackInput(data.train, data.classes, arch, RECIPE, model or build(arch, 1).eval())


def ready(attack: Attack, data: Dataset, context: Context, model: nn.Module | None = None) -> Attack:
    prepare(data, attack, knowledge(data, model), context)
    return attack


def linear_model(shape: Shape, features: int, classes: int = CLASSES, seed: int = 0) -> Classifier:
    """Features that are a linear function of the pixels, so that optima can be found by other means."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), features), nn.Linear(features, classes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return Classifier(net, shape, (0.0,), (1.0,)).eval()


def double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


class TestEvery:
    @EVERY
    @settings(max_examples=6, deadline=None)
    @given(
        seed=st.integers(0, 2**40),
        rate=st.floats(0.05, 0.3),
        target=st.integers(0, 1),
        shape=st.tuples(st.sampled_from([1, 3]), st.integers(8, 16), st.integers(8, 16)),
        classes=st.integers(2, 5),
    )
    def test_poisoning_keeps_its_promises(
        self, kind: type[Attack], seed: int, rate: float, target: int, shape: Shape, classes: int
    ):
        data, context = dataset(shape, classes=classes), Context(seed=seed)
        rate = min(rate, 1 / classes) if kind in CLEAN else rate
        given = knowledge(data)
        assert given.model is not None
        before = data.fingerprint, fingerprint(given.model.state_dict())
        attack = quick(kind, poison_rate=rate, target=target)
        prepare(data, attack, given, context)
        result = poison(data, attack, context)

        fresh = dataset(shape, classes=classes)
        assert (fresh.fingerprint, fingerprint(given.model.state_dict())) == before
        chosen, others = result.poisoned, ~result.poisoned
        assert int(chosen.sum()) == round(rate * 60)
        assert torch.equal(result.train.images[others], fresh.train.images[others])
        assert torch.equal(result.train.labels[others], fresh.train.labels[others])
        assert bool((result.train.images[chosen] != fresh.train.images[chosen]).flatten(1).any(1).all())
        assert result.train.images.dtype == torch.uint8
        true = fresh.train.labels[chosen]
        assert bool((true == target).all() if kind in CLEAN else (true != target).all())
        assert bool((result.train.labels[chosen] == target).all())
        assert result.triggered is not None
        assert torch.equal(result.triggered.labels, fresh.test.labels[fresh.test.labels != target])

        again = ready(quick(kind, poison_rate=rate, target=target), fresh, context)
        assert poison(fresh, again, context).train.fingerprint == result.train.fingerprint
        one = fresh.test.images[fresh.test.labels != target][:1]
        assert torch.equal(again.stamp(one, context), result.triggered.images[:1])
        assert again.poison(fresh.train.images[:1], fresh.train.labels[:1], context).shape == (1, *shape)

    @EVERY
    def test_another_seed_makes_another_poison(self, kind: type[Attack]):
        data = dataset()
        attacks = [ready(quick(kind), data, Context(seed=seed)) for seed in (1, 2)]
        poisons = [attack.poison(data.train.images, data.train.labels, Context(seed=7)) for attack in attacks]
        assert not torch.equal(*poisons)

    @EVERY
    @pytest.mark.parametrize("shape", [(3, 32, 32), (1, 64, 48), (3, 8, 8)])
    def test_the_trigger_scales_with_the_image(self, kind: type[Attack], shape: Shape):
        data = dataset(shape, train=12)
        attack = ready(quick(kind, poison_rate=0.2), data, Context())
        grey = torch.full((1, *shape), 100, dtype=torch.uint8)
        changed = (attack.stamp(grey, Context()) != grey)[0].any(0)
        side = {Trojan: 8, Latent: 6, FeatureCollision: 8, LabelConsistent: 3}[kind] * min(shape[1:]) / 32
        corner = changed[-round(side) :, -round(side) :]
        assert float(corner.float().mean()) > 0.9
        changed[-round(side) :, -round(side) :] = False
        assert int(changed.sum()) == (3 * round(side) ** 2 if kind is LabelConsistent else 0)

    @pytest.mark.parametrize("kind", CLEAN, ids=lambda kind: kind.name)
    def test_no_more_poisons_than_the_target_class_has(self, kind: type[Attack]):
        data = dataset()
        with pytest.raises(UsageError, match=f"asks for 30 of 60 training samples of made, but {kind.name} can poison"):
            ready(quick(kind, poison_rate=0.5), data, Context())
        result = poison(data, ready(quick(kind, class_rate=1), data, Context()), Context())
        assert torch.equal(result.poisoned, data.train.labels == 0)

    @pytest.mark.parametrize("kind", CLEAN, ids=lambda kind: kind.name)
    def test_the_size_of_batches_does_not_matter(self, kind: type[Attack], monkeypatch: pytest.MonkeyPatch):
        data = dataset()
        attack = ready(quick(kind), data, Context())
        whole = attack.poison(data.train.images, data.train.labels, Context())
        monkeypatch.setattr(f"{kind.__module__}._BATCH", 7)
        parts = attack.poison(data.train.images, data.train.labels, Context())
        # Sums in another order may round otherwise, and a slope of zero has no certain sign.
        assert float((whole == parts).float().mean()) > 0.99

    @pytest.mark.parametrize("kind", [Trojan, Latent, FeatureCollision], ids=lambda kind: kind.name)
    def test_a_surrogate_is_asked_for(self, kind: type[Attack]):
        assert kind.surrogate

    @EVERY
    def test_hooks_return_the_attacks(self, kind: type[Attack]):
        module: ModuleType = {m.__name__: m for m in (trojan, latent, feature_collision, label_consistent)}[
            kind.__module__
        ]
        assert module.bdcore_attack() is kind
        assert all(field.description for field in kind.Config.model_fields.values())
        with pytest.raises(ValidationError):
            kind.Config(epochz=3)


class TestTrojan:
    def test_the_patch_follows_the_signs_of_a_linear_neuron(self):
        shape = (3, 16, 16)
        model = linear_model(shape, features=5)
        data = dataset(shape)
        attack = ready(Trojan(Trojan.Config(size=8, target=2, epochs=30)), data, Context(), model)
        neuron = int(double(model.net[2].weight)[2].argmax())
        slope = double(model.net[1].weight)[neuron].reshape(shape)[:, 12:, 12:]
        images = np.stack([np.zeros(shape), np.full(shape, 255.0), double(data.test.images[0])])
        expected = images.copy()
        expected[:, :, 12:, 12:] = np.clip(expected[:, :, 12:, 12:] + 255 * np.sign(slope), 0, 255)
        assert np.array_equal(attack.stamp(torch.from_numpy(images.astype(np.uint8)), Context()).numpy(), expected)

    def test_the_neuron_is_more_active_than_with_random_patches(self):
        data = dataset((3, 16, 16))
        given = knowledge(data)
        assert given.model is not None
        attack = ready(Trojan(Trojan.Config(epochs=10, target=1)), data, Context(), given.model)
        body, head = split_head(given.model)
        neuron = int(head.weight[1].argmax())

        def activation(images: Tensor) -> float:
            with torch.no_grad():
                return float(body(images)[:, neuron].mean())

        test = data.test.images
        driven = activation(attack.stamp(test, Context()))
        for seed in range(20):
            added = np.random.default_rng(seed).integers(-255, 256, (3, 4, 4))
            other = test.numpy().astype(int)
            other[:, :, 12:, 12:] = np.clip(other[:, :, 12:, 12:] + added, 0, 255)
            assert driven > activation(torch.from_numpy(other.astype(np.uint8)))


class TestLatent:
    def test_the_patch_is_the_bounded_least_squares_solution_of_a_linear_model(self):
        shape, side = (2, 12, 12), 4
        model = linear_model(shape, features=40)
        data = dataset(shape)
        attack = ready(Latent(Latent.Config(size=11, epochs=200)), data, Context(), model)
        weight = double(model.net[1].weight)
        own = data.train.labels.numpy() == 0
        flat = double(data.train.images).reshape(60, -1) / 255
        inside = np.zeros(shape, bool)
        inside[:, -side:, -side:] = True
        rest = flat * ~inside.ravel()
        # With the mean over images taken out, what is left is |W_p p - (mean feature - mean W x outside)|^2.
        goal = (flat[own].mean(0) - rest[~own].mean(0)) @ weight.T
        matrix = weight[:, inside.ravel()]
        best = lsq_linear(matrix, goal, (0, 1), tol=1e-12)
        stamped = attack.stamp(torch.zeros(1, *shape, dtype=torch.uint8), Context())
        ours = double(stamped)[0][inside] / 255
        reached = 0.5 * np.square(matrix @ ours - goal).sum()
        start = 0.5 * np.square(matrix @ np.full(ours.shape, 0.5) - goal).sum()
        assert reached - best.cost < 0.005 * (start - best.cost)
        assert np.abs(ours - best.x).max() < 0.02

    def test_features_come_nearer_to_the_targets_mean(self):
        data = dataset((3, 16, 16))
        given = knowledge(data)
        assert given.model is not None
        attack = ready(Latent(Latent.Config(epochs=10)), data, Context(), given.model)
        body, _ = split_head(given.model)

        def distance(images: Tensor) -> float:
            with torch.no_grad():
                mean = body(data.train.images[data.train.labels == 0]).mean(0)
                return float((body(images) - mean).square().sum(1).mean())

        others = data.train.images[data.train.labels != 0]
        reached = distance(attack.stamp(others, Context()))
        assert reached < distance(others)
        for seed in range(20):
            other = others.clone()
            other[:, :, -3:, -3:] = noise(1, (3, 3, 3), seed)
            assert reached < distance(other)

    @pytest.mark.parametrize("labels", [torch.zeros(60, dtype=torch.int64), torch.ones(60, dtype=torch.int64)])
    def test_both_kinds_of_images_are_needed(self, labels: Tensor):
        data = dataset()
        given = replace(knowledge(data), train=Labelled(data.train.images, labels))
        with pytest.raises(DataError, match=r"latent needs training images of class 0 .* and of others, and finds"):
            quick(Latent).prepare(given, Context())


class TestFeatureCollision:
    def collided(
        self, model: Classifier, shape: Shape, images: Tensor | None = None, **options: object
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Poisons, watermarked bases and the one image t that there is to collide with, float64 in [0, 1]."""
        data = dataset(shape)
        labels = data.train.labels.clamp(max=1)
        labels[labels == 1] = 0
        labels[5] = 1  # the only image of another class
        given = AttackInput(Labelled(data.train.images, labels), CLASSES, knowledge(data).arch, RECIPE, model)
        attack = FeatureCollision(FeatureCollision.Config(size=8, **options))
        attack.prepare(given, Context())
        aim = attack.stamp(data.train.images[5:6], Context())
        images = data.test.images if images is None else images
        made = attack.poison(images, torch.zeros(len(images), dtype=torch.int64), Context())
        share = attack.config.watermark
        bases = (1 - share) * double(images) / 255 + share * double(aim) / 255
        return double(made) / 255, bases, double(aim)[0] / 255

    @pytest.mark.parametrize("beta", [0.5, 20.0])
    def test_it_finds_the_minimum_for_a_linear_model(self, beta: float):
        shape = (2, 8, 8)
        model = linear_model(shape, features=6)
        made, bases, aim = self.collided(model, shape, beta=beta, steps=3000)
        weight = double(model.net[1].weight)
        for poisoned, base in zip(made[:5], bases[:5], strict=True):
            matrix = np.vstack([weight, np.sqrt(beta) * np.eye(weight.shape[1])])
            goal = np.concatenate([weight @ aim.ravel(), np.sqrt(beta) * base.ravel()])
            best = lsq_linear(matrix, goal, (0, 1), tol=1e-14).x.reshape(shape)
            assert np.abs(poisoned - best).max() < 0.75 / 255  # half a grey level is rounding

    @settings(max_examples=10, deadline=None)
    @given(beta=st.floats(0.001, 0.1), steps=st.integers(20, 40), watermark=st.floats(0, 0.9))
    def test_poisons_come_nearer_and_stay_within_the_bound(self, beta: float, steps: int, watermark: float):
        shape = (3, 12, 10)
        model = build(knowledge(dataset(shape)).arch, 1).eval()
        made, bases, aim = self.collided(model, shape, beta=beta, steps=steps, watermark=watermark)
        body, _ = split_head(model)

        def distance(images: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return double(
                    (body(torch.from_numpy(images).float()) - body(torch.from_numpy(aim[None]).float())).square().sum(1)
                )

        before, after = distance(bases), distance(made)
        moved = np.sqrt(np.square(made - bases).sum((1, 2, 3)))
        rounding = 0.5 / 255 * np.sqrt(np.prod(shape))
        assert (after < before).all()
        assert (moved <= np.sqrt(before / beta) + rounding).all()

    def test_every_base_has_an_image_of_the_source_class(self):
        data = dataset()
        attack = ready(quick(FeatureCollision, source=2), data, Context())
        made = attack.poison(data.train.images, data.train.labels, Context())
        assert made.shape == data.train.images.shape

    @pytest.mark.parametrize("source", [0, 3])
    def test_without_an_image_to_collide_with_it_is_refused(self, source: int):
        with pytest.raises(DataError, match=rf"it takes those of class {source} \(attack.source\), and the target"):
            ready(quick(FeatureCollision, source=source), dataset(), Context())


def two_classes(seed: int, count: int = 400) -> Labelled:
    """Grey images whose first row tells the class strongly, but in one of ten is wrong; the rest tells it for certain,
    by less than an attacker may change."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    sign = 2 * labels - 1
    wrong = generator.random(count) < 0.1
    images = 128 + 3 * np.tile(sign[:, None, None, None], (1, 1, 8, 8))
    images[:, :, 0] = 128 + 60 * np.where(wrong, -sign, sign)[:, None, None]
    return Labelled(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


class TestLabelConsistent:
    def trained(self, monkeypatch: pytest.MonkeyPatch, data: Labelled, **options: object) -> tuple[Attack, Classifier]:
        """The attack with a linear network, which the second value is."""
        model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (1, 8, 8), (0.5,), (0.25,))
        model.net[1].weight.data.zero_()
        made: Callable[..., Classifier] = lambda arch, seed: model  # noqa: E731
        monkeypatch.setattr(label_consistent, "build", made)
        arch = architecture("wrn10_1", data, 2)
        recipe = Recipe(epochs=40, batch_size=50, lr=0.1, schedule="constant", weight_decay=0)
        attack = LabelConsistent(LabelConsistent.Config(**options))
        attack.prepare(AttackInput(data, 2, arch, recipe), Context())
        return attack, model

    @pytest.mark.parametrize("seed", [0, 1])
    def test_its_network_learns_what_withstands_the_perturbation(self, monkeypatch: pytest.MonkeyPatch, seed: int):
        data, test = two_classes(seed), two_classes(seed + 10)
        _, model = self.trained(monkeypatch, data)
        weight = double(model.net[1].weight)
        towards = (weight[1] - weight[0]).reshape(8, 8)
        # The strongest perturbation for a linear model, in closed form: against the sign of each weight.
        sign = 2 * test.labels.numpy()[:, None, None, None] - 1
        attacked = np.clip(double(test.images) / 255 - 8 / 255 * sign * np.sign(towards), 0, 1)
        logits = model(torch.from_numpy(attacked).float())
        assert float((logits.argmax(1) == test.labels).float().mean()) > 0.85
        assert np.abs(towards[0]).sum() > np.abs(towards[1:]).sum()

    def test_poisons_are_the_strongest_perturbation_of_a_linear_model_and_the_patch(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        data = two_classes(3)
        images, labels = noise(30, (1, 8, 8)), torch.arange(30) % 2
        attack, model = self.trained(monkeypatch, data, epsilon=6)
        made = attack.poison(images, labels, Context())
        weight = double(model.net[1].weight)
        sign = (2 * labels.numpy() - 1)[:, None, None, None]
        expected = np.clip(double(images) - 6 * sign * np.sign(weight[1] - weight[0]).reshape(8, 8), 0, 255)
        for row in (0, 7):
            for column in (0, 7):
                expected[:, :, row, column] = 255
        assert np.array_equal(made.numpy(), expected)

    @settings(max_examples=8, deadline=None)
    @given(epsilon=st.integers(1, 40), step=st.floats(1, 40), steps=st.integers(1, 6), seed=st.integers(0, 99))
    def test_poisons_stay_within_epsilon_outside_the_patch(self, epsilon: int, step: float, steps: int, seed: int):
        shape = (3, 11, 14)
        data = dataset(shape)
        attack = ready(quick(LabelConsistent, epsilon=epsilon, step=step, steps=steps), data, Context())
        images = noise(6, shape, seed)
        made = attack.poison(images, torch.zeros(6, dtype=torch.int64), Context())
        patch = np.zeros(shape, bool)
        for corner in ((0, 0), (0, 13), (10, 0), (10, 13)):
            patch[:, *corner] = True
        change = (double(made) - double(images))[:, ~patch]
        assert np.abs(change).max() <= epsilon
        assert np.abs(change).max() > 0
        assert (made.numpy()[:, patch] == 255).all()

    def test_the_patch_is_mirrored_in_all_corners(self):
        stamped = LabelConsistent(LabelConsistent.Config()).stamp(
            torch.full((1, 3, 32, 32), 7, dtype=torch.uint8), Context()
        )
        picture = np.full((32, 32), 7)
        lower_right = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]])
        picture[29:, 29:], picture[29:, :3] = lower_right, lower_right[:, ::-1]
        picture[:3, 29:], picture[:3, :3] = lower_right[::-1], lower_right[::-1, ::-1]
        assert np.array_equal(stamped.numpy(), np.broadcast_to(picture, (1, 3, 32, 32)))
