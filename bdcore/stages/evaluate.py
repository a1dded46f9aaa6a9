"""Score a classifier, with all that is the attacker's secret."""

from collections.abc import Mapping, Sequence

import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from bdcore.artifacts import Isolation, Labelled, Recovered, Scores, Suspects, Trigger, Triggered, Verdict
from bdcore.context import Context
from bdcore.errors import UsageError
from bdcore.models import split_head
from bdcore.ops import put_trigger
from bdcore.training import forward_batches

SHOWN, SHOWN_TRIGGERED = 500, 200
"""How many test images `sampled` takes."""


def evaluate(
    model: nn.Module, test: Labelled, triggered: Triggered | None, target: int | None, context: Context
) -> Scores:
    """BA, ASR, RA and the target class's own accuracy, in fp32 on the whole test set (see `Scores`)."""
    model = model.to(context.device).eval()
    right = answers(model, test.images, context) == test.labels
    asr = ra = None
    if triggered is not None and len(triggered.images):
        predicted = answers(model, triggered.images, context)
        asr, ra = share(predicted == triggered.targets), share(predicted == triggered.labels)
    of_target = test.labels == target if target is not None else None
    return Scores(
        clean_accuracy=share(right),
        asr=asr,
        ra=ra,
        target_class_accuracy=share(right[of_target]) if of_target is not None and of_target.any() else None,
        nontarget_accuracy=share(right[~of_target]) if of_target is not None and not of_target.all() else None,
    )


def answers(model: nn.Module, images: Tensor, context: Context) -> Tensor:
    """The class that a classifier, on the context's device, gives each of uint8 [N, C, H, W] images: int64 [N], on the
    CPU."""
    return forward_batches(lambda batch: model(batch).argmax(1), images, context).cpu()


def recovered(model: nn.Module, test: Labelled, triggers: Sequence[Trigger], context: Context) -> list[Recovered]:
    """What each trigger is worth, on all test images of other classes than its target; see `Recovered`."""
    model = model.to(context.device).eval()
    found: list[Recovered] = []
    for number, trigger in enumerate(triggers):
        there = trigger.to(context.device)
        generator = context.generator("triggers", number)
        predicted = forward_batches(
            lambda batch, t=there, g=generator: model(put_trigger(t, batch, g)).argmax(1),
            test.images[test.labels != trigger.target],
            context,
        )
        asr = share(predicted == trigger.target) if len(predicted) else None
        found.append(Recovered(trigger.target, asr, round(_size(trigger), 3)))
    return found


def sampled(test: Labelled, triggered: Triggered | None) -> dict[str, Tensor]:
    """A few test images to look at a classifier's features by: the first ones of every class, `SHOWN` in all, and
    `SHOWN_TRIGGERED` of the triggered ones, evenly spread.

    Returns:
        "clean" uint8 [n, C, H, W] with "labels" int64 [n]; under an attack "triggered" with "triggered_labels" too.
    """
    classes = test.labels.unique()
    each = max(1, SHOWN // len(classes))
    index = torch.cat([(test.labels == one).nonzero()[:each, 0] for one in classes[:SHOWN]])
    few = {"clean": test.images[index], "labels": test.labels[index]}
    if triggered is not None:
        count = len(triggered.images)
        spread = torch.linspace(0, count - 1, min(count, SHOWN_TRIGGERED)).round().long()
        few |= {"triggered": triggered.images[spread], "triggered_labels": triggered.labels[spread]}
    return few


def features(model: nn.Module, few: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
    """Penultimate features, float16 [n, D], of the images that `sampled` chose, by their names there; empty where the
    classifier does not end with a linear layer."""
    try:
        body, _ = split_head(model.to(context.device).eval())
    except UsageError:
        return {}
    images = {name: few[name] for name in ("clean", "triggered") if name in few}
    return {name: forward_batches(body, value, context).half().cpu() for name, value in images.items()}


def defense_effectiveness(before: Scores, after: Scores) -> float | None:
    """DER = (max(0, fall in ASR) - max(0, fall in BA) + 1) / 2, in [0, 1]; None where there is no attack.

    Zhu et al., "Enhancing Fine-Tuning based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023.
    """
    if before.asr is None or after.asr is None:
        return None
    fall = max(0.0, before.asr - after.asr)
    return (fall - max(0.0, before.clean_accuracy - after.clean_accuracy) + 1) / 2


def isolation(suspects: Suspects, poisoned: Tensor) -> Isolation:
    """How well `suspects` match the poisoned samples (bool [N]); see `Isolation`."""
    truth = poisoned.cpu()
    index = suspects.index.cpu()
    isolated, hits, poisons = len(index), int(truth[index].sum()), int(truth.sum())
    precision, recall = _ratio(hits, isolated), _ratio(hits, poisons)
    auroc = None
    if suspects.scores is not None and 0 < poisons < len(truth):
        # By ranks, because a score may be infinite.
        auroc = float(roc_auc_score(truth.numpy(), rankdata(suspects.scores.cpu().double().numpy())))
    return Isolation(
        isolated=isolated,
        precision=precision,
        recall=recall,
        fpr=_ratio(isolated - hits, len(truth) - poisons),
        f1=_ratio(2 * hits, isolated + poisons) if poisons else None,
        auroc=auroc,
    )


def verdict_correct(verdict: Verdict, attacked: bool, target: int | None) -> bool:
    """Whether `verdict` is right about there being a backdoor and, where there is a single target, about the target."""
    if verdict.backdoored != attacked:
        return False
    return not attacked or target is None or verdict.target == target


def target_rank(verdict: Verdict, target: int | None) -> int | None:
    """How many classes, the true target among them, have as much evidence against them; 1: none has more."""
    if target is None or len(verdict.evidence) <= target:
        return None
    return sum(evidence >= verdict.evidence[target] for evidence in verdict.evidence)


def _size(trigger: Trigger) -> float:
    if trigger.delta is not None:
        return float(trigger.delta.abs().amax(0).sum())
    if trigger.mask is not None:
        return float(trigger.mask.sum())
    assert trigger.patches is not None
    return float(trigger.patches.shape[2] * trigger.patches.shape[3])


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def share(hits: Tensor) -> float:
    """How much of a bool [N] is true."""
    return float(hits.double().mean())
