"""ABL: what each phase does to a classifier, against float64, and the whole on backdoored digits."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore import (
    Architecture,
    Batch,
    Context,
    Dataset,
    DefenseError,
    DefenseInput,
    Labelled,
    Outcome,
    Recipe,
    build,
    fit,
    isolation_loss,
)
from bdcore.artifacts import Poisoned, Scores, Victim, fingerprint
from bdcore.config import resolve
from bdcore.context import Progress
from bdcore.errors import UsageError
from bdcore.plugins import Host
from bdcore.stages.data import architecture
from bdcore.stages.defend import defend
from bdcore.stages.evaluate import evaluate, isolation
from bdcore.stages.poison import poison
from bdcore.training import loop
from bdcore_plugins.attacks.badnets import BadNets
from bdcore_plugins.datasets.digits import Digits
from bdcore_plugins.defenses import abl
from bdcore_plugins.defenses.abl import ABL

ARCH = Architecture("wrn10_1", 10, (1, 16, 16), (0.3,), (0.4,))
PLAIN = Recipe(epochs=1, batch_size=16, lr=0.1, weight_decay=1e-4)
SHORT: dict[str, Any] = {"isolation_epochs": 2, "finetuning_epochs": 2, "unlearning_epochs": 2, "flip": False}


def noise(count: int, seed: int = 0) -> Labelled:
    """Images no two of which are alike."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=generator)
    return Labelled(images, torch.randint(0, 10, (count,), generator=generator))


def digits(count: int) -> Dataset:
    """Real handwritten digits, 1 x 16 x 16."""
    whole = Digits(Digits.Config()).load(None)

    def small(data: Labelled, most: int) -> Labelled:
        return Labelled(data.images[:most, :1, ::2, ::2].contiguous(), data.labels[:most])

    return Dataset("digits", small(whole.train, count), small(whole.test, 360), 10)


def noisy(data: Dataset) -> Dataset:
    """The same images, with seven parts of noise to three."""
    generator = torch.Generator().manual_seed(0)

    def mixed(part: Labelled) -> Labelled:
        static = torch.randint(0, 256, part.images.shape, generator=generator)
        return Labelled((0.3 * part.images + 0.7 * static).round().to(torch.uint8), part.labels)

    return replace(data, train=mixed(data.train), test=mixed(data.test))


def backdoored(data: Dataset, seed: int = 1) -> Poisoned:
    return poison(data, BadNets(BadNets.Config(size=6, pattern="white")), Context(seed=seed))


def run(suspect: Labelled, context: Context | None = None, **options: Any) -> Outcome:
    arch = architecture("wrn10_1", suspect, 10)
    return ABL(ABL.Config(**options))(DefenseInput(10, suspect=suspect, arch=arch), context or Context(seed=1))


class Seen:
    """Every batch that a model is given in train mode."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[Tensor] = []
        model.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, given: tuple[Tensor]) -> None:
        if module.training:
            self.batches.append(given[0].clone())


def places(batch: Tensor, data: Labelled) -> Tensor:
    """Where the images of a batch stand in the data, -1 for those that are not there."""
    same = (batch[:, None] == data.images[None]).flatten(2).all(2)
    return torch.where(same.any(1), same.float().argmax(1), -1)


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def gradients(model: nn.Module, images: Tensor, parts: list[tuple[slice, Tensor, float]]) -> list[Tensor]:
    """Float64 gradients of a sum of weighted mean cross entropies, in train mode, by PyTorch's own."""
    exact = copy.deepcopy(model).double().train()
    logits = exact(images.double() / 255)
    total = sum(weight * F.cross_entropy(logits[rows], labels) for rows, labels, weight in parts)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, list(exact.parameters())))


class TestUnlearning:
    """One update at a rate of 1, from which the gradient that was followed can be read."""

    def step(self, variant: str) -> tuple[nn.Module, nn.Module, Labelled, Labelled, Tensor, list[Tensor]]:
        """The model before and after, both sets, the batch that it saw, and the momentum that there was."""
        config = ABL.Config(variant=variant, unlearning_epochs=1, unlearning_lr=1, min_steps=1, batch_size=16)
        defense, model = ABL(config), build(ARCH, 3).train()
        isolated, rest = noise(12, seed=1), noise(40, seed=2)

        def learn(batch: Batch) -> Tensor:
            return F.cross_entropy(model(batch["images"]), batch["labels"])

        optimizer = fit("learn", model, {"images": rest.images, "labels": rest.labels}, learn, PLAIN, Context())
        moved = [optimizer.state[parameter]["momentum_buffer"].clone() for parameter in model.parameters()]
        before, seen = copy.deepcopy(model), Seen(model)
        defense.unlearn(model, isolated, rest, PLAIN, config.settings(), optimizer, Context(seed=4))
        (batch,) = seen.batches
        return before, model, isolated, rest, batch, moved

    def check(self, before: nn.Module, after: nn.Module, wanted: list[Tensor]) -> None:
        for old, new, gradient in zip(parameters(before), parameters(after), wanted, strict=True):
            followed = old - new - 1e-4 * old
            torch.testing.assert_close(followed.double(), gradient, rtol=1e-3, atol=2e-5)

    def test_joint_gradient_is_that_of_others_minus_isolated(self):
        before, after, isolated, rest, batch, _ = self.step("paper")
        mine, theirs = batch[16:], batch[:16]
        assert len(mine) == 12
        drawn, here = places(theirs, rest), places(mine, isolated)
        assert drawn.min() >= 0
        assert sorted(here.tolist()) == list(range(12))
        parts = [(slice(0, 16), rest.labels[drawn], 1.0), (slice(16, None), isolated.labels[here], -1.0)]
        # The momentum that the fine-tuning left does not carry over here.
        self.check(before, after, gradients(before, batch, parts))

    def test_official_ascends_on_the_isolated_alone_and_keeps_the_momentum(self):
        before, after, isolated, _, batch, moved = self.step("official")
        here = places(batch, isolated)
        assert sorted(here.tolist()) == list(range(12)), "each once, as they are"
        ascent = gradients(before, batch, [(slice(None), isolated.labels[here], -1.0)])
        self.check(before, after, [0.9 * old.double() + new for old, new in zip(moved, ascent, strict=True)])
        means = [value for name, value in after.state_dict().items() if name.endswith("running_mean")]
        olds = [value for name, value in before.state_dict().items() if name.endswith("running_mean")]
        assert not any(torch.equal(new, old) for new, old in zip(means, olds, strict=True)), "BatchNorm in train mode"

    @pytest.mark.parametrize("variant", ["paper", "official", "backdoorbench"])
    def test_the_isolated_lose(self, variant: str):
        told: list[float] = []
        context = Context(report=lambda progress: told.append(progress.figures["isolated"]))
        defense = ABL(ABL.Config(variant=variant, unlearning_lr=0.002, unlearning_epochs=6))
        model = build(ARCH, 3)
        optimizer = PLAIN.optimizer_for(model.parameters())
        defense.unlearn(model, noise(12), noise(40, 1), PLAIN, defense.config.settings(), optimizer, context)
        assert told == sorted(told)
        assert told[-1] > told[0] + 0.1

    def test_only_backdoorbench_augments_the_isolated_and_only_the_joint_form_shows_others(self):
        for variant, changed, others in [("paper", False, 16), ("official", False, 0), ("backdoorbench", True, 0)]:
            config = ABL.Config(variant=variant, unlearning_epochs=2, batch_size=16)
            defense, model = ABL(config), build(ARCH, 3)
            isolated, rest = noise(12, 1), noise(40, 2)
            seen, settings = Seen(model), config.settings()
            optimizer = PLAIN.optimizer_for(model.parameters())
            defense.unlearn(model, isolated, rest, defense.recipe(rest, settings), settings, optimizer, Context())
            assert len(seen.batches) == 2 * settings.min_steps, "12 are one batch, repeated"
            shown = torch.cat([places(batch[others:], isolated) for batch in seen.batches])
            assert bool((shown == -1).any()) == changed
            assert {len(batch) for batch in seen.batches} == {12 + others}
            if others:
                augmented = torch.cat([places(batch[:others], rest) for batch in seen.batches])
                assert (augmented == -1).float().mean() > 0.9

    def test_it_ends_where_the_loss_is_enough(self):
        told: list[Progress] = []
        defense = ABL(ABL.Config(unlearning_lr=0.002, unlearning_epochs=500, stop_loss=4.0))
        model = build(ARCH, 3)
        optimizer = PLAIN.optimizer_for(model.parameters())
        settings = defense.config.settings()
        defense.unlearn(model, noise(12), noise(40, 1), PLAIN, settings, optimizer, Context(report=told.append))
        assert told[-1].figures["isolated"] >= 4 > told[-2].figures["isolated"]


class TestIsolation:
    def batches(self, variant: str, data: Labelled) -> list[Tensor]:
        defense, model = ABL(ABL.Config(variant=variant, isolation_epochs=2, batch_size=16)), build(ARCH, 0)
        seen = Seen(model)
        defense.train_to_isolate(model, data, defense.config.settings(), Context())
        return [places(batch, data) for batch in seen.batches]

    def test_images_are_as_they_are_and_in_stored_order_in_the_official_variant_alone(self):
        data = noise(48)
        official = torch.cat(self.batches("official", data)).tolist()
        assert official == 2 * list(range(48))
        for variant in ("paper", "backdoorbench"):
            first, second = torch.cat(self.batches(variant, data)).chunk(2)
            assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(48))
            assert first.tolist() != second.tolist()

    @pytest.mark.parametrize("loss", ["lga", "flood"])
    def test_the_loss_stays_about_gamma(self, loss: str):
        """Without a floor the network learns 64 images by heart in as many steps."""
        reached: dict[float, float] = {}
        data = noise(64)
        for gamma in (0.0, 1.5):
            config = ABL.Config(loss=loss, gamma=gamma, isolation_epochs=40, lr=0.05, batch_size=32)
            defense, model = ABL(config), build(ARCH, 0)
            defense.train_to_isolate(model, data, config.settings(), Context())
            with torch.no_grad():
                reached[gamma] = float(F.cross_entropy(model.train()(data.images), data.labels))
        assert reached[0] < 0.2
        assert 0.9 < reached[1.5] < 2.1

    def test_both_losses_and_signs_train_alike_where_they_should(self):
        """LGA and flooding differ in value alone; the sign of a sample and of a batch in the gradient."""
        states: dict[tuple[str, str], str] = {}
        for loss in ("lga", "flood"):
            for per in ("sample", "batch"):
                config = ABL.Config(loss=loss, per=per, gamma=2.0, isolation_epochs=2, batch_size=16)
                model = build(ARCH, 0)
                ABL(config).train_to_isolate(model, noise(48), config.settings(), Context())
                states[loss, per] = fingerprint(model.state_dict())
        assert states["lga", "sample"] == states["flood", "sample"]
        assert states["lga", "batch"] == states["flood", "batch"]
        assert states["lga", "sample"] != states["lga", "batch"]


class TestSettings:
    def test_published_schedules(self):
        paper, official, benchmark = (ABL.Config(variant=name).settings() for name in abl.VARIANTS)
        assert (paper.isolation_epochs, paper.finetuning_epochs, paper.unlearning_epochs) == (20, 60, 20)
        assert (paper.loss, paper.unlearning, paper.unlearning_lr, paper.lr) == ("lga", "joint", 1e-4, 0.1)
        assert (official.isolation_epochs, official.unlearning_epochs, official.unlearning_lr) == (10, 4, 5e-4)
        assert (official.loss, official.per, official.unlearning, official.shuffle) == (
            "flood",
            "batch",
            "ascent",
            False,
        )
        assert (benchmark.loss, benchmark.per, benchmark.lr, benchmark.batch_size) == ("flood", "batch", 0.01, 256)
        assert (benchmark.isolation_epochs, benchmark.finetuning_epochs, benchmark.unlearning_epochs) == (20, 60, 20)

    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({}, 8),
            ({"variant": "official"}, 8),
            ({"variant": "backdoorbench"}, 2),
            ({"batch_size": 128}, 4),
            ({"batch_size": 500}, 1),
            ({"batch_size": 2000}, 1),
            ({"batch_size": 128, "min_steps": 3}, 3),
        ],
    )
    def test_a_pass_of_unlearning_is_as_long_as_one_over_500(self, options: dict[str, Any], steps: int):
        assert ABL.Config(**options).settings().min_steps == steps

    @pytest.mark.parametrize(("epochs", "falls"), [(60, 40), (15, 10), (2, 2), (1, 1)])
    def test_the_rate_falls_for_the_last_third(self, epochs: int, falls: int):
        config = ABL.Config(finetuning_epochs=epochs)
        recipe = ABL(config).recipe(noise(10), config.settings())
        rates = [recipe.learning_rate(epoch, 1, epochs) for epoch in range(epochs)]
        assert rates == pytest.approx([0.1] * falls + [0.01] * (epochs - falls))

    def test_augmentation_scales_with_the_image(self):
        config = ABL.Config()
        for side, crop, cutout in [(32, 4, 3), (16, 2, 2), (8, 1, 1), (4, 1, 1), (224, 28, 21)]:
            data = Labelled(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
            recipe = ABL(config).recipe(data, config.settings())
            assert (recipe.crop, recipe.flip, recipe.cutout) == (crop, True, cutout)

    def test_what_is_given_wins_over_the_variant(self):
        given: dict[str, Any] = {
            "loss": "lga", "per": "sample", "isolation_epochs": 3, "finetuning_epochs": 4, "unlearning": "joint",
            "unlearning_epochs": 5, "unlearning_lr": 0.5, "min_steps": 6, "lr": 0.7, "batch_size": 8,
        }  # fmt: skip
        official = ABL.Config(variant="official").settings()
        assert ABL.Config(variant="official", **given).settings() == replace(official, **given)

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ("abl.variant=released", "'paper', 'official' or 'backdoorbench'"),
            ("abl.isolation_rate=0", "isolation_rate"),
            ("abl.isolation_rate=0.6", "isolation_rate"),
            ("abl.unlearning_lr=0", "unlearning_lr"),
            ("abl.finetuning_epochs=0", "finetuning_epochs"),
            ("abl.batch_size=1", "batch_size"),
            ("abl.label_smoothing=0.1", "unknown option of abl 'label_smoothing'"),
            ("train.label_smoothing=0.1", "unknown option of train 'label_smoothing'"),
        ],
    )
    def test_wrong_options_are_refused_before_anything_runs(self, setting: str, said: str):
        with pytest.raises(UsageError, match=said):
            resolve(Host(), plugins=["abl"], settings=[setting])

    @pytest.mark.parametrize("mode", ["lga", "flood", "ascent"])
    def test_smoothed_labels_never_meet_the_ascent(self, mode: Any):
        """No option leads here; whoever trains with the operator itself is told why not."""
        with pytest.raises(ValueError, match=r"label_smoothing must be 0 .* the ascent never begins"):
            isolation_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 0.5, mode, label_smoothing=0.1)

    @pytest.mark.parametrize(("count", "rate"), [(99, 0.01), (150, 0.01), (10, 0.1)])
    def test_too_few_to_isolate_is_said_before_training(self, count: int, rate: float):
        context = Context()
        with pytest.raises(DefenseError, match=rf"isolation_rate={rate:g} of {count} training samples isolates [01];"):
            run(noise(count), context, isolation_rate=rate)
        assert not context.phases

    def test_the_rate_that_is_advised_is_accepted(self, monkeypatch: pytest.MonkeyPatch):
        class Accepted(Exception):
            pass

        def build(*given: Any) -> nn.Module:
            raise Accepted

        monkeypatch.setattr(abl, "build", build)
        for samples in [*range(1, 301), 333, 700, 999, 1200, 1999, 2500]:
            data = noise(1).select(torch.zeros(samples, dtype=torch.int64))
            with pytest.raises(DefenseError) as refused:
                run(data, isolation_rate=1e-4)
            if samples < 4:  # half of three are fewer than two, and no rate is above a half
                assert str(refused.value).endswith("use four training samples or more.")
                continue
            advised = re.fullmatch(r".* set it to (\S+) or more\.", str(refused.value))
            assert advised is not None
            assert float(advised[1]) <= 1.1 * 2 / samples, "no more than it takes"
            with pytest.raises(Accepted):
                run(data, isolation_rate=float(advised[1]))


class TestWhole:
    @pytest.mark.parametrize(
        ("variant", "options", "lowest"),
        [
            ("paper", {"unlearning_lr": 1e-3, "unlearning_epochs": 100, "stop_loss": 4.0}, 0.5),
            ("official", {}, 0.35),
        ],
    )
    def test_isolates_poisons_and_unlearns_the_backdoor(self, variant: str, options: dict[str, float], lowest: float):
        """On digits that noise makes hard to read, as CIFAR-10 is: otherwise they are learnt as fast as the poisons."""
        data, warned, before = noisy(digits(1000)), list[str](), list[Scores]()
        poisoned = backdoored(data)

        class Judged(ABL):
            def unlearn(self, model: nn.Module, *rest: Any) -> None:
                before.append(evaluate(model, data.test, poisoned.triggered, poisoned.target, Context()))
                super().unlearn(model, *rest)

        schedule: dict[str, Any] = {"isolation_epochs": 4, "finetuning_epochs": 6, "isolation_rate": 0.03}
        defense = Judged(Judged.Config(variant=variant, flip=False, **schedule, **options))
        given = DefenseInput(10, suspect=poisoned.train, arch=architecture("wrn10_1", poisoned.train, 10))
        outcome = defense(given, Context(seed=1, warn=warned.append))
        assert outcome.suspects is not None
        assert outcome.model is not None
        found = isolation(outcome.suspects, poisoned.poisoned)
        assert found.isolated == 30
        assert found.precision is not None
        assert found.precision >= 0.85
        assert found.auroc is not None
        assert found.auroc > 0.9
        after = evaluate(outcome.model, data.test, poisoned.triggered, poisoned.target, Context())
        assert before[0].asr is not None
        assert after.asr is not None
        assert before[0].asr > 0.9
        assert after.asr < 0.2
        assert after.clean_accuracy > lowest
        assert not outcome.model.training
        assert warned == []
        assert (outcome.notes["variant"], outcome.notes["isolation_epochs"], outcome.notes["isolated"]) == (
            variant,
            4,
            30,
        )

    def test_a_collapse_is_said(self):
        warned: list[str] = []
        few = backdoored(digits(200)).train
        outcome = run(
            few, Context(seed=1, warn=warned.append), variant="official", isolation_epochs=4, finetuning_epochs=10,
            unlearning_lr=0.05, unlearning_epochs=4, isolation_rate=0.05, flip=False,
        )  # fmt: skip
        before, after = (float(outcome.notes[f"accuracy_{name}"]) for name in ("finetuned", "unlearned"))
        assert after < 0.8 * before
        (said,) = warned
        assert f"from {before:.1%} to {after:.1%}" in said
        assert "a low ASR of this model is no success" in said

    def test_tiny_sets_of_one_channel_without_poisons(self):
        data = digits(60).train
        tiny = Labelled(data.images[:, :, ::2, ::2].contiguous(), data.labels)
        outcome = run(tiny, isolation_rate=0.05, **SHORT)
        assert outcome.suspects is not None
        assert outcome.suspects.scores is not None
        assert (len(outcome.suspects.index), len(outcome.suspects.scores)) == (3, 60)
        assert outcome.model is not None

    @pytest.mark.parametrize("variant", ["paper", "official", "backdoorbench"])
    def test_the_same_twice_and_another_with_another_seed(self, variant: str):
        data = noise(64)
        first, second, other = (
            run(data, Context(seed=seed), variant=variant, isolation_rate=0.1, **SHORT) for seed in (1, 1, 2)
        )
        prints = [fingerprint(one.model.state_dict()) for one in (first, second, other) if one.model is not None]
        assert prints[0] == prints[1] != prints[2]
        assert first.suspects is not None
        assert second.suspects is not None
        assert torch.equal(first.suspects.index, second.suspects.index)

    def test_the_stage_hands_it_the_suspect_set_and_the_form_and_finds_both_unchanged(self):
        assert ABL.needs == {"suspect", "arch"}
        data = noise(64)
        arch = architecture("wrn10_1", data, 10)
        victim = Victim(build(arch, 9).eval(), arch)
        handed: list[DefenseInput] = []

        class Watched(ABL):
            def __call__(self, given: DefenseInput, context: Context) -> Outcome:
                handed.append(given)
                return super().__call__(given, context)

        defense = Watched(ABL.Config(isolation_rate=0.1, **SHORT))
        assert defense.oracles() == ()
        outcome = defend(defense, victim, noise(10, 5), data, Context())
        (given,) = handed
        assert given.model is None
        assert given.clean is None
        assert outcome.model is not None
        ours, theirs = outcome.model.state_dict(), victim.model.state_dict()
        assert ours.keys() == theirs.keys()


class Killed(Exception):
    """The run ended here."""


@pytest.mark.parametrize("phase", ["isolate", "finetune", "unlearn"])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    variant: str, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_CHECKPOINTS", 0)
    options: dict[str, Any] = {"variant": variant, "isolation_rate": 0.1, "unlearning_lr": 0.01, **SHORT}
    data = noise(64)
    straight = run(data, Context(seed=1), **options)

    def kill(progress: Progress) -> None:
        if (progress.phase, progress.epoch) == (phase, 1):
            raise Killed

    with pytest.raises(Killed):
        run(data, Context(seed=1, folder=tmp_path, report=kill), **options)
    told: list[tuple[str, int]] = []
    context = Context(seed=1, folder=tmp_path, report=lambda one: told.append((one.phase, one.epoch)))
    resumed = run(data, context, **options)
    assert told[0] == (phase, 2), "it went on from the checkpoint"
    assert straight.model is not None
    assert resumed.model is not None
    assert fingerprint(resumed.model.state_dict()) == fingerprint(straight.model.state_dict())
    assert straight.suspects is not None
    assert resumed.suspects is not None
    assert torch.equal(resumed.suspects.index, straight.suspects.index)
    assert resumed.notes == straight.notes
