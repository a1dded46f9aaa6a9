"""Poison a data set: choose training samples, stamp and relabel them, and make the triggered test set."""

import torch
from torch import Tensor

from bdcore.artifacts import Dataset, Labelled, Poisoned, Triggered
from bdcore.context import Context
from bdcore.contract import Attack, AttackConfig
from bdcore.errors import PluginError, UsageError


def poison(dataset: Dataset, attack: Attack | None, context: Context) -> Poisoned:
    """Poison exactly `round(poison_rate * N)` of the N training samples; all others stay as they are, to the bit.

    The samples are drawn from those that the attack calls eligible, by the context's seed alone. The triggered test
    set is the test samples whose label the attack changes.

    Args:
        dataset: images and labels; not altered.
        attack: None leaves the data set clean.
        context: whose seed decides which samples are taken.

    Returns:
        The training set as its victim sees it, and the attacker's secrets.

    Raises:
        UsageError: where the rate asks for more samples than are eligible, or for none though it is above 0; where
            the target is no class of the data set; where no test sample is left to put the trigger into.
        PluginError: where the attack returns tensors of another form than its contract says.
    """
    untouched = torch.zeros(len(dataset.train), dtype=torch.bool, device=dataset.train.labels.device)
    if attack is None:
        return Poisoned(dataset.train, untouched, None, None)
    return Poisoned(
        *_poison_train(dataset, attack, context, untouched),
        triggered=_trigger_test(dataset, attack, context),
        target=_single_target(dataset, attack),
    )


def _single_target(dataset: Dataset, attack: Attack) -> int | None:
    """The class that every other class is sent to, or None where they go to several."""
    wanted = _relabel(attack, torch.arange(dataset.classes), dataset)
    return int(wanted[0]) if bool((wanted == wanted[0]).all()) else None


def _poison_train(dataset: Dataset, attack: Attack, context: Context, untouched: Tensor) -> tuple[Labelled, Tensor]:
    train = dataset.train
    if not isinstance(attack.config, AttackConfig):
        raise PluginError(f"{attack.name}: an attack's Config must subclass bdcore.AttackConfig")
    rate = attack.config.poison_rate
    count = round(rate * len(train))
    eligible = attack.eligible(train.labels, dataset.classes)
    if eligible.dtype != torch.bool or eligible.shape != train.labels.shape:
        raise PluginError(
            f"{attack.name}.eligible must return bool [{len(train)}], got {eligible.dtype} {list(eligible.shape)}"
        )
    candidates = eligible.nonzero().squeeze(1)
    if count > len(candidates):
        raise UsageError(
            f"attack.poison_rate={rate:g} asks for {count} of {len(train)} training samples of {dataset.name}, but"
            f" {attack.name} can poison only {len(candidates)}: lower it to {len(candidates) / len(train):.3g} or less"
        )
    if count == 0 and rate > 0:
        raise UsageError(
            f"attack.poison_rate={rate:g} of {len(train)} training samples of {dataset.name} is not even one: raise it"
            " to poison, or run with --no-attack"
        )
    order = torch.randperm(len(candidates), generator=context.generator("poison"))[:count]
    chosen = candidates[order.to(candidates.device)].sort().values
    images, labels, poisoned = train.images.clone(), train.labels.clone(), untouched.clone()
    if count:
        images[chosen] = _stamp(attack, train.images[chosen], context)
        labels[chosen] = _relabel(attack, train.labels[chosen], dataset)
        poisoned[chosen] = True
    return Labelled(images, labels), poisoned


def _trigger_test(dataset: Dataset, attack: Attack, context: Context) -> Triggered:
    test = dataset.test
    targets = _relabel(attack, test.labels, dataset)
    counted = targets != test.labels
    if not bool(counted.any()):
        raise UsageError(
            f"no test sample of {dataset.name} can carry the trigger of {attack.name}: all are of its target class"
        )
    return Triggered(_stamp(attack, test.images[counted], context), test.labels[counted], targets[counted])


def _stamp(attack: Attack, images: Tensor, context: Context) -> Tensor:
    stamped = attack.stamp(images, context)
    if stamped.dtype != torch.uint8 or stamped.shape != images.shape:
        raise PluginError(
            f"{attack.name}.stamp must return uint8 {list(images.shape)}, got {stamped.dtype} {list(stamped.shape)}"
        )
    return stamped


def _relabel(attack: Attack, labels: Tensor, dataset: Dataset) -> Tensor:
    wanted = attack.relabel(labels, dataset.classes)
    if wanted.dtype != torch.int64 or wanted.shape != labels.shape:
        raise PluginError(
            f"{attack.name}.relabel must return int64 {list(labels.shape)}, got {wanted.dtype} {list(wanted.shape)}"
        )
    outside = (wanted < 0) | (wanted >= dataset.classes)
    if bool(outside.any()):
        raise UsageError(
            f"attack {attack.name} wants class {int(wanted[outside][0])}, but {dataset.name} has the classes 0 to"
            f" {dataset.classes - 1}: set attack.target to one of them"
        )
    return wanted
