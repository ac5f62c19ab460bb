"""Every drill of `tests/drills`, with the number of tries that it has by default."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills import drills, promise

DRILLS = drills()


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_drill(name: str, tmp_path: Path) -> None:
    row = DRILLS[name](tmp_path)
    print(f"{name}: {row.tries} tries: {row.outcome}")
    assert row.tries and row.outcome


@pytest.mark.parametrize("name", DRILLS)
def test_a_drill_says_what_it_holds_the_package_to(name: str) -> None:
    assert promise(DRILLS[name])
