"""A classifier as features and linear head, whatever its class."""

import copy
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bdcore.context import Meter
from bdcore.errors import UsageError
from bdcore.models.classifier import Classifier, metered


def split_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Split a classifier into body and head, with head(body(x)) = model(x).

    The body is a copy of the structure that shares every parameter and buffer with `model`, so training the one trains
    the other, and BatchNorm statistics updated in place are seen by both. Its own flags (train or eval) begin as the
    model's. That the split holds is verified on two fixed images in eval mode; this changes nothing and is not metered.

    Args:
        model: a Classifier.

    Returns:
        (body, head): body maps images [B, C, H, W] to penultimate features [B, D], the input of the last linear
        layer; head is that layer of `model` itself.

    Raises:
        UsageError: the model does not end with a linear layer.
    """
    if not isinstance(model, Classifier):
        raise UsageError(
            f"penultimate features are taken of a bdcore.models.Classifier, not of {type(model).__name__}: "
            "wrap the network, Classifier(net, shape, mean, std)"
        )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise _refusal(model, "it has no linear layer")
    head = model.get_submodule(linear[-1])
    assert isinstance(head, nn.Linear)
    body = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    with _evaluating(body), metered(Meter()), torch.no_grad():
        images = _probe(model)
        logits = body(images)  # still whole; the model itself may be compiled, and would be again for these images
        body.set_submodule(linear[-1], nn.Identity().train(head.training))
        features = body(images)
        if features.ndim != 2 or features.shape[1] != head.in_features:
            raise _refusal(model, f"without its last linear layer {linear[-1]!r} it returns {tuple(features.shape)}")
        if not torch.allclose(head(features), logits, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise _refusal(model, f"its last linear layer {linear[-1]!r} is not what it ends with")
    return body, head


def _refusal(model: Classifier, reason: str) -> UsageError:
    return UsageError(
        f"{type(model.net).__name__} cannot be split into features and a final linear layer: {reason}. "
        "A method that works on penultimate features needs a model that ends with nn.Linear."
    )


def _probe(model: Classifier) -> Tensor:
    """Two fixed images of noise: on blank ones a network without biases has features 0, which any head would fit."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand((2, *model.shape), generator=generator).to(model.mean)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
