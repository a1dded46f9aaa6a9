"""Trigger inversion: its losses and rules against what the papers say, and that stacked classes do not touch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdcore import Context, Trigger, put_trigger
from bdcore.context import Progress
from bdcore.models import Classifier, metered
from bdcore.training import loop
from bdcore_plugins.defenses.mcldef.inversion import INVERSIONS, Inversion, PixelInversion
from bdcore_plugins.defenses.mcldef.inversion import invert as run_inversion

SHAPE = (3, 6, 5)
CLASSES = 4
BOTH = pytest.mark.parametrize("form", sorted(INVERSIONS))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=generator(seed), dtype=torch.uint8)


def linear_model(shape: tuple[int, int, int] = SHAPE, seed: int = 1) -> Classifier:
    """Logits that are a linear function of the pixels: simple enough to be written down again in numpy."""
    layer = nn.Linear(int(np.prod(shape)), CLASSES)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator(seed)) * 0.3)
        layer.bias.copy_(torch.randn(CLASSES, generator=generator(seed + 1)))
    return Classifier(nn.Sequential(nn.Flatten(), layer), shape, (0.0,), (1.0,)).eval().requires_grad_(False)


def constant_model(always: int, shape: tuple[int, int, int] = SHAPE) -> Classifier:
    model = linear_model(shape)
    model.net[1].weight.zero_()
    model.net[1].bias.copy_(torch.arange(CLASSES) == always)
    return model


def start(form: str, targets: list[int], seed: int = 2, shape: tuple[int, int, int] = SHAPE) -> Inversion:
    return INVERSIONS[form](torch.tensor(targets), shape, generator(seed))


def double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def close(ours: Tensor, theirs: np.ndarray, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(double(ours), theirs, rtol=rtol, atol=atol)


# The forms once more, in float64 and by loops over triggers; a trigger is (P, N) or (pattern, mask).


def with_delta(images: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return np.clip(images + np.clip(up, 0, 1) - np.clip(down, 0, 1), 0, 1)


def pixel_cost(up: np.ndarray, down: np.ndarray) -> float:
    return sum(float((np.tanh(b / 10) / (2 - 1e-7) + 0.5).max(0).sum()) for b in (up, down))


def with_mask(images: np.ndarray, pattern: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (1 - mask) * images + mask * pattern


def written_loss(
    form: str, triggers: list[tuple[np.ndarray, np.ndarray]], targets: list[int], images: np.ndarray, model: Classifier
) -> tuple[float, float]:
    """The loss over all classes of a linear model, and the share of images that go to their class's target."""
    weight, bias = double(model.net[1].weight), double(model.net[1].bias)
    total, hits = 0.0, []
    for (first, second), target in zip(triggers, targets, strict=True):
        changed = (with_delta if form == "pixel" else with_mask)(images, first, second)
        logits = changed.reshape(len(images), -1) @ weight.T + bias
        entropy = np.log(np.exp(logits).sum(1)) - logits[:, target]
        penalty = 1e-3 * pixel_cost(first, second) if form == "pixel" else 0.01 * np.abs(second).sum()
        total += entropy.mean() + penalty
        hits.append((logits.argmax(1) == target).mean())
    return total, float(np.mean(hits))


def triggers_of(stack: Inversion) -> list[tuple[np.ndarray, np.ndarray]]:
    pair = (stack.up, stack.down) if isinstance(stack, PixelInversion) else (stack.pattern, stack.mask)
    return list(zip(double(pair[0]), double(pair[1]), strict=True))


class TestLoss:
    def test_delta_and_images_with_it(self):
        stack = start("pixel", [0, 3, 1])
        with torch.no_grad():
            stack.up.mul_(3).sub_(1)  # far beyond [0, 1] on both sides
            stack.down.mul_(3).sub_(1)
        images = noise(7)
        expected = [with_delta(double(images) / 255, up, down) for up, down in triggers_of(stack)]
        close(stack.apply_to(images), np.concatenate(expected))
        close(stack.delta(), np.stack([np.clip(up, 0, 1) - np.clip(down, 0, 1) for up, down in triggers_of(stack)]))

    def test_pixel_cost_counts_unclamped_values(self):
        stack = start("pixel", [0, 1])
        with torch.no_grad():
            stack.up.mul_(40).sub_(20)
            stack.down.mul_(40).sub_(20)
            stack.weight.copy_(torch.tensor([1e-3, 0.5]))
        expected = np.array([pixel_cost(up, down) for up, down in triggers_of(stack)])
        close(stack.cost(), expected)
        close(stack.penalty(), expected * np.array([1e-3, 0.5]))

    def test_blend(self):
        stack = start("mask", [0, 3, 1])
        images = noise(7)
        expected = [with_mask(double(images) / 255, pattern, mask) for pattern, mask in triggers_of(stack)]
        close(stack.apply_to(images), np.concatenate(expected))

    @pytest.mark.parametrize(("side", "strength"), [(32, 0.01), (224, 0.001)])
    def test_mask_penalty(self, side: int, strength: float):
        stack = start("mask", [1, 2], shape=(1, side, side))
        close(stack.penalty(), np.array([strength * mask.sum() for _, mask in triggers_of(stack)]))

    @BOTH
    def test_loss_success_and_gradient(self, form: str):
        model, stack, targets = linear_model(), start(form, [2, 0, 3]), [2, 0, 3]
        images = noise(9)
        figures = stack.loss(model, images)
        triggers = triggers_of(stack)
        expected, success = written_loss(form, triggers, targets, double(images) / 255, model)
        assert float(figures["loss"].detach()) == pytest.approx(expected, rel=1e-5)
        assert float(figures["success"]) == pytest.approx(success)

        figures["loss"].backward()
        chosen = np.random.default_rng(0)
        assert all(parameter.grad is None for parameter in model.parameters())
        for number, parameter in enumerate(stack.parameters()):
            values = double(parameter)
            for place in np.ndindex(values.shape):
                if chosen.random() > 0.1:  # a sample of the places is enough
                    continue
                slopes = []
                for step in (1e-6, -1e-6):
                    moved = [list(pair) for pair in triggers]
                    moved[place[0]][number] = moved[place[0]][number].copy()
                    moved[place[0]][number][place[1:]] += step
                    moved = [(first, second) for first, second in moved]
                    slopes.append(written_loss(form, moved, targets, double(images) / 255, model)[0])
                slope = (slopes[0] - slopes[1]) / 2e-6
                assert float(parameter.grad[place]) == pytest.approx(slope, rel=2e-3, abs=1e-6), (number, place)


class TestEpochEnd:
    def end(self, stack: Inversion, success: list[float], images: int = 20) -> None:
        """End an epoch in which each class had this share of success."""
        stack.seen.fill_(images)
        stack.hits.copy_(torch.tensor([round(share * images) for share in success]))
        stack.end_epoch()

    def test_weight_follows_each_class_alone(self):
        # Long runs of success and failure, and flips, at random; 0.9 exactly is a success.
        random = np.random.default_rng(3)
        columns = []
        for _ in range(5):
            runs = [[won] * int(random.integers(1, 25)) for won in [True, False] * 6]
            columns.append([0.9 if won else 0.85 for run in runs for won in run][:70])
        columns += [[0.9] * 70, [0.85] * 70, [0.9, 0.85] * 35]
        epochs = min(len(column) for column in columns)
        stack = start("pixel", list(range(len(columns))))
        weights, counts = [1e-3] * len(columns), [(0, 0)] * len(columns)
        for epoch in range(epochs):
            self.end(stack, [column[epoch] for column in columns])
            for place, column in enumerate(columns):
                won, lost = counts[place]
                won, lost = (won + 1, 0) if column[epoch] >= 0.9 else (0, lost + 1)
                if won == 10:
                    weights[place], won = weights[place] * 1.5, 0
                if lost == 10:
                    weights[place], lost = weights[place] / 1.5**1.5, 0
                counts[place] = (won, lost)
            close(stack.weight, np.array(weights), atol=0)
        assert weights[5] == pytest.approx(1e-3 * 1.5 ** (epochs // 10))
        assert weights[6] == pytest.approx(1e-3 / 1.5 ** (1.5 * (epochs // 10)))
        assert weights[7] == 1e-3
        assert len(set(weights)) > 4

    def test_faint_changes_are_zeroed(self):
        stack = start("pixel", [0])
        with torch.no_grad():
            stack.up.fill_(0.5)
            stack.down.fill_(0.5)
            stack.up[0, 0, 0, 0] += 0.9 / 255
            stack.down[0, 1, 0, 0] += 0.9 / 255
            stack.up[0, 0, 1, 1] += 1.1 / 255
            stack.down[0, 1, 2, 2] += 1.1 / 255
        self.end(stack, [0.0])
        delta = double(stack.delta())[0]
        assert sorted(zip(*(axis.tolist() for axis in delta.nonzero()), strict=True)) == [(0, 1, 1), (1, 2, 2)]
        assert delta[0, 1, 1] == pytest.approx(1.1 / 255, rel=1e-4)
        assert delta[1, 2, 2] == pytest.approx(-1.1 / 255, rel=1e-4)
        faint = delta == 0
        assert not double(stack.up)[0][faint].any(), "what is faint starts again from nothing"
        assert not double(stack.down)[0][faint].any()

    def pixels(self, stack: PixelInversion, lit: int, height: float, rest: float) -> Trigger | None:
        """Let the trigger have so many pixels of this height; the rest below 0 lowers the cost alone."""
        with torch.no_grad():
            stack.up.fill_(rest)
            stack.down.fill_(rest)
            stack.up[0, 0].view(-1)[:lit] = height
        return stack.best(0)

    def test_best_delta_is_successful_with_the_fewest_pixels_then_the_lowest_cost(self):
        stack = start("pixel", [3])
        self.pixels(stack, 2, 0.5, -5)
        self.end(stack, [0.85])
        assert stack.best(0) is None
        assert not torch.isfinite(stack.size).any()

        def kept() -> tuple[int, float]:
            trigger = stack.best(0)
            assert trigger is not None
            assert trigger.target == 3
            assert trigger.mask is None
            delta = double(trigger.delta)
            assert float(stack.size) == pytest.approx(np.abs(delta).max(0).sum(), rel=1e-5)
            return int((delta != 0).any(0).sum()), round(float(np.abs(delta).max()), 4)

        for lit, height, rest, success, expected in [
            (6, 0.5, 0.0, 0.9, (6, 0.5)),  # the first that succeeds
            (6, 0.7, 0.0, 1.0, (6, 0.5)),  # as many pixels, costs more
            (7, 0.4, -4.0, 1.0, (6, 0.5)),  # costs less, with more pixels
            (4, 0.4, -4.0, 0.85, (6, 0.5)),  # is smaller and fails
            (6, 0.4, -4.0, 1.0, (6, 0.4)),  # as many pixels, costs less
            (5, 0.6, 0.0, 1.0, (5, 0.6)),  # fewer pixels, although it costs more
            (5, 0.6, 0.0, 1.0, (5, 0.6)),  # the same again is no better
        ]:
            was = kept() if torch.isfinite(stack.size).all() else None
            self.pixels(stack, lit, height, rest)
            self.end(stack, [success])
            assert kept() == expected
            smaller = was is None or expected[0] < was[0]
            assert (float(stack.stale) == 0) == smaller, "a smaller one ends the wait, a better one as large does not"

    def test_best_mask_is_successful_and_smaller(self):
        stack = start("mask", [1, 3])
        with torch.no_grad():
            stack.mask.fill_(0.5)
            stack.pattern[0].fill_(1.5)  # an optimiser step may end outside of [0, 1]
        self.end(stack, [0.9, 0.85])
        assert stack.best(1) is None
        trigger = stack.best(0)
        assert trigger is not None
        assert (trigger.target, trigger.delta) == (1, None)
        assert trigger.mask.unique().tolist() == [0.5]
        assert trigger.pattern.unique().tolist() == [1.0]
        assert stack.size.tolist() == [15.0, torch.inf]  # 0.5 on 6 x 5 pixels
        with torch.no_grad():
            stack.mask.fill_(0.6)
        self.end(stack, [1.0, 1.0])
        assert stack.best(0).mask.unique().tolist() == [0.5]
        assert stack.stale.tolist() == [1, 0]
        with torch.no_grad():
            stack.mask.fill_(-0.2)
        self.end(stack, [1.0, 0.5])
        assert stack.best(0) is None, "an empty mask is no trigger"
        assert stack.size.tolist() == [0.0, pytest.approx(18.0)]

    def test_mask_and_pattern_are_clipped_before_they_are_used_again(self):
        stack = start("mask", [1])
        with torch.no_grad():
            stack.mask.mul_(6).sub_(3)
            stack.pattern.mul_(6).sub_(3)
        mask, pattern = double(stack.mask).clip(0, 1), double(stack.pattern).clip(0, 1)
        images = noise(4)
        close(stack.apply_to(images), with_mask(double(images) / 255, pattern[0], mask[0]))
        close(stack.mask, mask)
        close(stack.pattern, pattern)

    @BOTH
    def test_an_empty_success_is_no_trigger(self, form: str):
        stack = start(form, [0])
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter.fill_(0)
        self.end(stack, [1.0])
        assert float(stack.size) == 0
        assert stack.best(0) is None


def run(
    stack: Inversion,
    model: nn.Module,
    images: Tensor,
    epochs: int,
    patience: int | None = None,
    context: Context | None = None,
) -> Inversion:
    run_inversion("invert", model, stack, images, epochs, patience or epochs + 1, context or Context())
    return stack


class TestInvert:
    @BOTH
    def test_finds_small_triggers_that_work(self, form: str):
        model, images = linear_model(), noise(40)
        model.net[1].weight.mul_(0.1)
        for label in range(CLASSES):  # one pixel that leads to each class
            model.net[1].weight[label, 7 * label] += 20
        stack = start(form, list(range(CLASSES)))
        run(stack, model, images, epochs=60)
        for label in range(CLASSES):
            trigger = stack.best(label)
            assert trigger is not None
            hits = model(put_trigger(trigger, images)).argmax(1) == label
            assert hits.float().mean() >= 0.85  # the epoch counts while it trains, so its last step may cost a little
        assert stack.size.max() < 0.2 * 30, "of 6 x 5 pixels, half of which it began with"

    @BOTH
    def test_stacked_classes_are_independent(self, form: str):
        model, images = linear_model(), noise(70)  # two batches
        together = start(form, [0, 2, 3])
        alone = [together.take(torch.tensor([place])) for place in range(3)]
        run(together, model, images, epochs=12)
        for place, single in enumerate(alone):
            run(single, model, images, epochs=12)
            mine = together.take(torch.tensor([place]))
            for name, value in single.state_dict().items():
                torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)

    @BOTH
    def test_the_model_and_images_stay_as_they_are(self, form: str):
        model, images = linear_model(), noise(10)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        kept = images.clone()
        run(start(form, [0, 1]), model, images, epochs=2)
        assert torch.equal(images, kept)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    @BOTH
    def test_without_success_all_epochs_are_run(self, form: str):
        told: list[Progress] = []
        context = Context(report=told.append)
        stack = run(start(form, [0, 2]), constant_model(1), noise(10), epochs=30, patience=4, context=context)
        assert len(told) == 30
        assert stack.best(0) is None
        assert not torch.isfinite(stack.size).any()

    @BOTH
    @pytest.mark.parametrize(
        ("columns", "expected"),
        [
            ({0: "-------3"}, 7 + 1 + 4),  # it waits for the first success, then for smaller ones
            ({0: "5--3"}, 3 + 1 + 4),
            ({0: "53", 1: "----54321"}, 8 + 1 + 4),  # for the class that is last
            ({0: "3", 1: "-"}, 30),  # and one that has not succeeded may do so to the end
        ],
    )
    def test_patience_ends_it_after_a_success(
        self, form: str, columns: dict[int, str], expected: int, monkeypatch: pytest.MonkeyPatch
    ):
        """Each class's epochs are told: with a successful trigger of so many pixels, or without; then as the last."""
        told: list[Progress] = []
        stack = start(form, list(columns))
        ended = stack.end_epoch

        def end_epoch() -> None:
            for place, epochs in columns.items():
                now = epochs[min(len(told), len(epochs) - 1)]
                stack.hits[place] = 0 if now == "-" else stack.seen[place]
                with torch.no_grad():
                    for parameter in stack.parameters():
                        parameter[place] = 0
                        parameter[place, 0].view(-1)[: 0 if now == "-" else int(now)] = 1
                    if form == "pixel":
                        stack.down[place] = 0
            ended()

        monkeypatch.setattr(stack, "end_epoch", end_epoch)
        run(stack, linear_model(), noise(10), 30, patience=4, context=Context(report=told.append))
        assert len(told) == expected

    def test_an_epoch_has_at_least_five_steps(self):
        context = Context()
        with metered(context.meter):
            run(start("pixel", [0, 1, 2]), linear_model(), noise(70), epochs=2, context=context)
        assert context.meter.images == 2 * 3 * 3 * 70  # epochs, classes, three passes of two batches

    @BOTH
    def test_resumes_exactly(self, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)  # a checkpoint after every epoch
        model, images = linear_model(), noise(70)
        epochs, killed = 24, 15  # past the first change of the weight

        def interrupt(progress: Progress) -> None:
            if progress.epoch == killed:
                raise KeyboardInterrupt

        (tmp_path / "straight").mkdir()
        (tmp_path / "killed").mkdir()
        straight = run(start(form, [0, 1]), model, images, epochs, context=Context(folder=tmp_path / "straight"))
        with pytest.raises(KeyboardInterrupt):
            run(
                start(form, [0, 1]), model, images, epochs,
                context=Context(folder=tmp_path / "killed", report=interrupt),
            )  # fmt: skip
        told: list[Progress] = []
        resumed = run(
            start(form, [0, 1]), model, images, epochs, context=Context(folder=tmp_path / "killed", report=told.append)
        )
        assert [progress.epoch for progress in told] == list(range(killed + 1, epochs + 1))
        for name, value in straight.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name


class TestStack:
    @BOTH
    def test_take_and_put(self, form: str):
        stack = run(start(form, [0, 1, 2, 3]), linear_model(), noise(20), epochs=12)
        before = {name: value.clone() for name, value in stack.state_dict().items()}
        places = torch.tensor([3, 1])
        part = stack.take(places)
        assert part.targets.tolist() == [3, 1]
        for name, value in part.state_dict().items():
            assert torch.equal(value, before[name][places]), name

        run(part, linear_model(), noise(20), epochs=3)
        for name, value in stack.state_dict().items():
            assert torch.equal(value, before[name]), f"{name} shares memory with the part"
        stack.put(places, part)
        for name, value in stack.state_dict().items():
            assert torch.equal(value[places], part.state_dict()[name]), name
            assert torch.equal(value[[0, 2]], before[name][[0, 2]]), name

    @BOTH
    def test_start_is_uniform_and_follows_the_generator(self, form: str):
        stack, again = start(form, list(range(20)), seed=4), start(form, list(range(20)), seed=4)
        assert all(torch.equal(*pair) for pair in zip(stack.parameters(), again.parameters(), strict=True))
        for parameter in stack.parameters():
            values = double(parameter).ravel()
            assert 0 <= values.min() < 0.02
            assert 0.98 < values.max() <= 1
            assert abs(values.mean() - 0.5) < 0.05


def of_delta(images: np.ndarray) -> tuple[Trigger, np.ndarray]:
    delta = torch.rand(SHAPE, generator=generator(5)) * 2 - 1
    return Trigger(0, delta=delta), np.clip(images + double(delta), 0, 1)


def of_mask(images: np.ndarray) -> tuple[Trigger, np.ndarray]:
    mask, pattern = torch.rand(1, *SHAPE[1:], generator=generator(6)), torch.rand(SHAPE, generator=generator(7))
    return Trigger(0, mask=mask, pattern=pattern), with_mask(images, double(pattern), double(mask))


@pytest.mark.parametrize("recovered", [of_delta, of_mask])
def test_put_trigger(recovered: Callable[[np.ndarray], tuple[Trigger, np.ndarray]]):
    images = noise(6)
    kept = images.clone()
    trigger, expected = recovered(double(images) / 255)
    changed = put_trigger(trigger, images)
    assert changed.dtype == torch.float32
    close(changed, expected)
    assert torch.equal(images, kept)


@BOTH
def test_the_best_trigger_does_what_the_stack_did(form: str):
    stack = start(form, [2])
    stack.seen.fill_(10)
    stack.hits.fill_(10)
    stack.end_epoch()
    images = noise(6)
    torch.testing.assert_close(put_trigger(stack.best(0), images), stack.apply_to(images).detach())
