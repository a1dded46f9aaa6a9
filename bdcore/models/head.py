"""A classifier as features and linear head, whatever its class."""

import copy
from collections.abc import Callable, Generator, Sequence
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
    body = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    with _evaluating(body), metered(Meter()), torch.no_grad():
        images = _probe(model)
        # The copy is still whole; the model itself may be compiled, and would be again for these images.
        name, given = _final_linear(body, images)
        head = model.get_submodule(name)
        assert isinstance(head, nn.Linear)
        if not _passes_on(body, name, images, head.out_features):
            raise _refusal(model, f"its last linear layer {name!r} is not what it ends with")
        body.set_submodule(name, nn.Identity().train(head.training))
        features = body(images)
        if features.shape != given.shape or not torch.allclose(features, given, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise _refusal(model, f"without its last linear layer {name!r} it returns something else than its input")
    return body, head


def _final_linear(model: Classifier, images: Tensor) -> tuple[str, Tensor]:
    """The name of the linear layer whose output is the model's, told by what the layers answer and not by the order in
    which they were made; and its input, [B, D]."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: seen.extend((name, given.clone(), output.clone()) for given in inputs)

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not hooks:
        raise _refusal(model, "it has no linear layer")
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for name, given, answer in reversed(seen):
        if answer.shape == logits.shape and torch.allclose(answer, logits, rtol=0, atol=0, equal_nan=True):
            if given.ndim != 2:
                raise _refusal(
                    model, f"its linear layer {name!r} works on {tuple(given.shape)}, not on one row an image"
                )
            return name, given
    if not seen:
        raise _refusal(model, "none of its linear layers is called as a module")
    name, given, answer = seen[-1]
    if answer.ndim != 2:
        raise _refusal(model, f"its last linear layer {name!r} returns {tuple(answer.shape)}, and more follows")
    averaged = " (it averages two heads)" if _averages(seen, logits) else ""
    raise _refusal(model, f"its last linear layer {name!r} is not what it ends with{averaged}")


def _passes_on(model: Classifier, name: str, images: Tensor, classes: int) -> bool:
    """Whether the model answers whatever the layer answers: a ReLU behind it may show on no image that is tried."""
    noise = torch.randn((len(images), classes), generator=torch.Generator().manual_seed(1)).to(model.mean)
    hook = model.get_submodule(name).register_forward_hook(lambda *_: noise)
    try:
        return torch.equal(model(images), noise)
    finally:
        hook.remove()


def _averages(seen: Sequence[tuple[str, Tensor, Tensor]], logits: Tensor) -> bool:
    """Whether the answer is the mean of the last two linear layers', as in models with a head for distillation."""
    answers = [answer for _, _, answer in seen[-2:]]
    return (
        len(answers) == 2
        and all(answer.shape == logits.shape for answer in answers)
        and torch.allclose((answers[0] + answers[1]) / 2, logits)
    )


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
