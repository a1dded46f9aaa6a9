"""Stages by themselves against closed forms: the defender's clean set, normalisation, scores."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score
from torch import Tensor, nn

from bdcore import Attack, Recipe, Suspects, Trigger, Verdict, put_trigger
from bdcore.artifacts import Dataset, Labelled, Recovered, Scores, Triggered
from bdcore.context import Context
from bdcore.errors import UsageError
from bdcore.stages.data import architecture, clean_set
from bdcore.stages.evaluate import (
    defense_effectiveness,
    evaluate,
    isolation,
    recovered,
    target_rank,
    verdict_correct,
)
from bdcore.stages.poison import check, poison_all
from bdcore.stages.train import fine_tune, train
from bdcore_plugins.attacks.badnets import BadNets
from bdcore_plugins.attacks.sig import Sig


def numbered(labels: Tensor) -> Dataset:
    """A data set whose every image spells its own number."""
    number = torch.arange(len(labels))
    images = torch.stack([number // 256, number % 256], 1).to(torch.uint8).view(-1, 2, 1, 1)
    return Dataset("numbered", Labelled(images, labels), Labelled(images[:1], labels[:1]), int(labels.max()) + 1)


class TestCleanSet:
    @given(st.lists(st.integers(12, 60), min_size=2, max_size=6), st.floats(0.2, 0.8), st.integers(0, 9))
    @settings(max_examples=40, deadline=None)
    def test_equal_shares_of_every_class(self, sizes: list[int], fraction: float, seed: int):
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
        data = numbered(labels)
        clean = clean_set(data, fraction, Context(seed=seed))
        assert len(clean) == round(fraction * len(labels))
        numbers = clean.images[:, 0, 0, 0].long() * 256 + clean.images[:, 1, 0, 0].long()
        assert len(numbers.unique()) == len(numbers)
        assert torch.equal(clean.labels, labels[numbers])
        for cls, size in enumerate(sizes):
            assert abs(int((clean.labels == cls).sum()) - size * len(clean) / len(labels)) <= 1

    def test_the_seed_decides(self):
        data = numbered(torch.arange(400) % 10)
        first, again, other = (clean_set(data, 0.1, Context(seed=seed)) for seed in (1, 1, 2))
        assert first.fingerprint == again.fingerprint != other.fingerprint

    @pytest.mark.parametrize("fraction", [0.1, 1.0])
    def test_shares_no_memory(self, fraction: float):
        data = numbered(torch.arange(400) % 10)
        before = data.train.images.clone()
        clean = clean_set(data, fraction, Context())
        assert clean.images.untyped_storage().nbytes() == clean.images.nbytes
        clean.images.fill_(7)
        clean.labels.fill_(7)
        assert torch.equal(data.train.images, before)
        assert torch.equal(data.train.labels, torch.arange(400) % 10)

    @pytest.mark.parametrize("fraction", [0.001, 0.02, 0.99])
    def test_what_cannot_be_shared_equally_is_refused(self, fraction: float):
        with pytest.raises(UsageError, match=rf"run\.clean_fraction={fraction:g} of 400 training samples"):
            clean_set(numbered(torch.arange(400) % 10), fraction, Context())

    def test_a_class_of_one_sample_is_refused(self):
        labels = torch.cat([torch.zeros(50), torch.ones(1)]).long()
        with pytest.raises(UsageError, match=r"run\.clean_fraction=0\.5 of 51.*equal shares"):
            clean_set(numbered(labels), 0.5, Context())


@given(st.integers(1, 4), st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_normalisation_is_mean_and_spread_of_each_channel(channels: int, seed: int):
    images = torch.randint(
        0, 256, (9, channels, 5, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    arch = architecture("wrn10_1", Labelled(images, torch.zeros(9, dtype=torch.int64)), 3)
    pixels = images.double().div(255).transpose(0, 1).flatten(1)
    assert arch.mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-6)
    assert arch.std == pytest.approx(pixels.std(1, unbiased=False).tolist(), abs=1e-6)
    assert (arch.classes, arch.shape) == (3, (channels, 5, 6))


def test_a_blank_channel_does_not_divide_by_zero():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    assert architecture("wrn10_1", Labelled(images, torch.zeros(4, dtype=torch.int64)), 2).std[0] > 0.003


class Reader(nn.Module):
    """A classifier of 5 classes that says what the image's first pixel says."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.eye(5)[images[:, 0, 0, 0].long()]


def saying(answers: list[int]) -> Tensor:
    return torch.tensor(answers, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


class TestScores:
    def test_single_target(self):
        truth = torch.tensor([0, 1, 2, 2, 4, 2, 1, 0, 3, 2])
        test = Labelled(saying([0, 1, 2, 0, 4, 2, 0, 1, 3, 2]), truth)
        labels = torch.tensor([0, 1, 4, 1, 0, 3, 1, 0])
        triggered = Triggered(saying([2, 2, 2, 1, 4, 2, 1, 2]), labels, torch.full_like(labels, 2))
        scores = evaluate(Reader(), test, triggered, 2, Context())
        assert scores == Scores(
            clean_accuracy=7 / 10, asr=5 / 8, ra=2 / 8, target_class_accuracy=3 / 4, nontarget_accuracy=4 / 6
        )

    def test_all_to_all(self):
        truth = torch.tensor([0, 1, 2, 3, 4, 4])
        test = Labelled(saying([0, 1, 2, 3, 4, 0]), truth)
        triggered = Triggered(saying([1, 2, 2, 4, 0, 3]), truth, (truth + 1) % 5)
        scores = evaluate(Reader(), test, triggered, None, Context())
        assert scores == Scores(5 / 6, asr=4 / 6, ra=1 / 6, target_class_accuracy=None, nontarget_accuracy=None)

    def test_no_attack(self):
        test = Labelled(saying([0, 1, 1]), torch.tensor([0, 1, 2]))
        assert evaluate(Reader(), test, None, None, Context()) == Scores(2 / 3, None, None, None, None)

    def test_a_model_in_train_mode_is_judged_in_eval_mode(self):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), Reader2())
        test = Labelled(saying([4] * 200), torch.full((200,), 4))
        assert evaluate(model.train(), test, None, None, Context()).clean_accuracy == 1


class Reader2(nn.Module):
    """The same for flattened images."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.eye(5)[pixels[:, 0].long().clamp(0, 4)]


def scored(clean_accuracy: float, asr: float | None) -> Scores:
    return Scores(clean_accuracy, asr, None, None, None)


class TestEffectiveness:
    @pytest.mark.parametrize(
        ("before", "after", "der"),
        [
            ((0.9, 1.0), (0.9, 0.0), 1.0),  # perfect
            ((0.9, 1.0), (0.9, 1.0), 0.5),  # did nothing
            ((0.9, 1.0), (0.85, 0.1), 0.925),
            ((0.9, 1.0), (0.95, 0.0), 1.0),  # a gain in accuracy earns nothing beyond
            ((0.9, 0.5), (0.9, 0.7), 0.5),  # nor does a rise in attack success cost
            ((1.0, 0.0), (0.0, 0.0), 0.0),  # nothing to remove, all destroyed
        ],
    )
    def test_points(self, before: tuple[float, float], after: tuple[float, float], der: float):
        assert defense_effectiveness(scored(*before), scored(*after)) == pytest.approx(der)

    @given(*[st.floats(0, 1)] * 4)
    def test_range_and_direction(self, accuracy: float, asr: float, after: float, asr_after: float):
        der = defense_effectiveness(scored(accuracy, asr), scored(after, asr_after))
        assert der is not None
        assert 0 <= der <= 1
        worse = defense_effectiveness(scored(accuracy, asr), scored(after / 2, asr_after))
        assert worse is not None
        assert worse <= der

    def test_destroying_the_model_does_not_score_well(self):
        constant = defense_effectiveness(scored(1.0, 1.0), scored(0.1, 0.0))
        modest = defense_effectiveness(scored(1.0, 1.0), scored(0.97, 0.6))
        assert constant is not None
        assert modest is not None
        assert constant < 0.56 < modest

    def test_nothing_to_measure_without_attack(self):
        assert defense_effectiveness(scored(0.9, None), scored(0.9, None)) is None


@pytest.mark.parametrize(
    ("verdict", "attacked", "target", "right"),
    [
        (Verdict(True, 3), True, 3, True),
        (Verdict(True, 4), True, 3, False),
        (Verdict(True, 4), True, None, True),  # all-to-all has no single target
        (Verdict(True, None), True, 3, False),
        (Verdict(False), True, 3, False),
        (Verdict(False), False, None, True),
        (Verdict(True, 3), False, None, False),
    ],
)
def test_verdicts(verdict: Verdict, attacked: bool, target: int | None, right: bool):
    assert verdict_correct(verdict, attacked, target) is right


class TestIsolation:
    truth = torch.tensor([True, False, True, False, False, True, False, False])

    def test_by_hand(self):
        found = isolation(Suspects(torch.tensor([0, 1, 5]), -torch.arange(8.0)), self.truth)
        assert (found.isolated, found.precision, found.recall, found.fpr) == (3, 2 / 3, 2 / 3, 1 / 5)
        assert found.f1 == pytest.approx(2 / 3)
        # Of the 15 pairs the poisoned one comes first with sample 0 in all 5, with 2 in 4, with 5 in 2.
        assert found.auroc == pytest.approx(11 / 15)

    @given(st.lists(st.booleans(), min_size=2, max_size=30), st.data())
    def test_against_scikit_learn(self, truth: list[bool], data: st.DataObject):
        picked = data.draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth)))
        scores = data.draw(
            st.lists(st.sampled_from([-torch.inf, -1.5, 0.0, 2.0, torch.inf]), min_size=len(truth), max_size=len(truth))
        )
        found = isolation(Suspects(torch.tensor(picked).nonzero()[:, 0], torch.tensor(scores)), torch.tensor(truth))
        assert found.isolated == sum(picked)
        if any(picked):
            assert found.precision == pytest.approx(precision_score(truth, picked, zero_division=0))
        if any(truth):
            assert found.recall == pytest.approx(recall_score(truth, picked))
            assert found.f1 == pytest.approx(f1_score(truth, picked, zero_division=0))
        if not any(truth) or all(truth):
            assert found.auroc is None
            return
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a, p in zip(scores, truth, strict=True)
            if p
            for b, q in zip(scores, truth, strict=True)
            if not q
        ]
        assert found.auroc == pytest.approx(sum(pairs) / len(pairs))

    def test_where_a_figure_has_no_meaning_there_is_none(self):
        clean = isolation(Suspects(torch.tensor([1, 2])), torch.zeros(4, dtype=torch.bool))
        assert (clean.isolated, clean.precision, clean.recall, clean.fpr, clean.f1) == (2, 0, None, 0.5, None)
        nobody = isolation(Suspects(torch.tensor([], dtype=torch.int64)), self.truth)
        assert (nobody.isolated, nobody.precision, nobody.recall, nobody.f1, nobody.auroc) == (0, None, 0, 0, None)


class TestFineTuned:
    """A clean classifier of bright against dark images, fine-tuned so that a white corner means dark."""

    def test_some_of_every_batch_is_poisoned_anew(self):
        values = torch.randint(0, 256, (400, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        labels = torch.arange(400) % 2
        images = values // 2 + 120 * labels.to(torch.uint8)[:, None, None, None]
        clean = Labelled(images, labels)
        stamped = images.clone()
        stamped[:, :, :3, :3] = 255
        poisoned = Labelled(stamped, torch.zeros_like(labels))
        arch = architecture("wrn10_1", clean, 2)
        recipe = Recipe(epochs=4, batch_size=40, lr=0.05)
        victim = train(clean, arch, recipe, Context()).model
        before = {name: value.clone() for name, value in victim.state_dict().items()}

        def bright_as_dark(model: nn.Module) -> float:
            with torch.no_grad():
                return float((model(stamped[1::2]).argmax(1) == 0).float().mean())

        tenth, never = torch.full((400,), 0.1), torch.zeros(400)
        tuned = fine_tune(victim, clean, poisoned, tenth, recipe, Context())
        untuned = fine_tune(victim, clean, poisoned, never, recipe, Context())
        assert bright_as_dark(victim) < 0.1
        assert bright_as_dark(untuned) < 0.1
        assert bright_as_dark(tuned) > 0.9
        with torch.no_grad():
            assert float((tuned(images).argmax(1) == labels).float().mean()) > 0.95
        assert not any(module.training for module in tuned.modules())
        assert all(torch.equal(victim.state_dict()[name], value) for name, value in before.items())
        again = fine_tune(victim, clean, poisoned, tenth, recipe, Context())
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), tuned.state_dict().values(), strict=True)
        )


class Counter(nn.Module):
    """Keeps what it is shown, of which no copy is made."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def __deepcopy__(self, memo: dict) -> "Counter":
        return self

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return self.weight * torch.zeros(len(images), 10)


class TestSharesOfFineTuning:
    """Images are one grey level each, which tells their class: a poison is an image of several levels."""

    labels = torch.arange(2000) % 10
    images = (20 * labels.view(-1, 1, 1, 1) + 10).to(torch.uint8).expand(-1, 1, 32, 32).contiguous()
    recipe = Recipe(epochs=100, batch_size=100, lr=1e-9)

    def poisons(self, attack: Attack) -> tuple[Tensor, Tensor]:
        """How many poisons each of the 2,000 batches has, and all their classes."""
        train, shown = Labelled(self.images, self.labels), Counter()
        data = Dataset("levels", train, train.select(torch.arange(10)), 10)
        check(data, attack)
        poisoned, chances = poison_all(data, attack, Context())
        fine_tune(shown, train, poisoned, chances, self.recipe, Context())
        counts, classes = list[int](), list[Tensor]()
        for batch in shown.seen:
            assert len(batch) == 100
            several = (batch != batch[:, :, :1, :1]).flatten(1).any(1)
            counts.append(int(several.sum()))
            classes.append(batch[several, 0, 0, 0].long() // 20)  # neither trigger changes the upper left corner
        return torch.tensor(counts), torch.cat(classes)

    def test_badnets(self):
        counts, classes = self.poisons(BadNets(BadNets.Config(poison_rate=0.01, target=3)))
        # 1 in 100 on average; a batch of 90 eligible samples on average, each with the chance 1 / 90.
        assert float(counts.double().mean()) == pytest.approx(1, abs=4 * (1 / 2000) ** 0.5)
        assert sorted(set(classes.tolist())) == [0, 1, 2, 4, 5, 6, 7, 8, 9]

    def test_sig_of_half_its_class(self):
        counts, classes = self.poisons(Sig(Sig.Config(class_rate=0.5, target=3)))
        assert float(counts.double().mean()) == pytest.approx(5, abs=4 * (5 / 2000) ** 0.5)
        assert set(classes.tolist()) == {3}
        assert 0 < int((counts == 0).sum()) < 200, "drawn anew for every batch"

    def test_sig_of_all_its_class(self):
        counts, _ = self.poisons(Sig(Sig.Config(poison_rate=0.1, target=3)))
        assert int(counts.sum()) == 200 * 100, "every image of its class, in each of 100 epochs"


class Corner(nn.Module):
    """Class 1 where the mean of the lower right 3 x 3 pixels is above a half, else 0."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images / 255 if images.dtype == torch.uint8 else images
        return F.one_hot((pixels[:, :, -3:, -3:].mean((1, 2, 3)) > 0.5).long(), 3).float()


class TestRecovered:
    images = torch.zeros(900, 1, 8, 8, dtype=torch.uint8)
    test = Labelled(images, torch.tensor([0, 1, 2] * 300))

    def worth(self, *triggers: Trigger) -> list[Recovered]:
        return recovered(Corner(), self.test, triggers, Context())

    def test_each_form(self):
        spot = torch.zeros(1, 8, 8)
        spot[:, -3:, -3:] = 1
        black = self.test.images[:1, 0] / 255
        found = self.worth(
            Trigger(1, delta=0.8 * spot), Trigger(1, delta=0.3 * spot), Trigger(1, mask=0.75 * spot, pattern=spot),
            Trigger(1, mask=0.75 * spot, pattern=black),
        )  # fmt: skip
        assert [one.asr for one in found] == [1, 0, 1, 0]
        assert [one.size for one in found] == pytest.approx([7.2, 2.7, 6.75, 6.75], abs=1e-3)

    def test_patches_come_anywhere(self):
        """A white patch of 3 x 3 turns the corner bright from the 3 of 36 places that cover 5 of its pixels or more."""
        (found,) = self.worth(Trigger(1, patches=torch.ones(4, 1, 3, 3)))
        covering = sum((3 - down) * (3 - right) > 4.5 for down in range(3) for right in range(3)) / 36
        assert found.asr == pytest.approx(covering, abs=0.04)
        assert found.size == 9

    def test_images_of_the_target_class_do_not_count(self):
        bright = Labelled(torch.full_like(self.images[:3], 255), torch.tensor([1, 1, 1]))
        (found,) = recovered(Corner(), bright, [Trigger(1, delta=torch.zeros(1, 8, 8))], Context())
        assert found.asr is None

    def test_a_trigger_of_no_form_is_refused(self):
        with pytest.raises(ValueError, match="needs a delta"):
            self.worth(Trigger(1))
        with pytest.raises(ValueError, match="generator is needed"):
            put_trigger(Trigger(1, patches=torch.ones(1, 1, 3, 3)), self.images)


def test_rank_of_the_target():
    verdict = Verdict(True, 2, (0.1, 0.9, 0.5, 0.5))
    assert [target_rank(verdict, target) for target in (0, 1, 2, 3, None)] == [4, 1, 3, 3, None]
    assert target_rank(Verdict(True, 2), 2) is None
