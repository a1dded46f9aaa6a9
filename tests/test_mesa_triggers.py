"""MESA's patches on images, the hinge on their success, the mixture, the rule that names the target, the baseline."""

from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bdcore import Context, Labelled
from bdcore_plugins.defenses.mesa.approximator import Approximator, Form
from bdcore_plugins.defenses.mesa.baseline import PixelPatch
from bdcore_plugins.defenses.mesa.mixture import Mixture, TriggerSource, mixture_weights
from bdcore_plugins.defenses.mesa.patches import Places, draw_offsets, measure_success, put_patches
from bdcore_plugins.defenses.mesa.removal import put_some
from bdcore_plugins.defenses.mesa.target_search import judge

FORM = Form(False, "each", 1, False, alpha=0.1, noise=0.0, hidden=16, batch_size=16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def form(**changes: Any) -> Form:
    return Form(**{**vars(FORM), **changes})


class TestPlaces:
    def test_every_place_alike(self):
        """The chi-squared statistic of 900 cells has mean 899 and deviation 42."""
        torch.manual_seed(0)
        offset = draw_offsets(torch.empty(1).expand(90_000, 3, 32, 32), (3, 3, 3), 1, "each")
        cells = torch.bincount(offset[:, 0] * 30 + offset[:, 1], minlength=900).double()
        assert offset.min() == 0
        assert offset.max() == 29
        assert cells.shape == (900,)
        statistic = float(((cells - 100) ** 2 / 100).sum())
        assert abs(statistic - 899) < 5 * 42

    @pytest.mark.parametrize(("places", "limit"), [("batch", 30), ("released", 29)])
    def test_one_place_a_batch(self, places: Any, limit: int):
        """Anywhere, but for the released code, which leaves out the last row and column."""
        torch.manual_seed(0)
        images = torch.empty(10, 1, 32, 32)
        offset = draw_offsets(images, (1, 3, 3), 2000, places).view(2000, 10, 2)
        assert (offset == offset[:, :1]).all()
        assert sorted(offset[:, 0, 0].unique().tolist()) == list(range(limit))
        assert sorted(offset[:, 0, 1].unique().tolist()) == list(range(limit))
        assert len({tuple(place) for place in offset[:, 0].tolist()}) > 500, "each sub-model has its own"

    def test_images_that_are_not_square(self):
        torch.manual_seed(0)
        offset = draw_offsets(torch.empty(4000, 1, 5, 9), (1, 3, 2), 1, "each")
        assert offset.amin(0).tolist() == [0, 0]
        assert offset.amax(0).tolist() == [2, 7]

    def test_a_patch_as_large_as_the_image_has_one_place(self):
        for places in get_args(Places):
            offset = draw_offsets(torch.empty(8, 1, 4, 4), (1, 4, 4), 2, places)
            assert offset.shape == (16, 2)
            assert not offset.any()


class TestPut:
    @given(
        top=st.integers(0, 6), left=st.integers(0, 7), channels=st.sampled_from([1, 3]), seed=st.integers(0, 1000)
    )  # fmt: skip
    @settings(deadline=None, max_examples=40)
    def test_only_the_window_changes(self, top: int, left: int, channels: int, seed: int):
        images = torch.randint(0, 256, (2, channels, 9, 9), dtype=torch.uint8, generator=generator(seed))
        patches = torch.rand(1, channels, 3, 2, generator=generator(seed + 1))
        put = put_patches(images, patches, torch.tensor([0, -1]), torch.tensor([[top, left]] * 2))
        expected = images.clone()
        expected[0, :, top : top + 3, left : left + 2] = (patches[0].double() * 255).round().to(torch.uint8)
        assert torch.equal(put, expected)

    def test_gradient_of_the_patches(self):
        images = torch.randint(0, 256, (4, 2, 6, 6), dtype=torch.uint8, generator=generator(0))
        patches = torch.rand(2, 2, 3, 3, dtype=torch.float64, generator=generator(1), requires_grad=True)
        index, offset = torch.tensor([1, 0, 1, 1]), torch.tensor([[0, 0], [3, 3], [1, 2], [3, 0]])
        assert torch.autograd.gradcheck(lambda p: put_patches(images, p, index, offset, torch.float64), (patches,))

    def test_some_images_at_the_rate(self):
        class White(TriggerSource):
            def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
                return torch.ones(1, 1, 2, 2).expand(count, 1, 2, 2)

        torch.manual_seed(0)
        images = torch.zeros(8000, 1, 8, 8, dtype=torch.uint8)
        put = put_some(White(), images, 0.25, "each")
        lit = (put == 255).sum((1, 2, 3))
        assert Counter(lit.tolist()).keys() == {0, 4}
        assert float((lit > 0).double().mean()) == pytest.approx(0.25, abs=0.02)
        assert (put.double().mean(0) > 0).all(), "every pixel is reached"
        assert torch.equal(put_some(White(), images, 0.0, "released"), images)


class Brightness(nn.Module):
    """Class 1 has the probability of an image's mean; class 0 the rest."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([(1 - mean).log(), mean.log()], dim=1)


class TestHinge:
    """Success and hinge by hand, for a classifier whose probabilities are known."""

    @pytest.mark.parametrize(("each", "used"), [(1, 12), (4, 3), (5, 2), (100, 1)])
    def test_the_success_of_a_trigger_is_the_mean_over_its_images(self, each: int, used: int):
        stack = Approximator([1, 0], [0.9, 0.9], (1, 2, 2), form(images_per_trigger=each), generator(0))
        levels = torch.randint(10, 245, (12,), generator=generator(1), dtype=torch.uint8)
        images = levels.view(12, 1, 1, 1).expand(12, 1, 5, 5).contiguous()
        patches = torch.rand(2, 16, 4, generator=generator(2))
        found = stack.success(Brightness(), images, patches)
        assert found.shape == (2, used)
        group = min(each, 12)
        light = levels.double().numpy() / 255
        for place in range(2):
            for k in range(used):
                # A patch covers 4 of 25 pixels, wherever it lies.
                means = (21 * light[k * group : (k + 1) * group] + float(patches[place, k].sum())) / 25
                success = means if place == 0 else 1 - means
                assert float(found[place, k]) == pytest.approx(success.mean(), abs=1e-5)

    @pytest.mark.parametrize("each", [1, 4])
    def test_the_loss_is_the_hinge_on_it(self, each: int, monkeypatch: pytest.MonkeyPatch):
        betas = [0.5, 0.7]
        stack = Approximator([1, 1], betas, (1, 2, 2), form(images_per_trigger=each, alpha=0.0), generator(0))
        given_success = torch.tensor([[0.2, 0.6, 0.45], [0.9, 0.65, 0.1]], requires_grad=True)
        monkeypatch.setattr(stack, "success", lambda *rest: given_success)
        loss = stack.loss(Brightness(), torch.zeros(12, 1, 5, 5, dtype=torch.uint8))["loss"]
        expected = (0.3 + 0.0 + 0.05) / 3 + (0.0 + 0.05 + 0.6) / 3
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
        loss.backward()
        np.testing.assert_allclose(given_success.grad, [[-1 / 3, 0, -1 / 3], [0, -1 / 3, -1 / 3]], atol=1e-6)

    def test_averaging_first_forgives_images_below_the_threshold(self):
        """Two images of success 0.3 and 0.9: their mean passes 0.6 though one of them does not."""
        images = torch.tensor([77, 230], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 50, 50).contiguous()
        patches = torch.full((1, 16, 4), 0.6)
        hinges: list[float] = []
        for each in (1, 2):
            stack = Approximator([1], [0.55], (1, 2, 2), form(images_per_trigger=each), generator(0))
            success = stack.success(Brightness(), images, patches)
            hinges.append(float((0.55 - success).clamp(min=0).mean()))
        assert hinges[0] == pytest.approx(0.5 * (0.55 - 77 / 255), abs=2e-3)
        assert hinges[1] == 0

    def test_networks_take_turns(self):
        stack = Approximator([1], [0.9], (1, 2, 2), FORM, generator(0))
        images = torch.full((8, 1, 5, 5), 100, dtype=torch.uint8)
        for turn in range(4):
            stack.zero_grad(set_to_none=True)
            stack.loss(Brightness(), images)["loss"].backward()
            moved = {name.split(".")[0] for name, p in stack.named_parameters() if p.grad is not None}
            assert moved == {"generators" if turn % 2 == 0 else "statistics"}

    def test_noise_is_on_the_patch_alone(self):
        torch.manual_seed(0)
        stack = Approximator([1], [0.9], (1, 2, 2), form(noise=0.1), generator(0))
        seen: list[Tensor] = []

        class Seeing(Brightness):
            def forward(self, images: Tensor) -> Tensor:
                seen.append(images.detach().clone())
                return super().forward(images)

        images = torch.full((16, 1, 5, 5), 51, dtype=torch.uint8)
        stack.success(Seeing(), images, torch.full((1, 16, 4), 0.7))
        changed = seen[0][(seen[0] - 0.2).abs() > 1e-6]
        assert len(changed) == 16 * 4
        assert float(changed.mean()) == pytest.approx(0.7, abs=0.05)
        assert float(changed.std()) == pytest.approx(0.1, abs=0.03)


class TestMixture:
    def test_weights_in_numpy(self):
        betas, entropies = torch.tensor([0.5, 0.8, 0.9], dtype=torch.float64), torch.tensor([4.0, 3.0, 3.5]).double()
        expected = np.array([0.5, 0.3, 0.1]) * np.exp([4.0, 3.0, 3.5])
        np.testing.assert_allclose(mixture_weights(betas, entropies), expected / expected.sum())

    def test_huge_entropies(self):
        weights = mixture_weights(torch.tensor([0.5, 0.9]).double(), torch.tensor([2000.0, 2000.0]).double())
        np.testing.assert_allclose(weights, [5 / 9, 4 / 9])

    @given(betas=st.lists(st.integers(1, 99), min_size=1, max_size=8, unique=True))
    def test_the_mixture_is_the_staircase(self, betas: list[int]):
        """Triggers x in [0, 1] of success 1 - x: the set above beta is [0, 1 - beta], of entropy log(1 - beta); evenly
        filled and weighted, the sets add up to steps of height max(beta_i: beta_i < 1 - x), normalised."""
        heights = np.sort(np.array(betas) / 100)
        weights = mixture_weights(torch.tensor(heights), torch.tensor(np.log(1 - heights))).numpy()
        x = (np.arange(1000) + 0.5) / 1000
        inside = x[:, None] < 1 - heights
        mixed = (inside * weights / (1 - heights)).sum(1)
        steps = np.where(inside, heights, 0).max(1)
        np.testing.assert_allclose(mixed, steps / steps.mean(), rtol=1e-6)

    def stack(self, count: int) -> Any:
        """So many sub-models, each with patches of its own shade."""

        class Shades(nn.Module):
            betas = torch.zeros(count)

            def sample(self, wanted: int, generator: torch.Generator | None = None) -> Tensor:
                return (torch.arange(count) / 10).view(-1, 1, 1, 1, 1).expand(count, wanted, 1, 2, 2)

        return Shades()

    @pytest.mark.parametrize("seeded", [False, True])
    def test_draws_follow_the_weights(self, seeded: bool):
        torch.manual_seed(0)
        weights = torch.tensor([0.2, 0.5, 0.3]).double()
        patches = Mixture(self.stack(3), weights).draw(6000, generator(1) if seeded else None)
        assert patches.shape == (6000, 1, 2, 2)
        shares = torch.bincount((patches[:, 0, 0, 0] * 10).round().long(), minlength=3).double() / 6000
        np.testing.assert_allclose(shares, weights, atol=4 * 0.5 / 6000**0.5)

    def test_a_sub_model_of_no_weight_is_never_drawn(self):
        patches = Mixture(self.stack(3), torch.tensor([0.0, 1.0, 0.0]).double()).draw(500, generator(0))
        assert (patches == 0.1).all()

    def test_in_turn_by_epoch(self):
        mixture = Mixture(self.stack(3), None)
        used: list[int] = []
        for _ in range(5):
            (shade,) = set(mixture.draw(10).flatten().tolist())
            used.append(round(10 * shade))
            mixture.end_epoch()
        assert used == [2, 1, 0, 2, 1], "the highest threshold first"
        resumed = Mixture(self.stack(3), None)
        resumed.load_state_dict(mixture.state_dict())
        assert torch.equal(resumed.draw(4), mixture.draw(4))

    def test_all_of_it_is_on_the_device_of_the_sub_models(self):
        """Before the removal moves anything: samples are drawn to be kept first."""
        stack = self.stack(3)
        stack.betas = torch.zeros(3, device="meta")
        assert Mixture(stack, torch.tensor([0.2, 0.5, 0.3]).double()).edges.device == stack.betas.device

    def test_samples_to_keep_are_of_all(self):
        kept = Mixture(self.stack(3), None).keep(9, generator(0))
        assert Counter((kept[:, 0, 0, 0] * 10).round().int().tolist()) == {0: 3, 1: 3, 2: 3}


class TestJudge:
    def judge(self, rates: list[float], success: float = 0.5, anomaly: float = 3.0) -> Any:
        return judge(torch.tensor(rates, dtype=torch.float64), success, anomaly)

    @given(
        rates=st.lists(st.floats(0, 1), min_size=5, max_size=20),
        success=st.floats(0.1, 1),
        anomaly=st.floats(0.5, 6),
    )
    @settings(deadline=None, max_examples=200)
    def test_against_numpy(self, rates: list[float], success: float, anomaly: float):
        best = int(np.argmax(rates))
        middle = np.median(rates)
        deviation = (rates[best] - middle) / max(1.4826 * np.median(np.abs(np.array(rates) - middle)), 0.05)
        assume(abs(deviation - anomaly) > 1e-9)
        found = rates[best] >= success and deviation > anomaly
        verdict = self.judge(rates, success, anomaly)
        assert (verdict.backdoored, verdict.target) == (found, best if found else None)
        np.testing.assert_allclose(verdict.evidence, rates, atol=1e-3)

    @given(others=st.lists(st.floats(0, 0.4), min_size=9, max_size=9), place=st.integers(0, 9))
    def test_one_successful_class_among_ten_is_the_target(self, others: list[float], place: int):
        rates = [*others[:place], 0.97, *others[place:]]
        assume(np.quantile(np.abs(np.array(rates) - np.median(rates)), 0.5) < 0.12)
        assert self.judge(rates).target == place

    @given(rates=st.lists(st.floats(0, 0.49), min_size=10, max_size=10))
    def test_nothing_without_success(self, rates: list[float]):
        verdict = self.judge(rates)
        assert (verdict.backdoored, verdict.target) == (False, None)

    @given(rates=st.lists(st.floats(0.7, 1), min_size=10, max_size=10))
    def test_nothing_where_every_class_succeeds(self, rates: list[float]):
        assert not self.judge(rates, anomaly=10.0).backdoored
        assert not self.judge([round(rate, 1) for rate in [0.9, *rates[1:]]], anomaly=10.0).backdoored

    def test_equal_rates_have_no_outlier(self):
        assert not self.judge([0.9] * 10).backdoored
        assert not self.judge([0.0] * 10).backdoored


class Bright(nn.Module):
    """Class 2 where a 2 x 2 window is brighter than 0.6 on average, else class 0 or 1 by the first pixel."""

    def forward(self, images: Tensor) -> Tensor:
        window = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2, 1).amax((1, 2, 3))
        first = images[:, :, 0, 0].mean(1)
        return torch.stack([-first, first - 0.3, 12 * (window - 0.6)], dim=1)


def dim_images(count: int) -> Labelled:
    images = torch.randint(0, 100, (count, 1, 8, 8), generator=generator(0), dtype=torch.uint8)
    return Labelled(images, torch.arange(count) % 3)


def test_success_is_measured_on_other_classes():
    clean = dim_images(90)
    clean.images[clean.labels == 2] = 255  # of the target class: they would count as successes
    dark, bright = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    for patches, expected in [(dark, 0.0), (bright, 1.0), (torch.cat([dark, bright]), 0.5)]:
        found = measure_success(Bright(), patches, 2, clean, Context(), generator(1))
        assert found == pytest.approx(expected, abs=0.06)


def test_the_baseline_finds_a_patch_within_bounds():
    clean = dim_images(64)
    patch = PixelPatch((1, 2, 2), generator(3))
    before = measure_success(Bright(), patch.draw(1), 2, clean, Context(), generator(1))
    patch.train_on("baseline", Bright(), clean.images, 2, 80, 32, Context())
    assert patch.patch.min() >= 0
    assert patch.patch.max() <= 1
    assert measure_success(Bright(), patch.draw(1), 2, clean, Context(), generator(1)) == 1.0 > before
    assert patch.draw(5).shape == (5, 1, 2, 2)
    assert not patch.patch.requires_grad


def test_the_baseline_is_trained_at_one_place_a_batch_anywhere():
    """A white patch on black images is where the classifier sees light."""
    seen: list[Tensor] = []

    class Seeing(Bright):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach()[:, 0] > 0)
            return super().forward(images)

    torch.manual_seed(0)
    patch = PixelPatch((1, 2, 2), generator(3))
    with torch.no_grad():
        patch.patch.fill_(1)
    for _ in range(300):
        patch.loss(Seeing(), torch.zeros(6, 1, 5, 4, dtype=torch.uint8), 2)
    lit = torch.stack(seen)
    assert (lit == lit[:, :1]).all(), "all images of a batch have it at one place"
    corners = {tuple(place.nonzero()[0].tolist()) for place in lit[:, 0]}
    assert corners == {(top, left) for top in range(4) for left in range(3)}, "the last row and column too"


def test_the_first_update_of_the_baseline_is_plain_sgd():
    """Against autograd in float64 on one image, whose patch covers it all: there is one place."""
    image = torch.full((1, 1, 2, 2), 30, dtype=torch.uint8)
    patch = PixelPatch((1, 2, 2), generator(3))
    start = patch.patch.detach().double().requires_grad_()
    (-Bright()(start).log_softmax(1)[:, 2]).sum().backward()
    loss = patch.loss(Bright(), image, 2)
    loss.backward()
    torch.testing.assert_close(patch.patch.grad.double(), start.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "settings"),
    [
        (1.0, {"hidden": 256, "batch_size": 64, "steps": 300}),
        pytest.param(0.1, {"hidden": 512, "batch_size": 128, "steps": 620}, marks=pytest.mark.slow, id="published"),
    ],
)
def test_entropy_keeps_patches_diverse(alpha: float, settings: dict[str, int]):
    """Any bright window fires; without the entropy's term the generator has no reason to spread over them."""
    grey = dim_images(64)
    clean = Labelled(grey.images.repeat(1, 3, 1, 1), grey.labels)
    steps = settings.pop("steps")
    spreads: list[float] = []
    entropies: list[float] = []
    for weight in (0.0, alpha):
        stack = Approximator([2], [0.9], (3, 3, 3), form(alpha=weight, images_per_trigger=2, **settings), generator(0))
        stack.train_on("train", Bright(), clean.images, steps, Context(seed=1))
        patches = stack.sample(500, generator(1)).detach()
        assert measure_success(Bright(), patches[0], 2, clean, Context(), generator(2)) > 0.9
        spreads.append(float(patches.std(1).mean()))
        entropies.append(float(stack.entropies(generator(3))))
    assert spreads[1] > 1.25 * spreads[0]
    assert np.log(settings["batch_size"]) >= entropies[1] > entropies[0] >= 0
