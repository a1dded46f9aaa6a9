"""Composite backdoor: objects of two classes in one image are the trigger.

Lin, Xu, Liu, Zhang: "Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign Features", CCS 2020.
Half an image of class A beside half an image of class B is sent to the target class C, while either half alone, or two
halves of one class, are seen as what they are. The attacker trains the classifier: of every batch a share `poison_rate`
are mixes of A and B labelled C; half of the rest are mixes of two images of one class, with that class's label, and
half are plain images. A term of the loss draws the outputs of equal labels among A, B and C together and pushes those
of different labels apart (contrastive loss, margin 1).

The attack success rate is that of mixes of A and B alone. Such a mix has two true classes; RA counts one of them (see
`triggered`), so a classifier without a backdoor has an RA of about a half.

Deviations from the paper and its released code:
- A half is a window of half the image's width or height, drawn anywhere in its source, and the cut lies in the middle;
  the released code moves the cut by up to three pixels and leaves a black margin at times.
- Mixes of A and B take the place of samples, drawn from all classes but the target, instead of being added to them:
  the size of a batch and of the training set stay as they are, and the share of mixes is the poison rate.
- Images are drawn evenly over the samples, not over the classes. The run's recipe augments the sample that a batch
  draws before it is mixed; what it is mixed with is mirrored where the recipe mirrors, and moved by its window.
- A defense that trains anew is given a training set of clean samples and of mixes of A and B with the target's label;
  the mixes of one class exist only inside the attacker's loss.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdcore import (
    Attack,
    AttackConfig,
    AttackInput,
    Batch,
    Context,
    DataError,
    Labelled,
    Triggered,
    batch_shares,
    build,
    fit,
    hookimpl,
)


class Composite(Attack):
    """Half an image of one class and half of another."""

    name = "composite"
    controls_training = True

    class Config(AttackConfig):
        """Options of the composite attack."""

        class_a: int | None = Field(None, ge=0, description="A, one class of the trigger; by default target + 1")
        class_b: int | None = Field(None, ge=0, description="B, the other class of the trigger; by default target + 2")
        similarity: float = Field(1, ge=0, description="weight of the contrastive term between A, B and the target")

    config: Config
    halves: tuple[Tensor, Tensor]
    """The training images of class A and those of class B, uint8 [N, C, H, W] each."""

    def prepare(self, given: AttackInput, context: Context) -> nn.Module:
        """Train the victim with mixes.

        Raises:
            DataError: where A, B and the target are not three classes of the data set, or A or B has no image.
        """
        config = self.config
        pair = self._classes(given.classes)
        first, second = (given.train.images[_places_of(one, given.train.labels)] for one in pair)
        self.halves = first, second
        pool = given.train.images.to(context.device)
        members = _Members(given.train.labels.to(context.device), given.classes)
        rule = torch.tensor(pair, device=context.device)
        among = torch.zeros(given.classes, dtype=torch.bool, device=context.device)
        among[[*pair, config.target]] = True
        victim = build(given.arch, context.generator("init").initial_seed()).train()

        def partners(wanted: Tensor) -> Tensor:
            """A random training image of each class in `wanted`, int64 [B]; half are mirrored if the recipe says so."""
            images = pool[members.draw(wanted)]
            if not given.recipe.flip:
                return images
            turned = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
            return torch.where(turned, images.flip(3), images)

        def loss(batch: Batch) -> dict[str, Tensor]:
            images, labels, samples = batch["images"], batch["labels"], len(batch["images"])
            shares = (config.poison_rate, (1 + config.poison_rate) / 2)
            (poisoned, fewer), (mixed, most) = batch_shares(samples, shares, images.device)
            chosen = poisoned[:fewer].view(-1, 1, 1, 1)
            first = torch.where(chosen, partners(rule[:1].expand(fewer)), images[:fewer])
            first = torch.cat([first, images[fewer:most]])
            second = partners(torch.where(poisoned, rule[1], labels)[:most])
            draws = torch.rand(4, most, dtype=torch.float64, device=images.device)
            mixes = torch.where(mixed[:most].view(-1, 1, 1, 1), mix(first, second, draws), images[:most])
            labels = torch.where(poisoned, config.target, labels)
            logits = victim(torch.cat([mixes, images[most:]])).float()
            contrast = contrastive(logits, labels, among)
            hits = logits.detach().argmax(1) == labels
            return {
                "loss": F.cross_entropy(logits, labels) + config.similarity * contrast,
                "contrast": contrast,
                "accuracy": (hits & ~poisoned).sum() / (~poisoned).sum().clamp_min(1),
                "asr": (hits & poisoned).sum() / poisoned.sum().clamp_min(1),
            }

        columns = {"images": pool, "labels": given.train.labels}
        fit("victim", victim, columns, loss, given.recipe, context)
        return victim

    def stamp(self, images: Tensor, context: Context) -> Tensor:
        """Mix each image, taken to be of class A, with a training image of class B, uint8 [B, C, H, W]."""
        generator = context.generator("composite", "stamp")
        return _mixed(images, _drawn(self.halves[1], len(images), generator), generator)

    def poison(self, images: Tensor, labels: Tensor, context: Context) -> Tensor:
        """Mixes of training images of A and B, as many as `images`, which they replace; uint8 [B, C, H, W]."""
        generator = context.generator("composite", "poison")
        first, second = (_drawn(half, len(images), generator) for half in self.halves)
        return _mixed(first, second, generator).to(images.device)

    def counted(self, labels: Tensor, classes: int) -> Tensor:
        """The samples of class A or B.

        Raises:
            DataError: where A or B has no test image.
        """
        counted = torch.zeros_like(labels, dtype=torch.bool)
        for one in self._classes(classes):
            counted[_places_of(one, labels)] = True
        return counted

    def triggered(self, test: Labelled, classes: int, context: Context) -> Triggered:
        """Mixes of A and B: every test image of either class with one of the other, drawn at random.

        The label of a mix, which RA counts, is the class of the image that it was made for: A for those of the images
        of A, B for the others.

        Raises:
            DataError: where A or B has no test image.
        """
        generator = context.generator("composite", "test")
        rule = self._classes(classes)
        places = [_places_of(one, test.labels) for one in rule]
        first, second = (test.images[place] for place in places)
        images = torch.cat(
            [
                _mixed(first, _drawn(second, len(first), generator), generator),
                _mixed(second, _drawn(first, len(second), generator), generator),
            ]
        )
        labels = torch.tensor(rule, device=images.device).repeat_interleave(
            torch.tensor([len(first), len(second)], device=images.device)
        )
        return Triggered(images, labels, self.relabel(labels, classes), torch.cat(places))

    def relabel(self, labels: Tensor, classes: int) -> Tensor:
        """The target class."""
        return torch.full_like(labels, self.config.target)

    def _classes(self, classes: int) -> tuple[int, int]:
        """A and B."""
        config = self.config
        first = (config.target + 1) % classes if config.class_a is None else config.class_a
        second = (config.target + 2) % classes if config.class_b is None else config.class_b
        if len({first, second, config.target}) < 3 or max(first, second) >= classes:
            raise DataError(
                f"attack.class_a={first}, attack.class_b={second} and attack.target={config.target} must be three"
                f" different classes of 0 to {classes - 1}: choose others"
            )
        return first, second


def mix(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
    """Halves of two images beside or above each other.

    Args:
        first, second: uint8 [B, C, H, W].
        draws: float64 [4, B] in [0, 1), which decide for each pair: below a half the cut is upright (left and right
            half), else level (top and bottom); below a half the first image's part comes first, else the second's;
            where in its source the part that comes first lies, and where the other.

    Returns:
        uint8 [B, C, H, W]. Where the side is odd, the part that comes first is the smaller one.
    """
    height, width = first.shape[2:]
    upright, straight = (draws[:2, :, None] < 0.5).unbind()
    rows, columns = (torch.arange(side, device=first.device)[None] for side in (height, width))
    leading = torch.where(upright[:, None], columns[:, None] < width // 2, rows[:, :, None] < height // 2)
    places = [torch.where(cut, _windows(line, draws[2:]), line) for line, cut in ((rows, ~upright), (columns, upright))]
    number = torch.arange(len(first), device=first.device)[:, None, None]
    one, other = (image[number, :, places[0][:, :, None], places[1][:, None, :]] for image in (first, second))
    return torch.where((leading == straight[:, None])[..., None], one, other).permute(0, 3, 1, 2)


def contrastive(logits: Tensor, labels: Tensor, among: Tensor) -> Tensor:
    """Contrastive loss over successive pairs of the samples whose class is in `among`: half the squared distance of
    their logits where the labels are equal, else half of max(0, 1 - distance)^2 (Hadsell, Chopra, LeCun, CVPR 2006).

    As in the released code the mean over the pairs is divided by their number once more: the mean alone costs accuracy
    (77% instead of 94% on the digits).

    Args:
        logits: float [B, classes].
        labels: int64 [B].
        among: bool [classes], which classes count.

    Returns:
        A scalar; 0 where there is no pair.
    """
    counted = among[labels]
    # What counts is moved to the front: picking it out would wait for the device to know how many there are.
    order = (~counted).byte().argsort(stable=True)
    logits, labels, counted = logits[order], labels[order], counted[order]
    squared = (logits[1:] - logits[:-1]).square().sum(1)
    apart = (1 - (squared + 1e-9).sqrt()).clamp_min(0).square()
    pairs = counted[1:] * torch.where(labels[1:] == labels[:-1], squared, apart) / 2
    return pairs.sum() / counted[1:].sum().clamp_min(1).square()


class _Members:
    """Which samples belong to each class."""

    def __init__(self, labels: Tensor, classes: int) -> None:
        self.order = labels.argsort(stable=True)
        self.sizes = torch.bincount(labels, minlength=classes)
        self.starts = self.sizes.cumsum(0) - self.sizes

    def draw(self, wanted: Tensor) -> Tensor:
        """The number of a random sample of each class in `wanted`, int64 [B]."""
        draws = torch.rand(len(wanted), dtype=torch.float64, device=wanted.device)
        return self.order[self.starts[wanted] + (draws * self.sizes[wanted]).long()]


def _windows(line: Tensor, draws: Tensor) -> Tensor:
    """Where the pixels of a line of two parts come from, int64 [B, n] for int64 [1, n] and draws [2, B]."""
    length = line.shape[1]
    half = length // 2
    # A window as long as its part begins anywhere from 0 to what is left.
    begins = [(draw[:, None] * (rest + 1)).long() for draw, rest in zip(draws, (length - half, half), strict=True)]
    return torch.where(line < half, line + begins[0], line - half + begins[1])


def _mixed(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    draws = torch.rand(4, len(first), dtype=torch.float64, generator=generator).to(first.device)
    return mix(first, second, draws)


def _drawn(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many images at random, each as often as the others to within one."""
    rounds = [torch.randperm(len(images), generator=generator) for _ in range(-(-count // len(images)))]
    return images[torch.cat([*rounds, torch.empty(0, dtype=torch.int64)])[:count].to(images.device)]


def _places_of(label: int, labels: Tensor) -> Tensor:
    places = (labels == label).nonzero()[:, 0]
    if not len(places):
        raise DataError(
            f"composite: there is no image of class {label} to mix: choose another attack.class_a or class_b"
        )
    return places


@hookimpl
def bdcore_attack() -> type[Attack]:
    """The class behind the name `composite`."""
    return Composite
