"""Features of a classifier in the plane, and in numbers that the plane cannot distort."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_NEIGHBOURS = 5
_COMPONENTS = 50


def embed(clean: Array, triggered: Array) -> tuple[Array, Array]:
    """Features in the plane by t-SNE, clean and triggered ones together, the same for the same features.

    van der Maaten, Hinton: "Visualizing Data using t-SNE", JMLR 9 (2008); begun from the principal components, of which
    at most 50 are used. Few samples, or ones that are all alike, are shown by their two principal components.

    Args:
        clean, triggered: finite floats [n, D] and [m, D].

    Returns:
        float64 [n, 2] and [m, 2].
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    everything = np.concatenate([clean, triggered])
    centred = everything - everything.mean(0, keepdims=True)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    components = centred @ directions[:_COMPONENTS].T
    # t-SNE needs a multiple of its perplexity of samples, and a first component that is not constant.
    perplexity = min(30.0, (len(everything) - 1) / 3)
    if perplexity < 5 or spread[0] <= 1e-12 * max(1.0, float(np.abs(everything).max())):
        places = np.pad(components[:, :2], ((0, 0), (0, max(0, 2 - components.shape[1]))))
    else:
        with threadpool_limits(
            1
        ):  # a few hundred samples: on a busy machine threads that wait for each other take long
            tsne = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0)
            places = tsne.fit_transform(components).astype(np.float64)
    return places[: len(clean)], places[len(clean) :]


class Company(NamedTuple):
    """Shares of triggered images whose nearest clean ones are mostly of the target class, and of their true class."""

    target: float | None
    own: float


def company(clean: Array, labels: Array, triggered: Array, true: Array, target: int | None) -> Company:
    """Among which clean images the triggered ones lie, in the features themselves.

    Args:
        clean, labels: float [n, D] and int64 [n].
        triggered, true: float [m, D] and int64 [m], their true classes; m >= 1.
        target: the attacker's class, where it is a single one.

    Returns:
        By the majority of the 5 nearest clean images, by cosine; the smaller class number of equals.
    """
    alike = _directions(triggered) @ _directions(clean).T
    nearest = labels[np.argsort(-alike, axis=1, kind="stable")[:, :_NEIGHBOURS]]
    classes = np.unique(labels)
    majority = classes[(nearest[:, :, None] == classes).sum(1).argmax(1)]
    return Company(None if target is None else float((majority == target).mean()), float((majority == true).mean()))


def _directions(values: Array) -> Array:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
