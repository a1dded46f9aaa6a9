"""Per-sample cross entropy, bent so that training isolates what a network learns too fast.

With l the cross entropy of a sample and gamma the loss that training is not to fall below,

    ce: l      ascent: -l      lga: sign(l - gamma) l      flood: |l - gamma| + gamma

where the sign counts as a constant and sign(0) = 0. Local gradient ascent (lga) and flooding are the losses of Li, Lyu,
Koren, Lyu, Li, Ma: "Anti-Backdoor Learning" (NeurIPS 2021); flooding is by Ishida et al. (ICML 2020).
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bdcore.errors import unknown_name
from bdcore.ops.formats import FLOATS, REDUCTIONS, Reduction, accumulator
from bdcore.ops.registration import operators, register

Mode = Literal["ce", "ascent", "lga", "flood"]
Per = Literal["sample", "batch"]

_MODES: dict[str, int] = {"ce": 0, "ascent": 1, "lga": 2, "flood": 3}
_PER = ("sample", "batch")
_BATCH = 3  # among the reductions of the operator: the mode is applied to the batch's mean


def isolation_loss(
    logits: Tensor,
    labels: Tensor,
    gamma: float = 0.5,
    mode: Mode = "lga",
    *,
    per: Per = "sample",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "none",
) -> Tensor:
    """Cross entropy of each sample, or its negative, or that which keeps it near gamma.

    Computed in float32, or float64 for float64 logits; exact for confident samples, whose losses differ down to 1e-38
    and so can be ranked. Differentiable once with respect to the logits.

    Args:
        logits: float [B, C] (float16, bfloat16, float32 or float64), C >= 1.
        labels: int64 [B] in [0, C), or ignore_index: such a sample has loss 0 and no gradient.
        gamma: any finite number; used by lga and flood alone.
        mode: "ce", "ascent", "lga" or "flood".
        per: what the mode is applied to: each "sample", or the "batch", that is the mean cross entropy of the samples
            that are not ignored.
        ignore_index: the label of samples that do not count.
        label_smoothing: in [0, 1], and above 0 with mode "ce" alone: with it the loss has a floor above 0, and a gamma
            below that floor is never reached.
        reduction: "none", "mean" (over the samples that are not ignored; nan where there are none, as elsewhere in
            PyTorch) or "sum". With per="batch" the loss is one number already: "none" and "mean" both give it, and
            "sum" is refused.

    Returns:
        float32 (float64 for float64 logits), [B] for reduction "none" per sample, else a scalar.

    Raises:
        TypeError: where a dtype is not as above.
        ValueError: where shapes, devices, numbers or names are not as above.
        RuntimeError: where a label lies outside; on a GPU, as everywhere in PyTorch, a kernel's assertion ends the
            process's use of the device.
    """
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be [B, C] with C >= 1, got shape {list(logits.shape)}")
    if labels.ndim != 1 or labels.shape[0] != logits.shape[0]:
        raise ValueError(f"labels must be [{logits.shape[0]}], one a row of logits, got shape {list(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device} and logits on {logits.device}: move them to one device")
    if mode not in _MODES:
        raise ValueError(unknown_name("mode", mode, _MODES))
    if per not in _PER:
        raise ValueError(unknown_name("per", per, _PER))
    if reduction not in REDUCTIONS:
        raise ValueError(unknown_name("reduction", reduction, REDUCTIONS))
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be a finite number, got {gamma}")
    if label_smoothing:
        _check_smoothing(label_smoothing, mode)
    kind = REDUCTIONS[reduction]
    if per == "batch":
        if reduction == "sum":
            raise ValueError("per='batch' is a function of the batch's mean, which cannot be summed: use 'mean'")
        kind = _BATCH
    return operators(logits).isolation_loss(
        logits, labels, float(gamma), _MODES[mode], ignore_index, float(label_smoothing), kind
    )[0]


def _check_smoothing(label_smoothing: float, mode: str) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if mode != "ce":
        raise ValueError(
            f"label_smoothing must be 0 with mode {mode!r}: it puts a floor under the loss, and where gamma lies below"
            " that floor the ascent never begins"
        )


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    # Here and not beside the other checks, because torch.compile cannot trace a question about values; RuntimeError,
    # because compiled kernels can raise nothing else.
    used = labels[labels != ignore_index]
    if bool(((used < 0) | (used >= classes)).any()):
        raise RuntimeError(
            f"labels must be in [0, {classes - 1}] or ignore_index ({ignore_index}),"
            f" got {int(used.min())} to {int(used.max())}"
        )


def _slope(loss: Tensor, gamma: float, mode: int) -> Tensor:
    """The derivative of what the mode makes of a cross entropy."""
    if mode == _MODES["ce"]:
        return torch.ones_like(loss)
    if mode == _MODES["ascent"]:
        return -torch.ones_like(loss)
    return torch.where(loss.isnan(), loss, (loss - gamma).sign())


def _value(loss: Tensor, slope: Tensor, gamma: float, mode: int) -> Tensor:
    return slope * (loss - gamma) + gamma if mode == _MODES["flood"] else slope * loss


def _forward(
    logits: Tensor, labels: Tensor, gamma: float, mode: int, ignore_index: int, smoothing: float, reduction: int
) -> tuple[Tensor, Tensor]:
    _check_labels(labels, logits.shape[1], ignore_index)
    z = logits.to(accumulator(logits.dtype))
    used = labels != ignore_index
    label = labels.where(used, 0).unsqueeze(1)
    top = z.amax(1) if len(z) else z.new_empty(0)
    terms = (z - torch.where(top == -math.inf, 0, top).unsqueeze(1)).exp()
    rest = terms.scatter(1, label, 0).sum(1)
    picked = z.gather(1, label).squeeze(1)
    total = rest + terms.gather(1, label).squeeze(1)
    # Where the label has the largest logit its term is exactly 1, and what the others add to it decides.
    logsum = torch.where(picked == top, rest, total - 1).log1p()
    loss = (top - picked) + logsum
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (logsum + (top - z.mean(1)))

    factor = loss.new_ones(())
    slope = _slope(loss, gamma, _MODES["ce"] if reduction == _BATCH else mode)
    if reduction != _BATCH:
        loss = _value(loss, slope, gamma, mode)
    slope, loss = slope.where(used, 0), loss.where(used, 0)
    if reduction != REDUCTIONS["none"]:
        loss = loss.sum()
    if reduction in (REDUCTIONS["mean"], _BATCH):
        count = used.sum().to(loss.dtype)
        loss, factor = loss / count, 1 / count
    if reduction == _BATCH:
        outer = _slope(loss, gamma, mode)
        loss, factor = _value(loss, outer, gamma, mode), factor * outer
    saved = torch.stack([top, 1 / total, slope, -rest / total])
    return loss, torch.cat([saved.flatten(), factor.reshape(1)])


def _forward_fake(
    logits: Tensor, labels: Tensor, gamma: float, mode: int, ignore_index: int, smoothing: float, reduction: int
) -> tuple[Tensor, Tensor]:
    batch, dtype = logits.shape[0], accumulator(logits.dtype)
    shape = (batch,) if reduction == REDUCTIONS["none"] else ()
    return logits.new_empty(shape, dtype=dtype), logits.new_empty((4 * batch + 1,), dtype=dtype)


def _backward(grad: Tensor, logits: Tensor, labels: Tensor, saved: Tensor, smoothing: float) -> Tensor:
    """dl/dz = softmax - onehot, times the slope of the sample and the factor of the batch."""
    classes = logits.shape[1]
    top, inverse, slope, excess = saved[:-1].view(4, -1)
    pull = (grad * saved[-1] * slope).unsqueeze(1)
    even = smoothing / classes
    found = (logits.to(saved.dtype) - top.unsqueeze(1)).exp() * inverse.unsqueeze(1) - even
    # Of an ignored sample the label is no column; what is put into another one there is dropped with the whole row.
    label = labels.clamp(0, classes - 1).unsqueeze(1)
    found = found.scatter(1, label, (excess + (smoothing - even)).unsqueeze(1)) * pull
    return torch.where(slope.unsqueeze(1) == 0, 0, found).to(logits.dtype).contiguous()


def _backward_fake(grad: Tensor, logits: Tensor, labels: Tensor, saved: Tensor, smoothing: float) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, _, _, _, ctx.smoothing, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, output[1])


def _gradients(ops: Any, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    found = ops.isolation_loss_backward(grad, *ctx.saved_tensors, ctx.smoothing)
    return (found, None, None, None, None, None, None)


# Besides the loss, `saved` is returned, all that the backward pass needs besides the inputs: [4, B] of the largest
# logit, 1 / sum of e^(logit - largest), the slope (0 for ignored samples) and p - 1 of the label's probability p; then
# one number, by which the reduction multiplies all slopes.
register(
    "isolation_loss",
    "(Tensor logits, Tensor labels, float gamma, int mode, int ignore_index, float smoothing, int reduction)"
    " -> (Tensor loss, Tensor saved)",
    _forward,
    _forward_fake,
    _setup_context,
    _gradients,
)
register(
    "isolation_loss_backward",
    "(Tensor grad, Tensor logits, Tensor labels, Tensor saved, float smoothing) -> Tensor",
    _backward,
    _backward_fake,
)
