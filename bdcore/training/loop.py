"""The one training loop."""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from bdcore.context import Context, Progress, derive_seed
from bdcore.errors import BdcoreError
from bdcore.machine import keep_freed_memory
from bdcore.models import Classifier
from bdcore.ops.registration import implementation
from bdcore.training.batches import Batch, epoch_batches, steps_per_epoch
from bdcore.training.capture import CapturedStep
from bdcore.training.checkpoint import load_checkpoint, save_checkpoint
from bdcore.training.recipe import Recipe

# An epoch over a handful of images takes milliseconds; a checkpoint of each would cost more than a lost half second.
_SECONDS_BETWEEN_CHECKPOINTS = 0.5


def fit(
    phase: str,
    module: nn.Module,
    columns: Mapping[str, Tensor],
    loss: Callable[[Batch], Tensor | dict[str, Tensor]],
    recipe: Recipe,
    context: Context,
    on_epoch: Callable[[int, dict[str, float]], bool] | None = None,
    *,
    parts: Mapping[str, Recipe] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Train `module` in place, resuming exactly where an interrupted run left it.

    Everything random follows from `context.seed`, `phase` and the epoch, so a resumed training ends with the same
    bytes as an uninterrupted one on the same machine.

    Args:
        phase: names this training in progress, checkpoints and random streams; once per stage.
        module: holds all that is trained and all that a resume must restore, in parameters and buffers.
        columns: resident tensors with N rows each; "images" (uint8 [N, C, H, W]) is augmented as the recipe says.
        loss: maps a batch (rows of the columns, and "index") to a scalar, or to scalars by name with "loss" among
            them; called under autocast where precision is bf16. The module's train or eval mode is the caller's.
        recipe: optimiser, schedule, batches.
        context: device, precision, seed, checkpoint folder, progress.
        on_epoch: called after each epoch with its number (from 0) and mean figures, may alter the module's buffers and
            parameters; True ends the training.
        parts: children of `module`, by name, that have an optimiser and a schedule of their own, as in adversarial
            training; epochs, batches and augmentation are `recipe`'s. A parameter that a step's loss does not reach
            keeps its value.
        optimizer: what an earlier phase over the same parameters returned: its momentum carries over, while rate,
            momentum's factor and decay are `recipe`'s.
        capturable: on a GPU, steps may be recorded once and replayed, which saves launches of small kernels. Then the
            loss must compute from the batch, the module and other tensors that stay in their place: it must not read a
            value back, move tensors between devices, draw on the CPU or have shapes that follow from data, and numbers
            of the host are those of the recording; `on_epoch` alters tensors in place.

    Returns:
        The optimiser of `module` without its parts, to go on with.

    Raises:
        BdcoreError: where the loss is no longer finite.
        ValueError: where columns are empty or of unequal lengths, the phase's name was used before, a part is no child
            of the module, or the optimiser is of another kind or over other parameters.
    """
    if context.folder and phase in context.phases:  # it would be answered from the first one's checkpoint
        raise ValueError(f"fit: phase {phase!r} was trained already in this stage; give every phase its own name")
    context.phases.add(phase)
    device = context.device
    if device.type == "cpu":
        keep_freed_memory()
    module.to(device)
    _prepare(module, context)
    columns = {name: column.to(device) for name, column in columns.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise ValueError(f"{phase}: columns must have the same number of rows, at least one, got {lengths}")
    samples = next(iter(lengths.values()))
    recipes = {"": recipe, **(parts or {})}
    optimizers = _optimizers(module, recipes, optimizer)
    identity = " ".join([phase, *(f"{name}{one.model_dump_json()}" for name, one in recipes.items())])
    path = context.folder / f"{phase}.safetensors" if context.folder else None
    state = load_checkpoint(path, module, optimizers, identity, context) if path else None
    first, ended = (int(state["epochs"]), bool(state["ended"])) if state else (0, False)
    steps = steps_per_epoch(samples, recipe)
    update = partial(_step, loss=loss, optimizers=optimizers, context=context)
    # Operators without kernels run as PyTorch references, which read values back to check them: no graph can hold that.
    if capturable and device.type == "cuda" and implementation("cuda") == "native":
        update = CapturedStep(update, optimizers, context)
    started, saved = perf_counter(), perf_counter()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for epoch in range(first, recipe.epochs):
            if ended:
                break
            _seed(device, derive_seed(context.seed, phase, "epoch", epoch))
            generator = context.generator(phase, "batches", epoch)
            began = perf_counter()
            sums: dict[str, Tensor] = {}
            drawn = 0
            for step, batch in enumerate(epoch_batches(columns, recipe, generator)):
                for one, name in zip(optimizers, recipes, strict=True):
                    rate = recipes[name].learning_rate(epoch * steps + step, steps, recipe.epochs)
                    for group in one.param_groups:
                        _set_rate(group, rate)
                drawn += len(batch["index"])
                figures = update(batch)
                for name, value in figures.items():
                    # Summed on the device: reading a value back each step would stall it.
                    sums[name] = sums[name] + value if name in sums else value
            means = {name: float(value) / steps for name, value in sums.items()}
            if not isfinite(means["loss"]):
                raise BdcoreError(
                    f"{phase}: the loss is no longer finite in epoch {epoch + 1} of {recipe.epochs}. Lower the "
                    f"learning rate (now at most {recipe.lr:g}) or use --precision fp32."
                )
            ended = bool(on_epoch(epoch, means)) if on_epoch else False
            last = ended or epoch + 1 == recipe.epochs
            if path and (last or perf_counter() - saved > _SECONDS_BETWEEN_CHECKPOINTS):
                done = {"recipe": identity, "epochs": epoch + 1, "ended": ended}
                save_checkpoint(path, module, optimizers, done, context)
                saved = perf_counter()
            now = perf_counter()
            left = 0.0 if last else (now - started) / (epoch + 1 - first) * (recipe.epochs - epoch - 1)
            context.report(Progress(phase, epoch + 1, recipe.epochs, means, drawn / (now - began), left))
    return optimizers[0]


def forward_batches(
    function: Callable[[Tensor], Tensor], images: Tensor, context: Context, batch_size: int = 500
) -> Tensor:
    """`function` over uint8 [N, C, H, W] images in batches, without gradients, concatenated on `context.device`.

    In fp32 whatever the precision of training: what is computed here is kept (features) or published (scores).
    """
    with torch.no_grad():
        outputs = [function(_resident(part, context.device)) for part in images.split(batch_size)]
    return torch.cat(outputs)


def frozen_copy(model: nn.Module, context: Context) -> nn.Module:
    """A copy in eval mode whose weights need no gradient, laid out for speed: for methods that only read a model."""
    copied = copy.deepcopy(model).to(context.device).eval().requires_grad_(False)
    _prepare(copied, context)
    return copied


def _resident(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).contiguous(memory_format=torch.channels_last)


def _seed(device: torch.device, seed: int) -> None:
    """Seed what dropout inside models draws from, and no other device, which `fork_rng` would not restore."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _optimizers(
    module: nn.Module, recipes: Mapping[str, Recipe], optimizer: torch.optim.Optimizer | None
) -> list[torch.optim.Optimizer]:
    """An optimiser a recipe: the first for what no part holds."""
    children = dict(module.named_children())
    parts = [name for name in recipes if name]
    absent = [name for name in parts if name not in children]
    if absent:
        raise ValueError(f"fit: part {absent[0]!r} is no child of {type(module).__name__}; it has {sorted(children)}")
    taken = {parameter for name in parts for parameter in children[name].parameters()}
    rest = [parameter for parameter in module.parameters() if parameter not in taken]
    main = recipes[""].optimizer_for(rest)
    if optimizer is not None:
        main = _continued(optimizer, main)
    return [main, *(recipes[name].optimizer_for(children[name].parameters()) for name in parts)]


def _continued(earlier: torch.optim.Optimizer, new: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The earlier optimiser with the options of the new one."""
    (old,), (group,) = earlier.param_groups, new.param_groups
    same = len(old["params"]) == len(group["params"]) and all(map(operator.is_, old["params"], group["params"]))
    if type(earlier) is not type(new) or not same:
        raise ValueError("fit: an optimizer can only go on over the parameters it had, and under a recipe of its kind")
    old.update({name: value for name, value in group.items() if name != "params"})
    return earlier


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # a recorded step reads it from there
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _step(
    batch: Batch,
    loss: Callable[[Batch], Tensor | dict[str, Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    context: Context,
) -> dict[str, Tensor]:
    """One update; returns the batch's figures, detached."""
    with torch.autocast(context.device.type, torch.bfloat16, enabled=context.precision == "bf16"):
        result = loss(batch)
    figures = result if isinstance(result, dict) else {"loss": result}
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    figures["loss"].backward()
    for optimizer in optimizers:
        optimizer.step()
    return {name: value.detach() for name, value in figures.items()}


def _prepare(module: nn.Module, context: Context) -> None:
    """Lay convolutions out channels-last (faster on CPUs and GPUs alike), and compile where asked."""
    for part in module.modules():
        if isinstance(part, Classifier):
            part.to(memory_format=torch.channels_last)
            if context.compile:
                part.net.compile()
