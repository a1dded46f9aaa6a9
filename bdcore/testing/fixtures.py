"""pytest fixtures of the conformance kit; a test that takes one is run once for each of its checks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from bdcore.testing import (
    ATTACK_CHECKS,
    DATASET_CHECKS,
    DEFENSE_CHECKS,
    ConformanceError,
    check_attack,
    check_dataset,
    check_defense,
)


@pytest.fixture(params=list(DEFENSE_CHECKS))
def defense_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """One check of `bdcore.testing.check_defense`, called as that is: defense_check(Mine, settings={"epochs": 1})."""
    return partial(_one, check_defense, request)


@pytest.fixture(params=list(ATTACK_CHECKS))
def attack_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """One check of `bdcore.testing.check_attack`, called as that is: attack_check(Mine)."""
    return partial(_one, check_attack, request)


@pytest.fixture(params=list(DATASET_CHECKS))
def dataset_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """One check of `bdcore.testing.check_dataset`, called as that is: dataset_check(Mine)."""
    return partial(_one, check_dataset, request)


def _one(check: Callable[..., dict[str, str]], request: pytest.FixtureRequest, *arguments: Any, **options: Any) -> None:
    """Run the check that the test is about. Pytest shows the finding itself, not the kit's frames."""
    __tracebackhide__ = True
    try:
        status = check(*arguments, check=request.param, **options)[request.param]
    except ConformanceError as finding:
        pytest.fail(str(finding), pytrace=False)
    verdict, _, remark = status.partition(": ")
    if verdict == "skipped":
        pytest.skip(remark)
    if remark:
        request.node.user_properties.append((request.param, remark))
