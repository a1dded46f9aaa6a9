"""BadNets with MESA's triggers: the patterns of black and white cells, and places drawn for each image."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from bdcore.config import resolve
from bdcore.context import Context
from bdcore.errors import UsageError
from bdcore.plugins import Host
from bdcore_plugins.attacks.badnets import BadNets, black_white


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether a symmetry of the square, with or without inversion, turns one into the other."""
    return any(
        np.array_equal(np.rot90(form if mirror else form.T, turns), other)
        for form in (one, 1 - one)
        for mirror in (True, False)
        for turns in range(4)
    )


def test_the_patterns_are_one_of_each_kind():
    patterns = [np.array(cells) for cells in black_white()]
    # Burnside: fixed patterns of the 16 symmetries; an odd number of cells leaves none fixed where the centre inverts.
    fixed = 2**9 + 2 * 2**3 + 2**5 + 4 * 2**6
    assert len(patterns) == fixed / 16 == 51
    for cells in product((0, 1), repeat=9):
        assert sum(alike(np.array(cells).reshape(3, 3), pattern) for pattern in patterns) == 1


def stamped(images: torch.Tensor, seed: int = 0, **config: object) -> torch.Tensor:
    return BadNets(BadNets.Config(**config)).stamp(images, Context(seed=seed))


@pytest.mark.parametrize("number", [1, 17, 50])
def test_the_number_chooses_the_pattern(number: int):
    image = stamped(torch.full((1, 3, 32, 32), 100, dtype=torch.uint8), pattern="black_white", number=number)
    for channel in image[0]:
        assert channel[-3:, -3:].tolist() == [[255 * cell for cell in row] for row in black_white()[number]]


def test_random_places_are_everywhere_and_whole():
    images = torch.full((9000, 1, 32, 32), 100, dtype=torch.uint8)
    changed = stamped(images, pattern="white", place="random") == 255
    assert torch.equal(changed.flatten(1).sum(1), torch.full((9000,), 9))
    rows, columns = changed.any(3)[:, 0], changed.any(2)[:, 0]
    top, left = rows.int().argmax(1), columns.int().argmax(1)
    assert torch.equal(rows.sum(1), torch.full((9000,), 3)), "three neighbouring rows"
    for corner in (top, left):
        counts = torch.bincount(corner, minlength=30)
        assert len(counts) == 30
        assert chisquare(counts.numpy()).pvalue > 1e-3
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.05
    assert torch.equal(stamped(images, pattern="white", place="random") == 255, changed)
    assert not torch.equal(stamped(images, seed=1, pattern="white", place="random") == 255, changed)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["attack.pattern=black_white", "attack.size=4"], "3 x 3 cells"),
        (["attack.number=4"], "attack.pattern=black_white"),
        (["attack.pattern=black_white", "attack.number=51"], "less than or equal to 50"),
    ],
)
def test_options_that_do_not_go_together(settings: list[str], says: str):
    with pytest.raises(UsageError, match=says):
        resolve(Host(), plugins=["badnets"], settings=settings)
