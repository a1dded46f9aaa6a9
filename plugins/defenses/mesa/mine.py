"""Entropy of a generator's patches: their mutual information with the latent, by a neural estimate.

Belghazi, Baratin, Rajeswar, Ozair, Bengio, Courville, Hjelm: "Mutual Information Neural Estimation", ICML 2018,
arXiv 1801.04062. A generator adds no noise of its own, so the entropy of what it makes is the information that a patch
holds on its latent.
"""

from math import log

import torch
from torch import Tensor

NEW_VALUE = 0.001  # what the latest batch weighs in the moving average of E[exp T]


def mutual_information(joint: Tensor, marginal: Tensor) -> Tensor:
    """The Donsker-Varadhan bound, mean T(z, x) - log mean exp T(z', x), in nats.

    Args:
        joint: [S, B], T of patches with the latent that they were made from.
        marginal: [S, B], T of the same patches with another latent.

    Returns:
        [S]; never more than the largest T less the mean log, so that a batch of B cannot show much more than log B.
    """
    return joint.mean(1) - log_mean_exp(marginal)


def statistics_loss(joint: Tensor, marginal: Tensor, log_average: Tensor) -> Tensor:
    """What a statistics network minimises, [S]: its gradient is that of the bound, corrected for the batch's bias.

    The gradient of log mean exp T over a batch is biased: it divides by that batch's mean of exp T. Here it is divided
    by a moving average over batches (Sect. 3.2, eq. 12), which is kept as a logarithm, so that no exponential can
    overflow before it is divided.

    Args:
        joint, marginal: [S, B] as above.
        log_average: [S], logarithm of the moving average; updated in place with this batch.
    """
    with torch.no_grad():
        log_average.copy_(torch.logaddexp(log_average + log(1 - NEW_VALUE), log_mean_exp(marginal) + log(NEW_VALUE)))
    return (marginal - log_average[:, None]).exp().mean(1) - joint.mean(1)


def log_mean_exp(values: Tensor) -> Tensor:
    """log mean exp over the second dimension, [S, B] to [S]."""
    return values.logsumexp(1) - log(values.shape[1])
