"""Hypothesis profiles: the default is the same on every run; `--hypothesis-profile=fuzz` looks for new failures."""

import os

from hypothesis import HealthCheck, settings

# Kernels run in Triton's interpreter, which has to be said before Triton is imported; `make test-gpu` says otherwise.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The first call of a kernel compiles it, which no deadline or health check should take for slowness.
settings.register_profile(
    "default", max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", parent=settings.get_profile("default"), derandomize=False, max_examples=3000)
settings.load_profile("default")
