"""One test for each contender of each group: `pytest benchmarks --benchmark-only`, timed by pytest-benchmark, one after the other."""

from typing import Any

import pytest

from benchmarks.measure import Contender, Group, Run, UnavailableError


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" in metafunc.fixturenames:
        pairs = [(group, contender) for group in metafunc.module.GROUPS for contender in group.contenders]
        metafunc.parametrize(("group", "contender"), pairs, ids=[f"{group.title}: {contender.label}" for group, contender in pairs])


@pytest.fixture
def run(group: Group, contender: Contender) -> Run:
    """What is timed; a test of one that is not here is left out before `benchmark` is set up, which wants to be used."""
    try:
        return group.validate(contender)
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def time_contender(run: Run, benchmark: Any, group: Group, contender: Contender) -> None:
    benchmark.group = f"{group.title}, one run being {contender.work:g} x one {group.unit}"  # only equal runs are compared
    with contender.around():
        benchmark(run)
