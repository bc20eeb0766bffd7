"""Hypothesis profiles: the default is the same on every run; `--hypothesis-profile=fuzz` looks for new failures."""

import pytest
from hypothesis import HealthCheck, settings

# The first call of a kernel compiles it, which no deadline or health check should take for slowness.
settings.register_profile(
    "default", max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", parent=settings.get_profile("default"), derandomize=False, max_examples=3000)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    # What PuLP 3.3 calls deprecated is the only way to say it in PuLP 2.9.
    config.addinivalue_line("filterwarnings", "ignore:.*PuLP 4:DeprecationWarning")
