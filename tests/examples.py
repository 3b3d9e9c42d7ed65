"""How many examples hypothesis tries a property with: many times more under ``pytest -m fuzz``."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

FUZZ_TIMES = int(os.environ.get("FUZZ_TIMES", "50"))
times = 1  # FUZZ_TIMES once conftest.py has seen the marker


def examples(count: int, **more: Any) -> settings:
    """Settings for a test that is quick with ``count`` examples; without a deadline for each."""
    return settings(max_examples=count * times, deadline=None, **more)
