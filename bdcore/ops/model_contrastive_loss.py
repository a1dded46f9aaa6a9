"""Model-contrastive loss: pull an anchor's direction towards its positive, push it from its negatives.

With s+ = cos(z, z+), s_k = cos(z, z-_k) and temperature t, the loss of a row is

    l = log(e^{s+/t} + sum_k e^{s_k/t}) - s+/t,    cos(a, b) = a.b / (max(|a|, eps) max(|b|, eps)),  eps = 1e-8

as in Li, He, Song: "Model-Contrastive Federated Learning" (CVPR 2021) and in MCLDef, Yue et al.: "Model-Contrastive
Learning for Backdoor Defense" (ACM MM 2023).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm as norm

from bdcore.errors import unknown_name
from bdcore.ops.formats import FLOATS, REDUCTIONS, Reduction, accumulator
from bdcore.ops.registration import operators, register

EPS = 1e-8


def model_contrastive_loss(
    anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: float, reduction: Reduction = "none"
) -> Tensor:
    """Contrastive loss of each anchor against one positive and K negatives, by cosine similarity.

    Computed in float32, or float64 where an input is float64; inputs of different dtypes are promoted to one.
    Differentiable once with respect to all three tensors.

    Args:
        anchor: float [B, D] (float16, bfloat16, float32 or float64), rows of any length, zero included.
        positive: float [B, D].
        negatives: float [B, K, D]; K = 0 gives a loss of 0.
        temperature: t > 0.
        reduction: "none", "mean" (nan for an empty batch, as elsewhere in PyTorch) or "sum".

    Returns:
        The loss, at least 0: float32 (float64 for float64 inputs), [B] for "none", else a scalar.

    Raises:
        TypeError: where a tensor is not floating point.
        ValueError: where shapes, devices, the temperature or the reduction are not as above.
    """
    for name, tensor in (("anchor", anchor), ("positive", positive), ("negatives", negatives)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != anchor.device:
            raise ValueError(f"{name} is on {tensor.device} and anchor on {anchor.device}: move them to one device")
    if anchor.ndim != 2:
        raise ValueError(f"anchor must be [B, D], got shape {list(anchor.shape)}")
    if positive.shape != anchor.shape:
        raise ValueError(f"positive must have anchor's shape {list(anchor.shape)}, got {list(positive.shape)}")
    batch, width = anchor.shape
    if negatives.ndim != 3 or negatives.shape[0] != batch or negatives.shape[2] != width:
        raise ValueError(f"negatives must be [{batch}, K, {width}] as anchor is, got shape {list(negatives.shape)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(unknown_name("reduction", reduction, REDUCTIONS))
    if not anchor.dtype == positive.dtype == negatives.dtype:
        dtype = torch.promote_types(torch.promote_types(anchor.dtype, positive.dtype), negatives.dtype)
        anchor, positive, negatives = anchor.to(dtype), positive.to(dtype), negatives.to(dtype)
    return operators(anchor).model_contrastive_loss(
        anchor, positive, negatives, float(temperature), REDUCTIONS[reduction]
    )[0]


# Sums of products rather than matrix products: those autocast, or a TF32 setting, would compute in fewer bits.
def _forward(
    anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(anchor.dtype)
    z, pos, neg = anchor.to(dtype), positive.to(dtype).unsqueeze(1), negatives.to(dtype)
    norms = torch.cat([norm(z, dim=-1, keepdim=True), norm(pos, dim=-1), norm(neg, dim=-1)], dim=1)
    dots = torch.cat([(z.unsqueeze(1) * pos).sum(-1), (z.unsqueeze(1) * neg).sum(-1)], dim=1)
    lengths = norms.clamp_min(EPS)
    cosines = dots / lengths[:, :1] / lengths[:, 1:]
    scaled = cosines / temperature
    margin = scaled[:, 1:].logsumexp(1) - scaled[:, 0]
    loss = torch.logaddexp(torch.zeros_like(margin), margin)  # exact for losses near 0, where a difference is not
    if reduction == REDUCTIONS["mean"]:
        loss = loss.mean()
    elif reduction == REDUCTIONS["sum"]:
        loss = loss.sum()
    return loss, norms, cosines


def _forward_fake(
    anchor: Tensor, positive: Tensor, negatives: Tensor, temperature: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(anchor.dtype)
    batch, negative_count = negatives.shape[:2]
    loss = anchor.new_empty((batch,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    return (
        loss,
        anchor.new_empty((batch, 2 + negative_count), dtype=dtype),
        anchor.new_empty((batch, 1 + negative_count), dtype=dtype),
    )


def _backward(
    grad: Tensor,
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor,
    norms: Tensor,
    cosines: Tensor,
    temperature: float,
    reduction: int,
    need_anchor: bool,
    need_positive: bool,
    need_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dl/ds+ = (p+ - 1)/t and dl/ds_k = p_k/t with p the softmax; ds/dz = (w - s u)/|z|, u and w unit vectors."""
    batch = anchor.shape[0]
    z, pos, neg = anchor.to(norms.dtype), positive.to(norms.dtype), negatives.to(norms.dtype)
    row = grad.to(norms.dtype) / (temperature * (max(batch, 1) if reduction == REDUCTIONS["mean"] else 1))
    slope = (cosines / temperature).softmax(1) * row.reshape(-1, 1)
    slope = torch.cat([-slope[:, 1:].sum(1, keepdim=True), slope[:, 1:]], dim=1)  # p+ - 1 without cancellation

    lengths = norms.clamp_min(EPS)
    # Below eps the length is a constant, and with it the term through which it depends on its vector vanishes.
    bend = torch.where(norms > EPS, 1.0, 0.0) / lengths
    along = cosines * slope
    grad_anchor, grad_positive, grad_negatives = (anchor.new_empty(0) for _ in range(3))
    if need_anchor:
        pull = slope / lengths[:, 1:]
        total = pull[:, :1] * pos + (pull[:, 1:, None] * neg).sum(1)
        grad_anchor = (total - along.sum(1, keepdim=True) * bend[:, :1] * z) / lengths[:, :1]
    unit = z / lengths[:, :1]
    if need_positive:
        grad_positive = (slope[:, :1] * unit - along[:, :1] * bend[:, 1:2] * pos) / lengths[:, 1:2]
    if need_negatives:
        bent = (along[:, 1:] * bend[:, 2:]).unsqueeze(2) * neg
        grad_negatives = (slope[:, 1:, None] * unit.unsqueeze(1) - bent) / lengths[:, 2:, None]
    return (
        grad_anchor.to(anchor.dtype).contiguous(),
        grad_positive.to(anchor.dtype).contiguous(),
        grad_negatives.to(anchor.dtype).contiguous(),
    )


def _backward_fake(
    grad: Tensor,
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor,
    norms: Tensor,
    cosines: Tensor,
    temperature: float,
    reduction: int,
    need_anchor: bool,
    need_positive: bool,
    need_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        anchor.new_empty(anchor.shape if need_anchor else (0,)),
        anchor.new_empty(positive.shape if need_positive else (0,)),
        anchor.new_empty(negatives.shape if need_negatives else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    anchor, positive, negatives, ctx.temperature, ctx.reduction = inputs
    _, norms, cosines = output
    ctx.mark_non_differentiable(norms, cosines)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(anchor, positive, negatives, norms, cosines)


def _gradients(ops: Any, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    anchor, positive, negatives = needed = ctx.needs_input_grad[:3]
    found = ops.model_contrastive_loss_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.reduction, *needed)
    return found[0] if anchor else None, found[1] if positive else None, found[2] if negatives else None, None, None


# Besides the loss, norms [B, 2 + K] (of anchor, positive, negatives) and cosines [B, 1 + K] are returned: all that the
# backward pass needs besides the inputs, and nothing of the size of a feature vector.
register(
    "model_contrastive_loss",
    "(Tensor anchor, Tensor positive, Tensor negatives, float temperature, int reduction)"
    " -> (Tensor loss, Tensor norms, Tensor cosines)",
    _forward,
    _forward_fake,
    _setup_context,
    _gradients,
)
# A gradient that is not asked for comes back as an empty tensor.
register(
    "model_contrastive_loss_backward",
    "(Tensor grad, Tensor anchor, Tensor positive, Tensor negatives, Tensor norms, Tensor cosines, float temperature,"
    " int reduction, bool need_anchor, bool need_positive, bool need_negatives) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
