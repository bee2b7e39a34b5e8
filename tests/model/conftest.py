"""Fixtures of the model tests: every parity case, and a record of the worst differences."""

from collections.abc import Callable

import pytest
from parity import CASES, Case, Pair, build
from torch import Tensor

WORST = pytest.StashKey[dict[str, tuple[float, str]]]()


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Every case in turn."""
    return build(request.param)


@pytest.fixture(scope="session")
def pair_named() -> Callable[[str], Pair]:
    """One case by its name."""
    cases: dict[str, Case] = {case.name: case for case in CASES}
    return lambda name: build(cases[name])


@pytest.fixture
def assert_close(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``assert_close(claim, got, want, bound)``: no entry differs by more than ``bound``.

    The worst difference of each claim is printed at the end of ``pytest -v``.
    """
    worst = request.config.stash.setdefault(WORST, {})

    def check(claim: str, got: Tensor, want: Tensor, bound: float) -> None:
        assert got.shape == want.shape, (claim, got.shape, want.shape)
        delta = (got.double() - want.double()).abs()
        assert not delta.isnan().any(), f"{claim}: NaN"
        largest = float(delta.max()) if delta.numel() else 0.0
        note(claim, largest)
        assert largest <= bound, f"{claim}: |difference| {largest:.2e} exceeds {bound:.0e}"

    def note(claim: str, value: float) -> None:
        if value >= worst.get(claim, (-1.0, ""))[0]:
            worst[claim] = (value, request.node.name)

    check.note = note
    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    worst = terminalreporter.config.stash.get(WORST, {})
    if not worst or terminalreporter.verbosity < 0:
        return
    terminalreporter.section("worst differences")
    for claim, (value, node) in worst.items():
        terminalreporter.write_line(f"{value:9.2e}  {claim}  [{node}]")
