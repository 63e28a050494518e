"""The compiled library under test."""

from pathlib import Path

import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.targets import kernel


@pytest.fixture(scope="session")
def library() -> Path:
    try:
        return kernel.library_path()
    except Misuse as error:
        pytest.skip(error.cause)
