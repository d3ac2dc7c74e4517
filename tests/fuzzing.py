"""How many examples the tests that make up their input try: few and always the same, or many new ones by hand.

`FUZZ_EXAMPLES=10000 python -m pytest tests/recipes/test_fuzz_damage.py` tries so many, other ones at every call.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

BY_HAND = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def examples(count: int) -> settings:
    """Return hypothesis's settings for a test that tries `count` examples in the suite."""
    return settings(
        max_examples=BY_HAND or count,
        derandomize=not BY_HAND,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
