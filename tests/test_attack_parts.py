"""What attacks share: the side of a patch and shares of a batch."""

import pytest
import torch

from bdcore import batch_shares, patch_side

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "height", "width", "side"),
    [(3, 32, 32, 3), (3, 64, 96, 6), (3, 28, 28, 3), (1, 8, 8, 1), (32, 20, 50, 20), (8, 224, 224, 56)],
)
def test_a_patch_scales_with_the_shorter_side(size: int, height: int, width: int, side: int):
    assert patch_side(size, height, width) == patch_side(size, width, height) == side


def test_shares_of_a_batch_are_exact_on_average():
    torch.manual_seed(0)
    counts: list[tuple[int, int]] = []
    for _ in range(4000):
        (few, fewest), (many, most) = batch_shares(128, (0.1, 0.33), CPU)
        assert (fewest, most) == (13, 43)
        assert bool((few <= many).all()), "the larger share holds the smaller"
        for share in (few, many):
            assert torch.equal(share, torch.arange(128) < share.sum()), "the first samples"
        counts.append((int(few.sum()), int(many.sum())))
    assert {count for count, _ in counts} == {12, 13}
    assert {count for _, count in counts} == {42, 43}
    mean = torch.tensor(counts).double().mean(0)
    assert mean.tolist() == pytest.approx([12.8, 42.24], abs=0.03)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 4), (1.0, 16)])
def test_whole_shares_are_not_random(share: float, count: int):
    for _ in range(20):
        ((mask, most),) = batch_shares(16, (share,), CPU)
        assert int(mask.sum()) == most == count
