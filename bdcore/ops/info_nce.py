"""InfoNCE: pick each anchor's positive out of many keys, by cosine similarity.

With s_bm = cos(anchor_b, key_m), the positive's index pos_b and temperature t, the loss of an anchor is

    l_b = log(sum_m e^{s_bm/t}) - s_{b,pos_b}/t,    cos(a, b) = a.b / (max(|a|, eps) max(|b|, eps)),  eps = 1e-8

as in van den Oord, Li, Vinyals: "Representation Learning with Contrastive Predictive Coding" (2018), SimCLR (Chen et
al., ICML 2020), MoCo (He et al., CVPR 2020) and CLIP (Radford et al., ICML 2021). The matrix of all similarities is
never stored: it is computed in tiles, forward and backward.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bdcore.errors import unknown_name
from bdcore.ops.formats import FLOATS, REDUCTIONS, Reduction, accumulator
from bdcore.ops.registration import operators, register

EPS = 1e-8


def info_nce(
    anchor: Tensor, keys: Tensor, positive_index: Tensor, temperature: float, reduction: Reduction = "none"
) -> Tensor:
    """Contrastive loss of each anchor against all keys, one of which is its positive, by cosine similarity.

    Computed in float32, or float64 where an input is float64, whatever autocast and TF32 allow elsewhere; inputs of
    different dtypes are promoted to one. Differentiable once with respect to anchor and keys.

    Args:
        anchor: float [B, D] (float16, bfloat16, float32 or float64), rows of any length, zero included.
        keys: float [M, D], shared by all anchors.
        positive_index: int64 [B], the row of keys that is each anchor's positive, in [0, M - 1].
        temperature: t > 0.
        reduction: "none", "mean" (nan for an empty batch, as elsewhere in PyTorch) or "sum".

    Returns:
        The loss, at least 0: float32 (float64 for float64 inputs), [B] for "none", else a scalar.

    Raises:
        TypeError: where a tensor does not have a dtype as above.
        ValueError: where shapes, devices, the temperature or the reduction are not as above.
        RuntimeError: where a positive_index lies outside; on a GPU, as everywhere in PyTorch, a kernel's assertion ends
            the process's use of the device.
    """
    for name, tensor in (("anchor", anchor), ("keys", keys)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be [rows, D], got shape {list(tensor.shape)}")
    if positive_index.dtype != torch.int64:
        raise TypeError(f"positive_index must be int64, got {positive_index.dtype}")
    for name, tensor in (("keys", keys), ("positive_index", positive_index)):
        if tensor.device != anchor.device:
            raise ValueError(f"{name} is on {tensor.device} and anchor on {anchor.device}: move them to one device")
    if keys.shape[1] != anchor.shape[1]:
        raise ValueError(f"keys must be [M, {anchor.shape[1]}] as anchor is, got shape {list(keys.shape)}")
    if positive_index.ndim != 1 or positive_index.shape[0] != anchor.shape[0]:
        raise ValueError(f"positive_index must be [{anchor.shape[0]}] as anchor is, got {list(positive_index.shape)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(unknown_name("reduction", reduction, REDUCTIONS))
    if anchor.dtype != keys.dtype:
        dtype = torch.promote_types(anchor.dtype, keys.dtype)
        anchor, keys = anchor.to(dtype), keys.to(dtype)
    return operators(anchor).info_nce(anchor, keys, positive_index, float(temperature), REDUCTIONS[reduction])[0]


_TILE = 1024


def _check_values(positive_index: Tensor, keys: Tensor) -> None:
    # Here and not beside the other checks, because torch.compile cannot trace a question about values; RuntimeError,
    # because compiled kernels can raise nothing else.
    number = keys.shape[0]
    if bool(((positive_index < 0) | (positive_index >= number)).any()):
        raise RuntimeError(
            f"positive_index must be in [0, {number - 1}] for {number} keys,"
            f" got {int(positive_index.min())} to {int(positive_index.max())}"
        )


def _tiles(count: int) -> Iterator[slice]:
    for start in range(0, count, _TILE):
        yield slice(start, min(start + _TILE, count))


def _units(rows: Tensor, norms: Tensor) -> Tensor:
    return rows.double() / norms.double().clamp_min(EPS).unsqueeze(1)


# In float64 throughout: products of float32 matrices are computed in fewer bits under autocast or a TF32 setting.
def _scores(anchor: Tensor, keys: Tensor, temperature: float) -> Tensor:
    return (anchor @ keys.T).div_(temperature)


def _positives(positive_index: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
    """Which anchors have their positive among these keys, and where in the tile it is."""
    rows = ((positive_index >= keys.start) & (positive_index < keys.stop)).nonzero().squeeze(1)
    return rows, positive_index[rows] - keys.start


def _forward(
    anchor: Tensor, keys: Tensor, positive_index: Tensor, temperature: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_values(positive_index, keys)
    anchor_norms, key_norms = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in (anchor, keys))
    batch = anchor.shape[0]
    positive = anchor_norms.new_zeros(batch)
    others = anchor_norms.new_full((batch,), -math.inf)  # log of the sum over the other keys, so far
    for columns in _tiles(keys.shape[0]):
        key_units = _units(keys[columns], key_norms[columns])
        for rows in _tiles(batch):
            scores = _scores(_units(anchor[rows], anchor_norms[rows]), key_units, temperature)
            found, place = _positives(positive_index[rows], columns)
            positive[rows][found] = scores[found, place]
            scores[found, place] = -math.inf
            others[rows] = torch.logaddexp(others[rows], scores.logsumexp(1))
    margin = others - positive
    loss = torch.logaddexp(torch.zeros_like(margin), margin)  # exact for losses near 0, where a difference is not
    statistics = torch.stack([anchor_norms, positive + loss, margin.sigmoid()])
    if reduction == REDUCTIONS["mean"]:
        loss = loss.mean()
    elif reduction == REDUCTIONS["sum"]:
        loss = loss.sum()
    dtype = accumulator(anchor.dtype)
    return loss.to(dtype), statistics.to(dtype), key_norms.to(dtype)


def _forward_fake(
    anchor: Tensor, keys: Tensor, positive_index: Tensor, temperature: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(anchor.dtype)
    batch = anchor.shape[0]
    loss = anchor.new_empty((batch,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    return loss, anchor.new_empty((3, batch), dtype=dtype), anchor.new_empty((keys.shape[0],), dtype=dtype)


def _backward(
    grad: Tensor,
    anchor: Tensor,
    keys: Tensor,
    positive_index: Tensor,
    statistics: Tensor,
    key_norms: Tensor,
    temperature: float,
    reduction: int,
    need_anchor: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """dl_b/ds_bm = (p_bm - [m = pos_b])/t with p the softmax; then through u = x/max(|x|, eps) of anchors and keys."""
    _check_values(positive_index, keys)
    anchor_norms, log_sums, misses = statistics.double()
    batch = anchor.shape[0]
    slopes = grad.double() / (temperature * (max(batch, 1) if reduction == REDUCTIONS["mean"] else 1))
    slopes = slopes.expand(batch)
    anchor_sums = anchor_norms.new_zeros(anchor.shape if need_anchor else (0,))
    grad_keys = keys.new_empty(keys.shape if need_keys else (0,))
    for columns in _tiles(keys.shape[0]):
        key_units = _units(keys[columns], key_norms[columns])
        key_sums = torch.zeros_like(key_units)
        for rows in _tiles(batch):
            anchor_units = _units(anchor[rows], anchor_norms[rows])
            tile = _scores(anchor_units, key_units, temperature).sub_(log_sums[rows].unsqueeze(1)).exp_()
            found, place = _positives(positive_index[rows], columns)
            tile[found, place] = -misses[rows][found]  # p - 1 without cancellation
            tile *= slopes[rows].unsqueeze(1)
            if need_anchor:
                anchor_sums[rows] += tile @ key_units
            if need_keys:
                key_sums += tile.T @ anchor_units
        if need_keys:
            grad_keys[columns] = _project(keys[columns], key_norms[columns], key_sums).to(keys.dtype)
    grad_anchor = _project(anchor, anchor_norms, anchor_sums).to(anchor.dtype) if need_anchor else anchor.new_empty(0)
    return grad_anchor, grad_keys


def _project(rows: Tensor, norms: Tensor, sums: Tensor) -> Tensor:
    """The gradient of rows from that of their unit vectors; below eps the length is a constant."""
    norms = norms.double().unsqueeze(1)
    units = _units(rows, norms.squeeze(1))
    along = (sums * units).sum(1, keepdim=True)
    return (sums - torch.where(norms > EPS, along, 0.0) * units) / norms.clamp_min(EPS)


def _backward_fake(
    grad: Tensor,
    anchor: Tensor,
    keys: Tensor,
    positive_index: Tensor,
    statistics: Tensor,
    key_norms: Tensor,
    temperature: float,
    reduction: int,
    need_anchor: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    return (
        anchor.new_empty(anchor.shape if need_anchor else (0,)),
        keys.new_empty(keys.shape if need_keys else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    anchor, keys, positive_index, ctx.temperature, ctx.reduction = inputs
    _, statistics, key_norms = output
    ctx.mark_non_differentiable(statistics, key_norms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(anchor, keys, positive_index, statistics, key_norms)


def _gradients(ops: Any, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    anchor, keys = needed = ctx.needs_input_grad[:2]
    found = ops.info_nce_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.reduction, *needed)
    return found[0] if anchor else None, found[1] if keys else None, None, None, None


# Besides the loss, a few numbers a row are returned for the backward pass: statistics [3, B] (each anchor's norm, the
# logarithm of its sum of e^{s/t}, and 1 minus its positive's share of that sum) and key_norms [M].
register(
    "info_nce",
    "(Tensor anchor, Tensor keys, Tensor positive_index, float temperature, int reduction)"
    " -> (Tensor loss, Tensor statistics, Tensor key_norms)",
    _forward,
    _forward_fake,
    _setup_context,
    _gradients,
)
# A gradient that is not asked for comes back as an empty tensor.
register(
    "info_nce_backward",
    "(Tensor grad, Tensor anchor, Tensor keys, Tensor positive_index, Tensor statistics, Tensor key_norms,"
    " float temperature, int reduction, bool need_anchor, bool need_keys) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
