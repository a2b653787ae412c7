"""Fixtures that make the tests' own world."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; a test that needs it is skipped elsewhere."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared data beside this checkout")
    return SHARED
