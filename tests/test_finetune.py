"""Fine-tuning on the clean samples: the update of plain torch, on a copy."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdcore import Architecture, Context, DefenseInput, Labelled, build
from bdcore.artifacts import fingerprint
from bdcore.context import Progress
from bdcore.models import Classifier, metered
from bdcore_plugins.defenses.finetune import FineTune

CLASSES = 4
ARCH = Architecture("wrn10_1", CLASSES, (1, 8, 8), (0.4,), (0.3,))


def victim() -> Classifier:
    return build(ARCH, 0).eval()


def clean(count: int = 24) -> Labelled:
    """Noise whose class shows as one bright quarter."""
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for label in range(CLASSES):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[labels == label, :, row : row + 4, column : column + 4] += 130
    return Labelled(images, labels)


def tuned(data: Labelled, context: Context | None = None, **options: Any) -> Classifier:
    outcome = FineTune(FineTune.Config(**options))(
        DefenseInput(CLASSES, model=victim(), clean=data), context or Context()
    )
    assert (outcome.verdict, outcome.triggers, dict(outcome.notes)) == (None, (), {})
    assert isinstance(outcome.model, Classifier)
    return outcome.model


def by_hand(data: Labelled, steps: int) -> Classifier:
    """Full-batch cross entropy; SGD written out: decay into the gradient, momentum 0.9, constant rate."""
    model = copy.deepcopy(victim()).train()
    velocity: dict[str, Tensor] = {}
    for _ in range(steps):
        logits = model(data.images)
        loss = -logits.log_softmax(1)[torch.arange(len(data)), data.labels].mean()
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, parameter, slope in zip(names, parameters, torch.autograd.grad(loss, parameters), strict=True):
            decayed = slope + 3e-3 * parameter.detach()
            velocity[name] = 0.9 * velocity[name] + decayed if name in velocity else decayed
            with torch.no_grad():
                parameter.sub_(0.02 * velocity[name])
    return model.eval()


def test_updates_are_those_of_plain_sgd():
    data = clean()
    model = tuned(data, lr=0.02, weight_decay=3e-3, epochs=2, min_steps=2)
    expected = by_hand(data, steps=4).state_dict()
    start = victim().state_dict()
    for name, value in model.state_dict().items():  # the statistics of BatchNorm among them
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-5, msg=name)
    assert (model.state_dict()["net.head.weight"] - start["net.head.weight"]).abs().max() > 1e-3
    assert (model.state_dict()["net.bn.running_mean"] - start["net.bn.running_mean"]).abs().max() > 1e-3


def test_learns_the_labels_that_it_is_given():
    data = clean(40)
    moved = Labelled(data.images, (data.labels + 1) % CLASSES)
    for given in (data, moved):
        model = tuned(given, epochs=8)
        with torch.no_grad():
            assert (model(given.images).argmax(1) == given.labels).float().mean() > 0.9


def test_returns_a_copy_in_eval_mode():
    model, data = victim(), clean()
    before = fingerprint(model.state_dict()), data.fingerprint
    outcome = FineTune(FineTune.Config(epochs=1))(DefenseInput(CLASSES, model=model, clean=data), Context())
    assert outcome.model is not model
    assert (fingerprint(model.state_dict()), Labelled(data.images, data.labels).fingerprint) == before
    assert not any(module.training for module in (*model.modules(), *outcome.model.modules()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not {value.data_ptr() for value in model.state_dict().values()} & {
        value.data_ptr() for value in outcome.model.state_dict().values()
    }


@pytest.mark.parametrize(("options", "steps"), [({"epochs": 3}, 3 * 10), ({"epochs": 2, "batch_size": 8}, 2 * 12)])
def test_a_small_clean_set_is_repeated(options: dict[str, int], steps: int):
    """At least ten updates an epoch, in whole passes: of one batch of 24, or of three of 8."""
    told: list[Progress] = []
    context = Context(report=told.append)
    with metered(context.meter):
        tuned(clean(), context, **options)
    assert context.meter.images == steps * options.get("batch_size", 24)
    assert [(progress.phase, progress.epochs) for progress in told] == [("finetune", options["epochs"])] * len(told)
    assert len(told) == options["epochs"]


def test_augmentation_is_off_by_default_and_can_be_asked_for():
    seen: list[Tensor] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) if isinstance(module, Classifier) else None
    )
    data = clean()
    kinds = {image.numpy().tobytes() for image in data.images}
    mirrored = {image.flip(-1).contiguous().numpy().tobytes() for image in data.images}
    try:
        for options, allowed in [({}, kinds), ({"flip": True}, kinds | mirrored)]:
            seen.clear()
            tuned(data, epochs=1, **options)
            drawn = {image.contiguous().numpy().tobytes() for batch in seen for image in batch}
            assert drawn <= allowed
            assert drawn & mirrored if options else drawn == kinds
        seen.clear()
        tuned(data, epochs=1, crop=2)
        drawn = {image.contiguous().numpy().tobytes() for batch in seen for image in batch}
        assert len(drawn) > 2 * len(kinds)
    finally:
        handle.remove()


def test_loss_is_cross_entropy():
    """The figure that is reported for a first, single step is that of the victim in train mode."""
    told: list[Progress] = []
    data = clean()
    tuned(data, Context(report=told.append), epochs=1, min_steps=1)
    with torch.no_grad():
        expected = F.cross_entropy(victim().train()(data.images).double(), data.labels)
    assert told[0].figures["loss"] == pytest.approx(float(expected), rel=1e-4)
