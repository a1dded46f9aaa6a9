"""Images of one's own: a folder, a .npz file or a torchvision data set, in one form."""

from bdcore.samples.arrays import read_npz
from bdcore.samples.reading import Samples, read_samples

__all__ = ["Samples", "read_npz", "read_samples"]
