"""Seconds of one training epoch of WRN-16-1 on 50,000 images of 32 x 32, beside the usual loop.

The peer is the training loop of ABL's released code (Li et al., "Anti-Backdoor Learning", NeurIPS 2021,
github.com/bboylyg/ABL, backdoor_isolation.py and data_loader.py), written anew after it: a list of images, one
`ToTensor` an image in the DataLoader, batches of 64 in the order of the data, no augmentation, fp32, SGD with Nesterov
momentum 0.9 and weight decay 1e-4, local gradient ascent on the loss, loss and top-1 and top-5 accuracy read back each
batch. Its DataLoader has no workers, PyTorch's default. All contestants train the same network; bdcore's crop and flip.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from bdcore import Architecture, Labelled, Recipe, build
from bdcore.context import Context
from bdcore.stages.train import train
from bdcore.training.precision import Precision, choose_precision
from bdcore_plugins.datasets.npz import Npz
from benchmarks import report

ARCH = Architecture("wrn16_1", 10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CPU = torch.device("cpu")
PEER = "ABL's loop, as released"


def main() -> None:
    """Time all contestants in turn, several rounds of it, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="x_train and y_train to use; default: noise")
    parser.add_argument("--images", type=int, default=50_000, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = Npz(Npz.Config()).load(str(given.data)).train if given.data else noise(given.images)
    data = data.select(torch.arange(given.images))

    auto = choose_precision("auto", CPU)
    contestants: dict[str, Callable[[Labelled], float]] = {
        f"bdcore, precision auto ({auto})": partial(time_bdcore, precision=auto),
        "bdcore, fp32": partial(time_bdcore, precision="fp32"),
        PEER: time_peer,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(given.rounds):
        for name, contest in contestants.items():
            seconds[name].append(alone(contest, data, given.threads))
            print(f"round {number + 1}: {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)

    released = median(seconds[PEER])
    rows = [
        {
            "loop": name,
            "seconds, median": f"{median(taken):.1f}",
            "lowest": f"{min(taken):.1f}",
            "highest": f"{max(taken):.1f}",
            "images/s": f"{given.images / median(taken):,.0f}",
            "times faster than the released loop": f"{released / median(taken):.2f}",
        }
        for name, taken in seconds.items()
    ]
    title = f"One training epoch of WRN-16-1 on {given.images:,} images"
    notes = [
        f"Median of {given.rounds} rounds; the contestants take turns, each in a process of its own after a warm-up.",
        "bdcore crops and flips, batches of 128; ABL's loop does not augment, batches of 64.",
        "Images: " + (given.data.name if given.data else "random, of the same shape"),
    ]
    report.write("training_epoch", title, {"Seconds": rows}, notes, seconds=seconds, seeds=[0])


def alone(contest: Callable[[Labelled], float], data: Labelled, threads: int) -> float:
    """Seconds of `contest` in a process of its own, as its user would run it, after a warm-up on a few batches.

    In one process they would share an allocator, whose state one contestant's loop changes for the next.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_warm_then_time, contest, data, threads).result()


def _warm_then_time(contest: Callable[[Labelled], float], data: Labelled, threads: int) -> float:
    torch.set_num_threads(threads)
    contest(data.select(torch.arange(min(2_560, len(data)))))
    return contest(data)


def time_bdcore(data: Labelled, precision: Precision) -> float:
    """Seconds of one epoch as a run trains its victim, building the model included."""
    recipe = Recipe(epochs=1, batch_size=128, crop=4, flip=True, schedule="constant")
    began = perf_counter()
    train(data, ARCH, recipe, Context(device=CPU, precision=precision))
    return perf_counter() - began


def time_peer(data: Labelled) -> float:
    """Seconds of one epoch of the usual loop; the list of images and the model are made before the clock starts."""
    pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()
    images = list(zip(pixels, data.labels.tolist(), strict=True))
    loader = DataLoader(ToTensorEach(images), batch_size=64, shuffle=False)
    net = build(ARCH, 0).net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    began = perf_counter()
    sums = [0.0, 0.0, 0.0]
    for batch, labels in loader:
        logits = net(batch)
        entropy = F.cross_entropy(logits, labels)
        loss = torch.sign(entropy - 0.5) * entropy
        ranked = logits.topk(5).indices == labels[:, None]
        for place, figure in enumerate((loss, ranked[:, :1].sum(), ranked.sum())):
            sums[place] += figure.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return perf_counter() - began


class ToTensorEach(Dataset):
    """A data set that turns one image at a time into a tensor."""

    def __init__(self, images: list) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return to_tensor(image), label


def noise(images: int) -> Labelled:
    """Random images of ten classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Labelled(pixels, torch.randint(0, 10, (images,), generator=generator))


if __name__ == "__main__":
    main()
