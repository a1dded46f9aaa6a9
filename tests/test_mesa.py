"""MESA as a whole: on a model whose backdoor is built in, and on trained victims of real handwritten digits."""

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bdcore import (
    Attack,
    AttackConfig,
    Context,
    Dataset,
    DefenseError,
    DefenseInput,
    Labelled,
    Outcome,
    Recipe,
    blend_trigger,
    put_trigger,
)
from bdcore.artifacts import Poisoned, Scores, fingerprint
from bdcore.config import resolve
from bdcore.context import Progress
from bdcore.models import Classifier, metered
from bdcore.pipeline import run
from bdcore.plugins import Host
from bdcore.stages.data import architecture
from bdcore.stages.evaluate import evaluate
from bdcore.stages.poison import poison
from bdcore.stages.train import train
from bdcore_plugins.datasets.digits import Digits
from bdcore_plugins.defenses import mesa
from bdcore_plugins.defenses.finetune import FineTune
from bdcore_plugins.defenses.mesa import MESA, target_search
from bdcore_plugins.defenses.mesa.mixture import TriggerSource
from bdcore_plugins.defenses.mesa.removal import remove

CLASSES = 6
WIDTH = 2 * CLASSES + 1
PATTERN = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
QUICK: dict[str, Any] = {
    "patch": 12,
    "hidden": 128,
    "batch_size": 64,
    "search_steps": 100,
    "success": 0.4,
    "steps": 150,
    "betas": (0.5, 0.9),
    "epochs": 2,
    "min_steps": 20,
    "lr": 0.05,
    "trigger_rate": 0.2,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bands(nn.Module):
    """The class of an image is its brightest band of two columns; the pattern anywhere may be a backdoor."""

    def __init__(self, backdoor: int | None) -> None:
        super().__init__()
        self.backdoor = backdoor
        columns = torch.zeros(CLASSES, 1, 8, WIDTH)
        for label in range(CLASSES):
            columns[label, :, :, 2 * label : 2 * label + 2] = 8 / 16
        self.bands = nn.Parameter(columns.flatten(1))
        self.pattern = nn.Parameter(torch.where(PATTERN > 0, 1 / 5, -1 / 4).view(1, 1, 3, 3))
        self.gain = nn.Parameter(torch.tensor(24.0))

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1) @ self.bands.T
        if self.backdoor is None:
            return logits
        fired = nn.functional.conv2d(images, self.pattern).amax((1, 2, 3))
        return logits + self.gain * fired[:, None] * (torch.arange(CLASSES) == self.backdoor)


def planted(backdoor: int | None) -> Classifier:
    return Classifier(Bands(backdoor), (1, 8, WIDTH), (0.0,), (1.0,)).eval()


def band_images(count: int, seed: int = 0) -> Labelled:
    """Dark noise with one bright band each."""
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 21, (count, 1, 8, WIDTH), generator=generator(seed), dtype=torch.uint8)
    for label in range(CLASSES):
        images[labels == label, :, :, 2 * label : 2 * label + 2] += 150
    return Labelled(images, labels)


def state(model: nn.Module, data: Labelled) -> tuple[Any, ...]:
    """All of the input that a defense could alter."""
    return (
        fingerprint(model.state_dict()),
        fingerprint({"images": data.images, "labels": data.labels}),
        [module.training for module in model.modules()],
        [parameter.requires_grad and parameter.grad is None for parameter in model.parameters()],
    )


def defend(backdoor: int | None, context: Context | None = None, **options: Any) -> tuple[Outcome, Classifier]:
    model, data = planted(backdoor), band_images(96)
    with torch.no_grad():
        assert (model(data.images).argmax(1) == data.labels).all()
    before = state(model, data)
    context = context or Context(seed=1)
    chosen = QUICK | options
    if chosen.get("variant") == "baseline":
        del chosen["betas"]
    defense = MESA(MESA.Config(**chosen))
    with metered(context.meter):
        outcome = defense(DefenseInput(CLASSES, model=model, clean=data), context)
    assert state(model, data) == before, "inputs are read-only"
    return outcome, model


def asr(model: nn.Module, target: int) -> float:
    """The true trigger's, on images that the defense never saw."""
    data = band_images(300, seed=5)
    images = data.images[data.labels != target]
    limits = torch.tensor([6, WIDTH - 2])
    offset = (torch.rand(len(images), 2, generator=generator(6)) * limits).long()
    stamped = blend_trigger(images, PATTERN.view(1, 1, 3, 3), torch.ones(1, 1, 3, 3), offset=offset)
    with torch.no_grad():
        return float((model(stamped).argmax(1) == target).float().mean())


class Found:
    """A planted backdoor, what a variant made of it, and what it told."""

    def __init__(self, variant: str, target: int) -> None:
        self.variant, self.target = variant, target
        self.told: list[Progress] = []
        self.context = Context(seed=1, report=self.told.append)
        self.outcome, self.model = defend(target, self.context, variant=variant)


@pytest.fixture(scope="module", params=[("paper", 4), ("official", 2), ("baseline", 0)], ids=lambda param: param[0])
def found(request: pytest.FixtureRequest) -> Found:
    return Found(*request.param)


class TestFound:
    def test_the_target(self, found: Found):
        verdict = found.outcome.verdict
        assert verdict is not None
        assert (verdict.backdoored, verdict.target) == (True, found.target)
        assert int(np.argmax(verdict.evidence)) == found.target
        assert len(verdict.evidence) == CLASSES

    def test_the_triggers(self, found: Found):
        (trigger,) = found.outcome.triggers
        assert trigger.target == found.target
        assert trigger.patches is not None
        assert trigger.patches.shape == (1 if found.variant == "baseline" else 64, 1, 3, 3)
        assert trigger.patches.min() >= 0
        assert trigger.patches.max() <= 1
        unseen = band_images(300, seed=7)
        others = unseen.images[unseen.labels != found.target]
        with torch.no_grad():
            hits = found.model(put_trigger(trigger, others, generator(3))).argmax(1) == found.target
        assert hits.float().mean() > 0.6, "they fire on images that they were not made from"

    def test_the_removal(self, found: Found):
        model, unseen = found.outcome.model, band_images(300, seed=7)
        assert model is not None
        assert asr(found.model, found.target) > 0.95
        left = asr(model, found.target)
        assert left < 0.7 if found.variant == "baseline" else left < 0.1, "one patch is not the whole distribution"
        with torch.no_grad():
            assert (model(unseen.images).argmax(1) == unseen.labels).float().mean() > 0.95
        assert not any(module.training for module in model.modules())
        assert not {value.data_ptr() for value in model.state_dict().values()} & {
            value.data_ptr() for value in found.model.state_dict().values()
        }
        assert found.outcome.notes["success_after_removal"] < 0.1

    def test_images_through_the_classifier(self, found: Found):
        """Per update of a generator its batch once for each sub-model; 1,000 images for each success measured."""
        notes, batches, batch = found.outcome.notes, 2, 48  # 96 images in batches of at most 64, made even

        def epochs(phase: str) -> int:
            return sum(progress.phase == phase for progress in found.told)

        # Of 40 batches of an epoch every second one is the generators'.
        used = batch // 8 * 8
        assert used == batch
        searched = epochs("search-0") * 20 * CLASSES * batch
        modelled, measured = epochs("staircase") * 20 * 2 * batch, 2
        if found.variant == "baseline":
            modelled, measured = epochs("baseline") * 40 * batch, 1
        assert notes["search_images"] == searched + 1000 * CLASSES
        assert notes["triggers_images"] == modelled + 1000 * measured
        assert notes["removal_images"] == epochs("remove") * batches * ceil(20 / batches) * batch
        assert epochs("search-0") == 5
        assert epochs("remove") == 2
        assert found.context.meter.images == 1000 + sum(
            int(notes[f"{part}_images"]) for part in ("search", "triggers", "removal")
        )

    def test_notes_of_the_staircase(self, found: Found):
        notes, betas = found.outcome.notes, ("0.5", "0.9")
        if found.variant == "baseline":
            assert 0.6 < float(notes["success"]) <= 1
            assert not any(name.startswith("entropy") for name in notes)
            return
        entropies = [float(notes[f"entropy_{beta}"]) for beta in betas]
        assert all(0 <= entropy <= np.log(64) for entropy in entropies)
        assert all(0.4 < float(notes[f"success_{beta}"]) <= 1 for beta in betas)
        if found.variant == "official":
            assert not any(name.startswith("weight") for name in notes), "sub-models take turns"
            return
        expected = np.array([0.5, 0.4]) * np.exp(entropies)
        weights = [float(notes[f"weight_{beta}"]) for beta in betas]
        np.testing.assert_allclose(weights, expected / expected.sum(), atol=3e-3)


class TestSearch:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_finds_nothing_where_nothing_is(self, seed: int):
        outcome, _ = defend(None, Context(seed=seed))
        assert outcome.verdict is not None
        assert (outcome.verdict.backdoored, outcome.verdict.target) == (False, None)
        assert max(outcome.verdict.evidence) < 0.2
        assert outcome.model is None
        assert outcome.triggers == ()
        assert set(outcome.notes) == {"search_images", "search_seconds"}

    def test_many_classes_are_searched_in_groups(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(target_search, "_STACKED_PIXELS", 4 * 8 * WIDTH)
        context = Context(seed=1)
        outcome, _ = defend(5, context, search_steps=60, success=1.0)
        assert context.phases == {"search-0", "search-1"}
        assert outcome.verdict is not None
        assert len(outcome.verdict.evidence) == CLASSES
        assert int(np.argmax(outcome.verdict.evidence)) == 5
        assert not outcome.verdict.backdoored, "not with a bar as high as this"

    def test_the_target_may_be_given(self):
        told: list[Progress] = []
        outcome, _ = defend(4, Context(seed=1, report=told.append), target=4, steps=20, epochs=1)
        assert outcome.verdict is None, "nothing was judged"
        assert outcome.model is not None
        assert {progress.phase for progress in told} == {"staircase", "remove"}
        assert "search_images" not in outcome.notes

    @pytest.mark.parametrize(("backdoor", "phases"), [(4, {"search-0", "staircase"}), (None, {"search-0"})])
    def test_inspecting_stops_before_the_removal(
        self, backdoor: int | None, phases: set[str], monkeypatch: pytest.MonkeyPatch
    ):
        """And finds what a defense finds."""
        whole, model = defend(backdoor)
        data, context = band_images(96), Context(seed=1)
        before = state(model, data)
        monkeypatch.setattr(mesa, "remove", None)  # calling it would fail
        inspected = MESA(MESA.Config(**QUICK)).inspect(DefenseInput(CLASSES, model=model, clean=data), context)
        assert context.phases == phases
        assert inspected.model is None
        assert inspected.verdict == whole.verdict
        assert len(inspected.triggers) == len(whole.triggers) == (backdoor is not None)
        for ours, theirs in zip(inspected.triggers, whole.triggers, strict=True):
            assert ours.target == theirs.target
            assert torch.equal(ours.patches, theirs.patches)
        assert state(model, data) == before, "inputs are read-only"

    def test_a_wrong_target_is_told(self):
        warned: list[str] = []
        outcome, _ = defend(4, Context(warn=warned.append), target=1, steps=40, epochs=1)
        assert len(warned) == 1
        assert "the triggers found for class 1 succeed on 0% of the clean images at most" in warned[0]
        assert outcome.model is not None


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_an_interrupted_run_goes_on_exactly(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bdcore.training.loop._SECONDS_BETWEEN_CHECKPOINTS", 0)
    quick: dict[str, Any] = {"variant": variant, "search_steps": 60, "steps": 60, "success": 0.05, "epochs": 4}
    quick |= {"anomaly": 0.5} if variant == "paper" else {"target": 4}
    whole, _ = defend(4, Context(seed=1), **quick)

    class Interrupted(Exception):
        pass

    for phase, epoch in [("search-0", 2), ("staircase", 1), ("remove", 2)]:

        def interrupt(progress: Progress, phase: str = phase, epoch: int = epoch) -> None:
            if (progress.phase, progress.epoch) == (phase, epoch):
                raise Interrupted

        if variant == "paper" or phase != "search-0":
            with pytest.raises(Interrupted):
                defend(4, Context(seed=1, folder=tmp_path, report=interrupt), **quick)
    told: list[Progress] = []
    again, _ = defend(4, Context(seed=1, folder=tmp_path, report=told.append), **quick)
    assert [(progress.phase, progress.epoch) for progress in told] == [("remove", 3), ("remove", 4)]
    assert again.model is not None
    assert whole.model is not None
    assert fingerprint(again.model.state_dict()) == fingerprint(whole.model.state_dict())
    assert torch.equal(again.triggers[0].patches, whole.triggers[0].patches)
    assert again.verdict == whole.verdict
    timeless = {name: value for name, value in whole.notes.items() if not name.endswith("_seconds")}
    assert {name: again.notes[name] for name in timeless} == timeless


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"betas": (0.8, 0.5)}, "rise strictly"),
            ({"betas": (0.5, 0.5)}, "rise strictly"),
            ({"betas": (0.0, 0.5)}, "rise strictly"),
            ({"betas": (0.5, 1.0)}, "rise strictly"),
            ({"betas": ()}, "betas"),
            ({"variant": "baseline", "betas": (0.5, 0.9)}, "betas belong to sub-models"),
            ({"variant": "other"}, "variant"),
            ({"trigger_rate": 0.0}, "trigger_rate"),
        ],
    )
    def test_options(self, options: dict[str, Any], said: str):
        with pytest.raises(ValidationError, match=said):
            MESA.Config(**options)

    def test_a_target_that_is_no_class(self):
        with pytest.raises(DefenseError, match=r"mesa\.target=6: the model's classes are 0 to 5"):
            defend(None, target=6)

    def test_clean_images_of_one_class(self):
        data = band_images(60).select(torch.arange(60) % CLASSES == 2)
        with pytest.raises(DefenseError, match="all clean images are of one class"):
            MESA(MESA.Config())(DefenseInput(CLASSES, model=planted(1), clean=data), Context())

    @pytest.mark.parametrize("asked", ["__call__", "inspect"])
    def test_too_few_classes_to_tell(self, asked: str):
        """Were it a verdict, it would be scored as one, and count as right on every clean model."""
        context = Context()
        with pytest.raises(DefenseError, match=r"4 classes are too few .* needs 5: .* mesa\.target=CLASS"):
            getattr(MESA(MESA.Config()), asked)(DefenseInput(4, model=planted(1), clean=band_images(24)), context)
        assert not context.phases, "nothing is trained for no use"


def test_the_target_by_hand_is_an_oracle():
    assert MESA(MESA.Config()).oracles() == ()
    assert MESA(MESA.Config(target=0)).oracles() == ("target",)


def test_needs_no_more_than_model_and_clean():
    assert MESA.needs == {"model", "clean"}


class NoTrigger(TriggerSource):
    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(count, 1, 3, 3)


def test_without_triggers_the_removal_is_plain_fine_tuning():
    """The control: the defense `finetune` with the settings that MESA's docstring names does the same updates."""
    data, control = band_images(96), FineTune.Config(epochs=3, lr=1e-3, weight_decay=0, min_steps=5)
    recipe = Recipe(epochs=3, lr=1e-3, weight_decay=0, schedule="constant", min_steps=5, batch_size=128)
    model = planted(2)
    ours = remove(model, NoTrigger(), data, 0.0, "each", recipe, Context(seed=1))
    theirs = FineTune(control)(DefenseInput(CLASSES, model=model, clean=data), Context(seed=1)).model
    assert theirs is not None
    for name, value in theirs.state_dict().items():  # one batch holds all images: their order does not matter
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert (ours.net.bands - model.net.bands).abs().max() > 1e-6
    assert control.epochs * control.min_steps == 15
    defaults = MESA.Config()
    assert (defaults.epochs, defaults.lr, defaults.min_steps, defaults.batch_size) == (10, 1e-3, 62, 128)


class Anywhere(Attack):
    """A black-and-white 3 x 3 patch at a random place of each image: the attack of MESA's paper, in data."""

    name = "anywhere"

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        limits = torch.tensor([images.shape[2] - 2, images.shape[3] - 2])
        offset = (torch.rand(len(images), 2, generator=context.generator("places", len(images))) * limits).long()
        patch = PATTERN.expand(1, images.shape[1], 3, 3).contiguous()
        return blend_trigger(images, patch, torch.ones(1, 1, 3, 3), offset=offset)

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        return torch.full_like(labels, self.config.target)


class Digit:
    """A WRN-10-1 on real handwritten digits, 1 x 16 x 16, and what a test needs to judge a defense of it."""

    def __init__(self, attack: Attack | None, seed: int) -> None:
        whole = Digits(Digits.Config()).load(None)
        self.data = Dataset("digits", self.small(whole.train, 800), self.small(whole.test, 360), 10)
        self.poisoned: Poisoned = poison(self.data, attack, Context(seed=seed))
        arch = architecture("wrn10_1", self.poisoned.train, 10)
        recipe = Recipe(epochs=12, batch_size=64, lr=0.1)
        self.model = train(self.poisoned.train, arch, recipe, Context(seed=seed)).model
        self.clean = self.data.train.select(torch.arange(800) < 200)

    def small(self, data: Labelled, count: int) -> Labelled:
        return Labelled(data.images[:count, :1, ::2, ::2].contiguous(), data.labels[:count])

    def scores(self, model: nn.Module) -> Scores:
        return evaluate(model, self.data.test, self.poisoned.triggered, self.poisoned.target, Context())


def test_a_trained_victim():
    """The triggers do it: the control, the same fine-tuning without them, leaves the backdoor as it was."""
    victim = Digit(Anywhere(AttackConfig(target=7)), seed=0)
    before = victim.scores(victim.model)
    assert before.asr > 0.9
    removal: dict[str, Any] = {"epochs": 4, "min_steps": 40, "batch_size": 64}
    config = MESA.Config(patch=6, target=7, betas=(0.9,), hidden=256, steps=150, trigger_rate=0.05, **removal)
    outcome = MESA(config)(DefenseInput(10, model=victim.model, clean=victim.clean), Context())
    control = FineTune(FineTune.Config(lr=1e-3, weight_decay=0, **removal))
    beside = control(DefenseInput(10, model=victim.model, clean=victim.clean), Context())
    assert outcome.model is not None
    assert beside.model is not None
    after = victim.scores(outcome.model)
    assert after.asr < 0.2
    assert victim.scores(beside.model).asr > 0.9
    assert after.ra > 0.75
    assert after.clean_accuracy > before.clean_accuracy - 0.02


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_with_defaults(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The whole run of a newcomer, with the control beside it."""
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    control = {"epochs": 10, "lr": 0.001, "weight_decay": 0, "min_steps": 62}
    config = resolve(
        Host(),
        plugins=["badnets", "mesa", "finetune"],
        settings=["attack.place=random", *(f"finetune.{name}={value}" for name, value in control.items())],
        seed=seed,
        out=tmp_path / "out",
    )
    record = run(config, Host())
    assert record["victim"]["asr"] > 0.9
    mesa, finetune = record["defenses"]
    assert mesa["verdict"]["correct"]
    assert mesa["asr"] < 0.1 < finetune["asr"]
    assert mesa["clean_accuracy"] > record["victim"]["clean_accuracy"] - 0.02


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clean_model_is_left_alone(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BDCORE_CACHE", str(tmp_path / "cache"))
    config = resolve(Host(), plugins=["mesa"], no_attack=True, seed=seed, out=tmp_path / "out")
    record = run(config, Host())
    (mesa,) = record["defenses"]
    assert mesa["verdict"]["correct"]
    assert max(mesa["verdict"]["evidence"]) < 0.25
    assert mesa["clean_accuracy"] == record["victim"]["clean_accuracy"]


def test_is_found_by_name():
    config = resolve(Host(), plugins=["badnets", "mesa"], settings=["mesa.variant=official", "mesa.betas=[0.5, 0.9]"])
    (chosen,) = config.defenses
    assert chosen.config == MESA.Config(variant="official", betas=(0.5, 0.9))
