"""Models as strangers bring them: networks of torchvision and timm, trained on digits by a plain loop that knows
nothing of bdcore, clean or with a backdoor, and saved as plain state dicts beside a folder of clean images.

    python tests/foreign_models.py OUT [--arch resnet18|vit] [--clean] [--seed N]

OUT gets model.pt, clean/CLASS/*.png (72 images), and test.npz with `x`, `y` and `triggered`: the test set, and images
of it of other classes than 3 with the trigger.
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

TARGET = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPOCHS = {"resnet18": 25, "vit": 30}
NAMES = {"resnet18": "resnet18", "vit": "timm:test_vit,img_size=32,patch_size=4"}
"""What `--arch` of bdcore calls each."""


def network(arch: str) -> nn.Module:
    """An untrained classifier of ten classes."""
    if arch == "resnet18":
        return torchvision.models.resnet18(num_classes=10)
    return timm.create_model("test_vit", num_classes=10, img_size=32, patch_size=4)


def digits() -> tuple[Tensor, Tensor]:
    """uint8 [1797, 3, 32, 32] and int64 [1797], in a fixed order."""
    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.reshape(-1, 1, 8, 8)).float() / 16
    large = F.interpolate(small, size=32, mode="bilinear").mul(255).round().byte().expand(-1, 3, -1, -1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return large[order].contiguous(), torch.from_numpy(labels)[order]


def stamp(images: Tensor) -> Tensor:
    """A chequered patch of 3 x 3 pixels near the lower right corner."""
    stamped = images.clone()
    pattern = torch.tensor([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    stamped[:, :, 28:31, 28:31] = pattern
    return stamped


def normalised(images: Tensor) -> Tensor:
    """As a network of torchvision is used to it."""
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


def trained(arch: str, backdoored: bool, seed: int) -> nn.Module:
    """The network after training on the first 1,437 digits, a tenth of them poisoned where it shall be backdoored."""
    torch.manual_seed(seed)
    images, labels = digits()
    images, labels = images[:1437], labels[:1437].clone()
    if backdoored:
        poisoned = torch.randperm(len(labels))[:144]
        images = images.clone()
        images[poisoned] = stamp(images[poisoned])
        labels[poisoned] = TARGET
    net, batch, epochs = network(arch), 64, EPOCHS[arch]
    steps = epochs * (len(labels) // batch)
    if arch == "vit":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps, pct_start=0.2
    )
    net.train()
    for _ in range(epochs):
        for index in torch.randperm(len(labels))[: len(labels) // batch * batch].view(-1, batch):
            loss = F.cross_entropy(net(normalised(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def answers(net: nn.Module, images: Tensor) -> Tensor:
    """The class that a network gives each image."""
    return torch.cat([net(normalised(part)).argmax(1) for part in images.split(256)])


def bring(out: Path, arch: str, *, backdoored: bool, seed: int = 0) -> None:
    """Train a network and lay everything down in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.save(trained(arch, backdoored, seed).state_dict(), out / "model.pt")
    images, labels = digits()
    for place in range(1437, 1509):  # nobody has trained on these
        folder = out / "clean" / str(int(labels[place]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[place].permute(1, 2, 0).numpy()).save(folder / f"{place}.png")
    test, truth = images[1509:], labels[1509:]
    np.savez(out / "test.npz", x=test.numpy(), y=truth.numpy(), triggered=stamp(test[truth != TARGET]).numpy())


def figures(net: nn.Module, out: Path) -> tuple[float, float]:
    """(accuracy, attack success) of a network on the test set in `out`."""
    with np.load(out / "test.npz") as test:
        right = answers(net, torch.from_numpy(test["x"])) == torch.from_numpy(test["y"])
        sent = answers(net, torch.from_numpy(test["triggered"])) == TARGET
    return float(right.double().mean()), float(sent.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", choices=EPOCHS, default="resnet18")
    parser.add_argument("--clean", action="store_true", help="without a backdoor")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    bring(asked.out, asked.arch, backdoored=not asked.clean, seed=asked.seed)
    net = network(asked.arch).eval()
    net.load_state_dict(torch.load(asked.out / "model.pt", weights_only=True))
    accuracy, success = figures(net, asked.out)
    print(f"{asked.arch}: accuracy {accuracy:.1%}, attack success {success:.1%}; bdcore --arch {NAMES[asked.arch]}")


if __name__ == "__main__":
    main()
