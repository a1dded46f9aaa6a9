"""Every operator once, forward and backward, on small odd shapes: what compute-sanitizer watches."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bdcore import ops


def main() -> None:
    """Run all cases and say which."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", metavar="DEVICE")
    device = torch.device(parser.parse_args().device)
    for dtype in (torch.float32, torch.bfloat16):
        for name, function, tensors in cases(dtype):
            # Made on the CPU and only copied, so that hardly a kernel runs but the operators'.
            leaves = [tensor.to(device).requires_grad_(tensor.is_floating_point()) for tensor in tensors]
            result = function(*leaves)
            if result.requires_grad:
                result.backward(torch.ones(result.shape, dtype=result.dtype).to(device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            print(f"{name}, {dtype}: {list(result.shape)}")


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Name, function and its tensors, floating-point ones with a gradient."""
    generator = torch.Generator().manual_seed(0)
    choose = partial(torch.randint, generator=generator)

    def rand(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.rand(shape, generator=generator).to(of)

    for batch, width in ((7, 33), (33, 256), (3, 1025)):
        loss = partial(ops.model_contrastive_loss, temperature=0.5)
        yield "model_contrastive_loss", loss, [rand(batch, width), rand(batch, width), rand(batch, 3, width)]
        loss = partial(ops.info_nce, temperature=0.1)
        yield "info_nce", loss, [rand(batch, width), rand(65, width), choose(65, (batch,))]
        loss = partial(ops.isolation_loss, gamma=3.0, reduction="mean")
        yield "isolation_loss", loss, [rand(batch, width), choose(width, (batch,))]
    for k, number in ((5, 33), (100, 5000)):
        yield "lowest_k", lambda losses, k=k: ops.lowest_k(losses.detach(), k), [rand(number, of=torch.float32)]

    for channels in (3, 20, 64):
        tensors = [rand(9, channels, 5, 7), rand(channels, of=torch.float32), rand(channels, of=torch.float32)]
        for training in (False, True):
            yield "batch_norm_relu", partial(_normalise, training=training), tensors

    normalised = {"mean": MEAN, "std": STD, "out_dtype": dtype}
    pattern, mask = rand(2, 3, 5, 4, of=torch.float32), rand(2, 1, 5, 4, of=torch.float32)
    index, offset = choose(2, (9,)) - choose(2, (9,)), choose(3, (9, 2))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        pixels = choose(256, (9, 3, 7, 33), dtype=torch.uint8).contiguous(memory_format=memory_format)
        images = rand(9, 3, 7, 33).contiguous(memory_format=memory_format)
        blend = partial(_blend, **normalised)
        yield "blend_trigger", blend, [images, pattern, mask, index, offset]
        yield "blend_trigger of uint8", blend, [pixels, pattern, mask, index, offset]
        load = partial(ops.load_batch, crop=2, flip=True, cutout=3, **normalised)
        yield "load_batch", load, [pixels, choose(9, (17,))]


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def _blend(images: Tensor, pattern: Tensor, mask: Tensor, index: Tensor, offset: Tensor, **options: object) -> Tensor:
    return ops.blend_trigger(images, pattern, mask, index=index, offset=offset, **options)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    mean, variance = torch.zeros_like(bias).detach(), torch.ones_like(weight).detach()
    return ops.batch_norm_relu(x, mean, variance, weight, bias, training)


if __name__ == "__main__":
    main()
