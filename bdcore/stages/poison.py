"""Poison a data set: choose training samples, stamp and relabel them, and make the triggered test set."""

from dataclasses import replace
from decimal import ROUND_DOWN, Decimal
from decimal import Context as Decimals
from typing import Literal

import torch
from torch import Tensor, nn

from bdcore.artifacts import Dataset, Labelled, Poisoned, Triggered
from bdcore.context import Context
from bdcore.contract import Attack, AttackConfig, AttackInput, CleanLabelConfig
from bdcore.errors import PluginError, UsageError

_ROUNDED_DOWN = Decimals(prec=3, rounding=ROUND_DOWN)


def check(dataset: Dataset, attack: Attack) -> None:
    """Raise where the attack, as its options are, cannot poison `dataset`: nothing is trained to find out.

    Raises:
        UsageError: where the rate asks for more samples than are eligible, or for none though it is above 0; where the
            target is no class of the data set; where no test sample is left to put the trigger into.
        PluginError: where the attack returns tensors of another form than its contract says.
    """
    _single_target(dataset, attack)
    _candidates(dataset, attack)
    if not bool(_asked("counted", attack, dataset.test.labels, dataset.classes).any()):
        raise UsageError(
            f"no test sample of {dataset.name} can carry the trigger of {attack.name}: all are of its target class"
        )


def prepare(dataset: Dataset, attack: Attack, given: AttackInput, context: Context) -> nn.Module | None:
    """Let the attack train what it needs, once `check` has let it pass.

    Returns:
        The victim where the attack controls its training, else None.

    Raises:
        UsageError, PluginError: as `check`; and where a victim is missing, or one is returned that is not asked for.
    """
    check(dataset, attack)
    order, _ = _drawn(dataset, attack, context)
    victim = attack.prepare(replace(given, order=order), context)
    if isinstance(victim, nn.Module) != attack.controls_training:
        raise PluginError(
            f"{attack.name}.prepare must return {'the trained victim' if attack.controls_training else 'None'}, because"
            f" controls_training is {attack.controls_training}; it returned {type(victim).__name__}"
        )
    return victim.eval() if victim is not None else None


def poison(dataset: Dataset, attack: Attack | None, context: Context) -> Poisoned:
    """Poison exactly as many training samples as the attack counts; all others stay as they are, to the bit.

    The samples are drawn from those that the attack calls eligible, by the context's seed alone.

    Args:
        dataset: images and labels; not altered.
        attack: prepared; None leaves the data set clean.
        context: whose seed decides which samples are taken.

    Returns:
        The training set as its victim sees it, and the attacker's secrets.

    Raises:
        UsageError, PluginError: as `check`.
    """
    untouched = torch.zeros(len(dataset.train), dtype=torch.bool, device=dataset.train.labels.device)
    if attack is None:
        return Poisoned(dataset.train, untouched, None, None)
    check(dataset, attack)
    return Poisoned(
        *_poison_train(dataset, attack, context, untouched),
        triggered=_trigger_test(dataset, attack, context),
        target=_single_target(dataset, attack),
    )


def poison_all(dataset: Dataset, attack: Attack, context: Context) -> tuple[Labelled, Tensor]:
    """Every training sample as the attack poisons it, and the chance of each to be poisoned in a batch, float [N].

    Samples that it cannot poison are as they are, and their chance is 0; that of the others is such that on average a
    batch has the share of poisons that the attack asks for in the data set.
    """
    train = dataset.train
    changed, count = _candidates(dataset, attack)
    images, labels = train.images.clone(), train.labels.clone()
    images[changed] = _poison_images(attack, train.select(changed), context)
    labels[changed] = _relabel(attack, train.labels[changed], dataset.classes, dataset.name)
    chances = torch.zeros(len(train), device=labels.device)
    chances[changed] = count / max(len(changed), 1)
    return Labelled(images, labels), chances


def _single_target(dataset: Dataset, attack: Attack) -> int | None:
    """The class that every other class is sent to, or None where they go to several."""
    wanted = _relabel(attack, torch.arange(dataset.classes), dataset.classes, dataset.name)
    return int(wanted[0]) if bool((wanted == wanted[0]).all()) else None


def _candidates(dataset: Dataset, attack: Attack) -> tuple[Tensor, int]:
    """Places of the training samples that may be poisoned, int64, and how many of them shall be."""
    train = dataset.train
    if not isinstance(attack.config, AttackConfig):
        raise PluginError(f"{attack.name}: an attack's Config must subclass bdcore.AttackConfig")
    count = attack.count(train.labels, dataset.classes)
    candidates = _asked("eligible", attack, train.labels, dataset.classes).nonzero().squeeze(1)
    rate, option, samples = attack.config.poison_rate, "attack.poison_rate", len(train)
    if isinstance(attack.config, CleanLabelConfig) and attack.config.class_rate is not None:  # it takes its place
        rate, option, samples = attack.config.class_rate, "attack.class_rate", len(candidates)
    if count > len(candidates):
        # The rate is rounded down, since it may be refused again where it is rounded up.
        most = _ROUNDED_DOWN.plus(Decimal(str(rate)) * len(candidates) / count)
        raise UsageError(
            f"{option}={rate:g} asks for {count} of {len(train)} training samples of {dataset.name}, but"
            f" {attack.name} can poison only {len(candidates)}: lower it to {float(most):g} or less"
        )
    if count == 0 and rate > 0:
        raise UsageError(
            f"{option}={rate:g} of {samples} training samples of {dataset.name} is not even one: raise it to poison,"
            " or run with --no-attack"
        )
    return candidates, count


def _asked(method: Literal["eligible", "counted"], attack: Attack, labels: Tensor, classes: int) -> Tensor:
    """Which samples an attack names, bool [N]."""
    named = getattr(attack, method)(labels, classes)
    if named.dtype != torch.bool or named.shape != labels.shape:
        raise PluginError(
            f"{attack.name}.{method} must return bool [{len(labels)}], got {named.dtype} {list(named.shape)}"
        )
    return named


def _drawn(dataset: Dataset, attack: Attack, context: Context) -> tuple[Tensor, int]:
    """Places of the samples that may be poisoned, in random order, and how many of them, the first ones, are."""
    candidates, count = _candidates(dataset, attack)
    order = torch.randperm(len(candidates), generator=context.generator("poison"))
    return candidates[order.to(candidates.device)], count


def _poison_train(dataset: Dataset, attack: Attack, context: Context, untouched: Tensor) -> tuple[Labelled, Tensor]:
    train = dataset.train
    order, count = _drawn(dataset, attack, context)
    chosen = order[:count].sort().values
    images, labels, poisoned = train.images.clone(), train.labels.clone(), untouched.clone()
    if count:
        images[chosen] = _poison_images(attack, train.select(chosen), context)
        labels[chosen] = _relabel(attack, train.labels[chosen], dataset.classes, dataset.name)
        poisoned[chosen] = True
        same = int((images[chosen] == train.images[chosen]).flatten(1).all(1).sum())
        if same:
            context.warn(
                f"{same} of {count} poisons do not differ from their originals: the trigger of {attack.name} cannot be"
                " seen on them. Choose another trigger, or another place for it."
            )
    return Labelled(images, labels), poisoned


def _poison_images(attack: Attack, samples: Labelled, context: Context) -> Tensor:
    images = attack.poison(samples.images, samples.labels, context)
    if images.dtype != torch.uint8 or images.shape != samples.images.shape:
        method = "stamp" if type(attack).poison is Attack.poison else "poison"
        raise PluginError(
            f"{attack.name}.{method} must return uint8 {list(samples.images.shape)}, got {images.dtype}"
            f" {list(images.shape)}"
        )
    return images


def _trigger_test(dataset: Dataset, attack: Attack, context: Context) -> Triggered:
    test = dataset.test
    made = attack.triggered(test, dataset.classes, context)
    shape = [len(made.labels), *test.images.shape[1:]]
    if made.images.dtype != torch.uint8 or list(made.images.shape) != shape or len(made.targets) != len(made.labels):
        raise PluginError(
            f"{attack.name} must make triggered test images uint8 {shape}, with a label and a target each, got"
            f" {made.images.dtype} {list(made.images.shape)} with {len(made.targets)} targets"
        )
    return made


def _relabel(attack: Attack, labels: Tensor, classes: int, dataset: str) -> Tensor:
    wanted = attack.relabel(labels, classes)
    if wanted.dtype != torch.int64 or wanted.shape != labels.shape:
        raise PluginError(
            f"{attack.name}.relabel must return int64 {list(labels.shape)}, got {wanted.dtype} {list(wanted.shape)}"
        )
    outside = (wanted < 0) | (wanted >= classes)
    if bool(outside.any()):
        raise UsageError(
            f"attack {attack.name} wants class {int(wanted[outside][0])}, but {dataset} has the classes 0 to"
            f" {classes - 1}: set attack.target to one of them"
        )
    return wanted
