"""What a recipe draws: learning rates, batches, augmentation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bdcore import Recipe, fit
from bdcore.context import Context
from bdcore.ops.native import load
from bdcore.training.batches import epoch_batches, steps_per_epoch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(samples: int, channels: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (samples, channels, side, side), generator=generator(seed), dtype=torch.uint8)


class TestSchedules:
    @pytest.mark.parametrize("milestones", [(1, 3), (2,), ()])
    def test_steps_are_multistep(self, milestones: tuple[int, ...]):
        recipe = Recipe(epochs=5, schedule="steps", lr=0.3, factor=0.2, milestones=milestones)
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], 0.3)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.2)
        for epoch in range(5):
            for step in range(4):
                assert recipe.learning_rate(epoch * 4 + step, 4) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()

    def test_cosine_is_cosine_annealing_by_step(self):
        recipe = Recipe(epochs=3, schedule="cosine", lr=0.3)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=21)
        for step in range(21):
            assert recipe.learning_rate(step, 7) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()

    @given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.25, 0.5]))
    def test_onecycle_is_two_straight_lines(self, epochs: int, steps: int, warmup: float):
        recipe = Recipe(epochs=epochs, schedule="onecycle", lr=2.0, warmup=warmup)
        total = epochs * steps
        rates = [recipe.learning_rate(step, steps) for step in range(total)]
        rise = warmup * total
        if total - rise >= 1:
            for step, rate in enumerate(rates):
                up = np.interp(step, [-1, rise - 1], [0, 2]) if rise else 2
                assert rate == pytest.approx(min(up, np.interp(step, [rise, total], [2, 0])))
        assert min(rates) > 0
        assert max(rates) <= 2

    def test_constant(self):
        assert {Recipe(schedule="constant", lr=0.7, epochs=3).learning_rate(step, 5) for step in range(15)} == {0.7}


class TestBatches:
    @given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 12), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_every_pass_visits_every_sample_once(self, samples: int, size: int, min_steps: int, shuffle: bool):
        recipe = Recipe(batch_size=size, min_steps=min_steps, shuffle=shuffle)
        columns = {"labels": torch.arange(samples) * 3}
        batches = list(epoch_batches(columns, recipe, generator()))
        assert len(batches) == steps_per_epoch(samples, recipe) >= min_steps
        visits = torch.cat([batch["index"] for batch in batches])
        assert torch.equal(torch.cat([batch["labels"] for batch in batches]), visits * 3)
        counts = visits.bincount(minlength=samples)
        assert len(counts) == samples
        assert bool((counts == len(visits) // samples).all())
        a_pass = -(-samples // size)
        for first in range(0, len(batches), a_pass):
            cut = batches[first : first + a_pass]
            assert sorted(torch.cat([batch["index"] for batch in cut]).tolist()) == list(range(samples))
            sizes = [len(batch["index"]) for batch in cut]
            assert max(sizes) <= size
            assert max(sizes) - min(sizes) <= 1

    def test_seeds_alone_decide_and_inputs_stay(self):
        images = noise(40)
        before = images.clone()
        recipe = Recipe(batch_size=16, crop=2, flip=True, cutout=3)

        def drawn(seed: int) -> list[Tensor]:
            torch.rand(7)  # the global state has no part in it
            return [b["images"] for b in epoch_batches({"images": images}, recipe, generator(seed))]

        assert all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(1), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))
        assert torch.equal(images, before)

    def test_augmentation_does_not_depend_on_the_batch_size(self):
        images = noise(50)

        def by_sample(size: int) -> Tensor:
            recipe = Recipe(batch_size=size, crop=2, flip=True, cutout=3)
            batches = list(epoch_batches({"images": images}, recipe, generator(5)))
            order = torch.cat([batch["index"] for batch in batches])
            return torch.cat([batch["images"] for batch in batches])[order.argsort()]

        assert torch.equal(by_sample(50), by_sample(7))

    def test_passes_within_an_epoch_are_augmented_anew(self):
        images = noise(20)
        recipe = Recipe(batch_size=20, min_steps=3, crop=2, flip=True)
        passes = [
            batch["images"][batch["index"].argsort()]
            for batch in epoch_batches({"images": images}, recipe, generator(1))
        ]
        assert len(passes) == 3
        assert not torch.equal(passes[0], passes[1])
        assert not torch.equal(passes[1], passes[2])

    def test_images_come_channels_last_however_they_are_stored(self):
        images = noise(20)
        recipe = Recipe(batch_size=8, crop=2, flip=True, cutout=3)
        stored = images, images.contiguous(memory_format=torch.channels_last)
        ours, others = ([b["images"] for b in epoch_batches({"images": x}, recipe, generator(4))] for x in stored)
        for one, other in zip(ours, others, strict=True):
            assert one.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(one, other)

    @pytest.mark.skipif(not load()["cpu"].loaded, reason=f"no compiled operators here: {load()['cpu'].detail}")
    def test_compiled_operators_make_the_same_batches(self, monkeypatch: pytest.MonkeyPatch):
        found = []
        for how in ("native", "reference"):
            monkeypatch.setenv("BDCORE_OPS", how)
            recipe = Recipe(batch_size=16, crop=4, flip=True, cutout=5)
            found.append([b["images"] for b in epoch_batches({"images": noise(100, side=32)}, recipe, generator(6))])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    def test_epochs_of_a_training_differ_and_a_second_training_does_not(self):
        def orders(seed: int) -> list[Tensor]:
            seen: list[Tensor] = []
            module = nn.Linear(1, 1)

            def loss(batch: dict[str, Tensor]) -> Tensor:
                seen.append(torch.cat([batch["index"], batch["images"].flatten()]))
                return module(torch.ones(1, 1)).sum()

            fit("t", module, {"images": noise(30)}, loss, Recipe(epochs=3, crop=2), Context(seed=seed))
            return seen

        first, again, other = orders(1), orders(1), orders(2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[0], other[0])


def reference(image: np.ndarray, crop: int, offset: tuple[int, int], flip: bool, cut: int, center: tuple[int, int]):
    """One image, pixel by pixel: zero padding and crop, mirror, a square of zeros."""
    _, height, width = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            across = width - 1 - x if flip else x
            from_y, from_x = y + offset[0] - crop, across + offset[1] - crop
            inside = 0 <= from_y < height and 0 <= from_x < width
            low, left = center[0] - cut // 2, center[1] - cut // 2
            hidden = low <= y < low + cut and left <= x < left + cut
            if inside and not hidden:
                result[:, y, x] = image[:, from_y, from_x]
    return result


class TestAugmentation:
    """Every result must be one that the reference can give, and all that it can give must occur."""

    def augmented(self, image: Tensor, samples: int, recipe: Recipe) -> np.ndarray:
        images = image[None].repeat(samples, 1, 1, 1)
        return torch.cat([b["images"] for b in epoch_batches({"images": images}, recipe, generator(3))]).numpy()

    def test_crop(self):
        image = noise(1, side=6)[0]
        found = {made.tobytes() for made in self.augmented(image, 600, Recipe(crop=2))}
        offsets = [(y, x) for y in range(5) for x in range(5)]
        assert found == {reference(image.numpy(), 2, offset, False, 0, (0, 0)).tobytes() for offset in offsets}

    def test_flip(self):
        image = noise(1, side=6)[0]
        made = self.augmented(image, 2000, Recipe(flip=True))
        mirrored = np.array([np.array_equal(one, image.numpy()[:, :, ::-1]) for one in made])
        assert all(np.array_equal(one, image.numpy()) for one in made[~mirrored])
        assert abs(mirrored.mean() - 0.5) < 0.05  # 4.5 standard deviations

    @pytest.mark.parametrize("side", [2, 3])
    def test_cutout(self, side: int):
        image = noise(1, side=5)[0] | 1
        found = {made.tobytes() for made in self.augmented(image, 600, Recipe(cutout=side))}
        centers = [(y, x) for y in range(5) for x in range(5)]
        assert found == {reference(image.numpy(), 0, (0, 0), False, side, center).tobytes() for center in centers}

    def test_all_together(self):
        image = noise(1, side=4)[0] | 1
        possible = {
            reference(image.numpy(), 1, (y, x), flip, 2, (down, right)).tobytes()
            for y in range(3)
            for x in range(3)
            for flip in (False, True)
            for down in range(4)
            for right in range(4)
        }
        found = {made.tobytes() for made in self.augmented(image, 3000, Recipe(crop=1, flip=True, cutout=2))}
        assert found <= possible
        assert len(found) > 0.95 * len(possible)
