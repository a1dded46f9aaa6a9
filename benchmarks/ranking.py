"""Seconds in which ABL ranks 50,000 images of 32 x 32 by the loss of WRN-16-1, beside the usual loop.

The peer is the ranking of ABL's released code (Li et al., "Anti-Backdoor Learning", NeurIPS 2021,
github.com/bboylyg/ABL, backdoor_isolation.py), written anew after it: a list of images, a DataLoader that turns one at
a time into a tensor, a forward pass of one image, its loss read back, at last a sort of all. It goes over a part of the
images, and its time is extrapolated: every image takes as long as any other. What the released code does afterwards, a
second pass to copy the isolated images, is not counted.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from bdcore import Labelled, build
from bdcore.context import Context
from bdcore_plugins.datasets.npz import Npz
from bdcore_plugins.defenses.abl import rank
from benchmarks import report
from benchmarks.training_epoch import ARCH, CPU, ToTensorEach, alone, noise

RATE = 0.01
OURS = "bdcore"
PEER = "ABL's ranking, as released"


def main() -> None:
    """Time both in turn, several rounds of it, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="x_train and y_train to use; default: noise")
    parser.add_argument("--images", type=int, default=50_000, metavar="N")
    parser.add_argument("--peer-images", type=int, default=2_000, metavar="N", help="how many of them the peer ranks")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = Npz(Npz.Config()).load(str(given.data)).train if given.data else noise(given.images)
    data = data.select(torch.arange(given.images))
    part = data.select(torch.arange(given.peer_images))
    if not agree(part):
        raise SystemExit("the two rankings isolate other images: there is nothing to compare")

    contestants: dict[str, tuple[Callable[[Labelled], float], Labelled]] = {
        OURS: (time_bdcore, data),
        PEER: (time_peer, part),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(given.rounds):
        for name, (contest, images) in contestants.items():
            seconds[name].append(alone(contest, images, given.threads))
            print(f"round {number + 1}: {name}: {seconds[name][-1]:.2f} s, {len(images)} images", file=sys.stderr)

    released = median(seconds[PEER]) / given.peer_images
    rows: list[dict[str, str]] = []
    for name, (_, images) in contestants.items():
        scale = given.images / len(images)
        taken = [scale * value for value in seconds[name]]
        rows.append(
            {
                "ranking": name,
                "seconds, median": f"{median(taken):.1f}",
                "lowest": f"{min(taken):.1f}",
                "highest": f"{max(taken):.1f}",
                "images/s": f"{given.images / median(taken):,.0f}",
                "times faster than the released code": f"{released * given.images / median(taken):.2f}",
            }
        )
    notes = [
        f"Median of {given.rounds} rounds; the two take turns, each in a process of its own after a warm-up. fp32.",
        f"The released code ranks {given.peer_images:,} of {given.images:,} images, one at a time; its seconds are "
        "extrapolated from these.",
        f"On these both isolate the same {int(RATE * given.peer_images):,}.",
        "Images: " + (given.data.name if given.data else "random, of the same shape"),
    ]
    title = f"Ranking {given.images:,} images by the loss of WRN-16-1"
    report.write("ranking", title, {"Seconds": rows}, notes, seconds=seconds, seeds=[0])


def time_bdcore(data: Labelled) -> float:
    """Seconds that the plugin takes, its choice of the lowest included."""
    model, count = build(ARCH, 0), int(RATE * len(data))
    began = perf_counter()
    rank(model, data, count, Context(device=CPU))
    return perf_counter() - began


def time_peer(data: Labelled) -> float:
    """Seconds of the usual loop; the list of images and the model are made before the clock starts."""
    loader = _one_at_a_time(data)
    net = build(ARCH, 0).net.eval()
    began = perf_counter()
    _released_order(net, loader)
    return perf_counter() - began


def agree(data: Labelled) -> bool:
    """Whether both isolate the same images, with one network."""
    model, count = build(ARCH, 0).eval(), int(RATE * len(data))
    ours = rank(model, data, count, Context(device=CPU)).index.tolist()
    return set(ours) == set(_released_order(model, _one_at_a_time(data))[:count].tolist())


def _one_at_a_time(data: Labelled) -> DataLoader:
    pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()
    return DataLoader(ToTensorEach(list(zip(pixels, data.labels.tolist(), strict=True))), batch_size=1, shuffle=False)


def _released_order(net: torch.nn.Module, loader: DataLoader) -> np.ndarray:
    losses: list[float] = []
    for image, label in loader:
        with torch.no_grad():
            losses.append(F.cross_entropy(net(image), label).item())
    return np.argsort(np.array(losses))


if __name__ == "__main__":
    main()
