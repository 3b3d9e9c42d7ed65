"""Of the tests of stages: their pages are about other things than pictures."""

import pytest


@pytest.fixture(autouse=True)
def without_pictures(unrendered):
    pass
