"""Batch normalisation and the ReLU behind it, in one pass over memory where PyTorch takes two.

    y = max(0, (x - mean) / sqrt(variance + eps) * weight + bias)

with mean and (biased) variance of each channel over batch and pixels, or their running averages: Ioffe, Szegedy: "Batch
Normalization", ICML 2015. Which values the ReLU passed is not kept but computed again from x in the backward pass, so
that it reads x and the gradient alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdcore.ops.formats import FLOATS, accumulator
from bdcore.ops.registration import operators, register, transforms_active

_aten = torch.ops.aten


def batch_norm_relu(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`relu(batch_norm(...))` with the arguments of `torch.nn.functional.batch_norm`.

    Statistics, and all arithmetic, are in float32, or float64 where x is. Differentiable with respect to x, weight and
    bias, any number of times. On a GPU, and where more is wanted than numbers (by torch.compile and torch.export, which
    fuse or save PyTorch's own functions, and by the transforms of torch.func), it is PyTorch's batch normalisation and
    ReLU.

    Args:
        x: float [B, C, H, W] (float16, bfloat16, float32 or float64); fastest in channels-last memory.
        running_mean, running_var: [C]; used where not `training`, else moved towards the batch's, in place (the
            variance's unbiased).
        weight, bias: [C]; what belongs to channels is float32, or float64 where x is, and else converted.
        training: whether to take the batch's statistics.
        momentum: how far the running averages move, in [0, 1].
        eps: added to the variance, > 0.

    Returns:
        [B, C, H, W] of x's dtype, in channels-last memory (on a GPU in that of x). A NaN stays one.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: shapes or devices are not as above, or there is only one value a channel to take statistics of.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {list(x.shape)}")
    channels = x.shape[1]
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, one in named.items():
        if one.shape != (channels,):
            raise ValueError(f"{name} must be [{channels}], one a channel of x, got shape {list(one.shape)}")
        if one.device != x.device:
            raise ValueError(f"{name} is on {one.device} and x on {x.device}: move them to one device")
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if training and count < 2:
        raise ValueError(f"training needs more than one value a channel, got x of shape {list(x.shape)}")
    if x.is_cuda or torch.compiler.is_compiling() or transforms_active():
        return F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps), inplace=True)
    dtype = accumulator(x.dtype)
    y, statistics = operators(x).batch_norm_relu(
        x, weight.to(dtype), bias.to(dtype), running_mean.to(dtype), running_var.to(dtype), training, eps
    )
    if training:
        with torch.no_grad():
            running_mean.lerp_(statistics[0].to(running_mean.dtype), momentum)
            running_var.lerp_((statistics[1] * (count / (count - 1))).to(running_var.dtype), momentum)
    return y


class BatchNormReLU(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, with the same parameters and buffers, and the ReLU that follows it."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, H, W] to its normalised and rectified form."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # an average over all batches
                momentum = 1 / float(self.num_batches_tracked)
        return batch_norm_relu(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            momentum or 0.0,
            self.eps,
        )


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor]:
    dense = x.contiguous(memory_format=torch.channels_last)
    if not training:
        y = F.batch_norm(dense, mean, variance, weight, bias, False, 0.0, eps)
        return F.relu(y), torch.stack([mean, variance])
    y, center, inverse = _aten.native_batch_norm(dense, weight, bias, None, None, True, 0.0, eps)
    return F.relu(y), torch.stack([center, (inverse**-2 - eps).clamp_min(0)])


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), mean.new_empty((2, x.shape[1]))


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, training: bool, affine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dense = x.contiguous(memory_format=torch.channels_last)
    if not x.numel():  # PyTorch divides by the number of values
        count = weight.shape[0] if affine else 0
        return torch.empty_like(dense), weight.new_zeros(count), bias.new_zeros(count)
    mean, variance = statistics
    active = F.batch_norm(dense, mean, variance, weight, bias, False, 0.0, eps)
    passed = torch.where(active <= 0, 0, grad).contiguous(memory_format=torch.channels_last)
    inverse = (variance + eps).rsqrt()
    mask = [True, affine, affine]
    grad_x, grad_weight, grad_bias = _aten.native_batch_norm_backward(
        passed, dense, weight, mean, variance, mean, inverse, training, eps, mask
    )
    return (grad_x, grad_weight, grad_bias) if affine else (grad_x, weight.new_empty(0), bias.new_empty(0))


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, training: bool, affine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    count = weight.shape[0] if affine else 0
    return torch.empty_like(x, memory_format=torch.channels_last), weight.new_empty(count), bias.new_empty(count)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, _, ctx.training, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, output[1])


def _gradients(ops: Any, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    if torch.is_grad_enabled():
        return _differentiable_gradients(ctx, grad)
    affine = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    found, weight, bias = ops.batch_norm_relu_backward(grad, *ctx.saved_tensors, ctx.training, affine, ctx.eps)
    return (found, *((weight, bias) if affine else (None, None)), None, None, None, None)


def _differentiable_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With `create_graph` the gradients are to be differentiated in turn: those of PyTorch's functions can be."""
    x, weight, bias, statistics = ctx.saved_tensors
    mean, variance = (None, None) if ctx.training else statistics
    y = F.relu(F.batch_norm(x, mean, variance, weight, bias, ctx.training, 0.0, ctx.eps))
    wanted = [one for one, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None, None)


# Besides y the statistics that it was computed with are returned, [2, C] of means and biased variances.
register(
    "batch_norm_relu",
    "(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor variance, bool training, float eps)"
    " -> (Tensor y, Tensor statistics)",
    _forward,
    _forward_fake,
    _setup_context,
    _gradients,
)
register(
    "batch_norm_relu_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor statistics, bool training, bool affine, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
