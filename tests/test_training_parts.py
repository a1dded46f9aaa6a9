"""Parts of a module with optimisers of their own, and an optimiser that goes on in a second phase."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bdcore import Recipe, fit
from bdcore.context import Context, Progress

PLAIN = {"schedule": "constant", "shuffle": False, "batch_size": 1000, "weight_decay": 0.0}
START, RATES = {"a": 2.0, "b": -3.0}, {"a": 0.1, "b": 0.02}
COLUMNS = {"x": torch.ones(4)}


class Pair(nn.Module):
    """Two numbers, each a child."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in START.items():
            child = nn.Linear(1, 1, bias=False)
            with torch.no_grad():
                child.weight.fill_(value)
            self.add_module(name, child)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Their squares, so that the gradient of w is 2 w."""
        return sum(child.weight.square().sum() for child in self.children()) * batch["x"].mean()

    def values(self) -> dict[str, float]:
        return {name: float(child.weight.detach()) for name, child in self.named_children()}


def test_every_part_follows_its_own_recipe():
    pair = Pair()
    main = Recipe(epochs=3, lr=RATES["a"], momentum=0.5, **PLAIN)
    part = Recipe(epochs=77, lr=RATES["b"], optimizer="adam", betas=(0.0, 0.0), schedule="cosine", weight_decay=0.0)
    fit("t", pair, COLUMNS, pair.loss, main, Context(), parts={"b": part})
    a, velocity = START["a"], 0.0
    for _ in range(3):
        velocity = 0.5 * velocity + 2 * a
        a -= RATES["a"] * velocity
    # Without memory Adam steps by its rate, here along a cosine over the main recipe's three epochs: 1, 3/4, 1/4.
    b = START["b"] + RATES["b"] * (1 + 0.75 + 0.25)
    assert pair.values() == pytest.approx({"a": a, "b": b}, abs=1e-6)


def test_what_a_step_does_not_reach_keeps_its_value_and_momentum():
    """Steps by turns, as a generator and its critic take them."""
    pair, turns = Pair(), iter("abba")

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return pair.get_submodule(next(turns)).weight.square().sum()

    fit("t", pair, COLUMNS, loss, Recipe(epochs=4, lr=0.1, momentum=0.5, **PLAIN), Context())
    for name, value in pair.values().items():
        first = START[name] - 0.1 * 2 * START[name]
        second = first - 0.1 * (0.5 * 2 * START[name] + 2 * first)
        assert value == pytest.approx(second, abs=1e-6)


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match=r"part 'c' is no child of Pair; it has \['a', 'b'\]"):
        fit("t", Pair(), COLUMNS, Pair().loss, Recipe(), Context(), parts={"c": Recipe()})


FIRST = Recipe(epochs=2, lr=0.1, momentum=0.5, **PLAIN)
SECOND = Recipe(epochs=2, lr=0.03, momentum=0.8, **PLAIN)


def two_phases(context: Context) -> Pair:
    pair = Pair()
    optimizer = fit("first", pair, COLUMNS, pair.loss, FIRST, context)
    fit("second", pair, COLUMNS, pair.loss, SECOND, context, optimizer=optimizer)
    return pair


def test_momentum_carries_over_into_a_second_phase():
    values: dict[str, float] = {}
    for name, start in START.items():
        value, velocity = start, 0.0
        for rate, momentum in [(0.1, 0.5)] * 2 + [(0.03, 0.8)] * 2:
            velocity = momentum * velocity + 2 * value
            value -= rate * velocity
        values[name] = value
    assert two_phases(Context()).values() == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_momentum_carries_over_an_interruption(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bdcore.training.loop._SECONDS_BETWEEN_CHECKPOINTS", -1.0)

    class Killed(BaseException):
        pass

    reports: list[Progress] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        if len(reports) == after:
            raise Killed

    with pytest.raises(Killed):
        two_phases(Context(folder=tmp_path, report=report))
    assert two_phases(Context(folder=tmp_path)).values() == two_phases(Context()).values()


@pytest.mark.parametrize("other", ["kind", "parameters"])
def test_an_optimizer_of_something_else_is_refused(other: str):
    pair = Pair()
    optimizer = fit("first", pair, COLUMNS, pair.loss, FIRST, Context())
    recipe = Recipe(optimizer="adam") if other == "kind" else SECOND
    second = pair if other == "kind" else Pair()
    with pytest.raises(ValueError, match="the parameters it had, and under a recipe of its kind"):
        fit("second", second, COLUMNS, second.loss, recipe, Context(), optimizer=optimizer)


def test_parts_resume_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bdcore.training.loop._SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    parts = {"b": Recipe(optimizer="adam", lr=0.05)}

    def train(context: Context, stop: int | None = None) -> Pair:
        pair = Pair()

        def report(progress: Progress) -> None:
            if progress.epoch == stop:
                raise KeyboardInterrupt

        told = Context(folder=context.folder, report=report)
        fit("t", pair, COLUMNS, pair.loss, Recipe(epochs=5, lr=0.1), told, parts=parts)
        return pair

    with pytest.raises(KeyboardInterrupt):
        train(Context(folder=tmp_path), stop=3)
    assert train(Context(folder=tmp_path)).values() == train(Context()).values()
