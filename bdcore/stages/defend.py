"""Hand a defense what it declared, and nothing else; check that it comes back unchanged."""

import copy
import json
from dataclasses import asdict

import torch
from torch import nn

from bdcore.artifacts import DefenseInput, Labelled, Outcome, Suspects, Victim, fingerprint
from bdcore.context import Context
from bdcore.contract import Defense
from bdcore.errors import PluginError, ThreatModelError
from bdcore.models import metered


def defend(
    defense: Defense, victim: Victim, clean: Labelled, suspect: Labelled, context: Context, *, inspect: bool = False
) -> Outcome:
    """Run `defense` under the threat model; with `inspect` it is asked for its verdict alone.

    What it is given are copies that share no memory with anything else, so that no view or storage leads to more
    than was handed over. This holds against mistakes and temptation, not against code that sets out to attack the
    process that it runs in.

    Raises:
        ThreatModelError: where it altered its input, or returns the handed model itself.
        PluginError: where what it returns is not an Outcome, or holds a model of another form.
    """
    given = DefenseInput(
        classes=victim.arch.classes,
        model=_copy(victim.model, context) if "model" in defense.needs else None,
        clean=_own(clean, context) if "clean" in defense.needs else None,
        suspect=_own(suspect, context) if "suspect" in defense.needs else None,
        arch=victim.arch if "arch" in defense.needs else None,
    )
    before = _prints(given)
    with metered(context.meter):
        outcome = defense.inspect(given, context) if inspect else defense(given, context)
    after = _prints(given)
    for part, was in before.items():
        if after.get(part) != was:
            raise ThreatModelError(
                f"defense {defense.name!r} altered its input `{part}` in place. Inputs are read-only: work on a copy "
                "(copy.deepcopy for models, .clone() for tensors)."
            )
    _check(outcome, defense, given, victim)
    return outcome


def _own(data: Labelled, context: Context) -> Labelled:
    return Labelled(data.images.clone(), data.labels.clone()).to(context.device)


def _copy(model: nn.Module, context: Context) -> nn.Module:
    return copy.deepcopy(model).to(context.device).eval()


def _prints(given: DefenseInput) -> dict[str, str]:
    """Content of every handed part, a module's modes and gradient flags included."""
    prints: dict[str, str] = {}
    if given.model is not None:
        modes = [f"{name}:{module.training}" for name, module in given.model.named_modules()]
        flags = [f"{name}:{p.requires_grad}:{p.grad is None}" for name, p in given.model.named_parameters()]
        tensors = {**given.model.state_dict(), **dict(given.model.named_buffers())}  # unsaved buffers as well
        prints["model"] = fingerprint(tensors) + str(modes) + str(flags)
    for name in ("clean", "suspect"):
        part: Labelled | None = getattr(given, name)
        if part is not None:
            # Not Labelled.fingerprint, which remembers its first answer.
            prints[name] = fingerprint({"images": part.images, "labels": part.labels})
    return prints


def _check(outcome: object, defense: Defense, given: DefenseInput, victim: Victim) -> None:
    if not isinstance(outcome, Outcome):
        raise PluginError(f"defense {defense.name!r} returned {type(outcome).__name__}; it must return bdcore.Outcome.")
    try:
        json.dumps([asdict(outcome.verdict) if outcome.verdict else None, dict(outcome.notes)], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"defense {defense.name!r} returned a verdict or notes that a record cannot hold ({error}). Use Python's "
            "own bool, int, finite float and str; of a tensor take .item() or .tolist()."
        ) from error
    if outcome.suspects is not None:
        _check_suspects(outcome.suspects, defense, given)
    if outcome.model is not None:
        if outcome.model is given.model:
            raise ThreatModelError(
                f"defense {defense.name!r} returned the handed model itself; return a copy, or model=None to leave it."
            )
        found = {name: tuple(value.shape) for name, value in outcome.model.state_dict().items()}
        wanted = {name: tuple(value.shape) for name, value in victim.model.state_dict().items()}
        if found != wanted:
            odd = sorted(set(found.items()) ^ set(wanted.items()))[:3]
            raise PluginError(
                f"defense {defense.name!r} returned a model of another form than architecture {victim.arch.name!r}; "
                f"first differences (name, shape): {odd}. Return one built by bdcore.build or copied from the input."
            )


def _check_suspects(suspects: Suspects, defense: Defense, given: DefenseInput) -> None:
    if given.suspect is None:
        raise PluginError(f"defense {defense.name!r} returned suspects, but did not declare that it needs `suspect`.")
    index, scores, samples = suspects.index, suspects.scores, len(given.suspect)
    if index.dtype != torch.int64 or index.ndim != 1 or len(index.unique()) != len(index):
        raise PluginError(f"defense {defense.name!r} must return suspects as int64 [K], each place once.")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < samples:
        raise PluginError(f"defense {defense.name!r} returned suspects outside 0 to {samples - 1}.")
    if scores is not None and (
        not scores.dtype.is_floating_point or scores.shape != (samples,) or bool(scores.isnan().any())
    ):
        raise PluginError(f"defense {defense.name!r} must return scores of suspects as floats [{samples}], none NaN.")
