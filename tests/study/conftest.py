"""Of the tests of studies: their pages are about other things than pictures."""

import pytest


@pytest.fixture(autouse=True)
def without_pictures(unrendered):
    pass
