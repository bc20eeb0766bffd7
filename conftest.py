"""Set up every test: Hypothesis profiles, and the extras without which a file is skipped.

The default profile is the same on every run; `--hypothesis-profile=fuzz` looks for new failures.
"""

import gc
import os
from collections.abc import Generator, Iterable

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from tests import extras

# Kernels run in Triton's interpreter, which has to be said before Triton is imported; `make test-gpu` says otherwise.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Threads of OpenMP that wait for work would take the cores from those that have some: with another process beside them,
# tests of models take five times their CPU time. Read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Garbage collection looks at the objects of libraries and thousands of tests, which are none: it need not come often.
gc.set_threshold(10_000)

# The first call of a kernel compiles it, which no deadline or health check should take for slowness.
settings.register_profile(
    "default", max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", parent=settings.get_profile("default"), derandomize=False, max_examples=3000)
settings.load_profile("default")

# Pages have examples; what builds the site has none, and needs Sphinx.
collect_ignore_glob = ["docs/*.py", "docs/_ext/*", "docs/from/*"]

# Extras (or tools) that a file cannot do without, or all files of a folder: tests, and modules and pages with doctests.
# What is not listed here runs with NumPy, Numba, pytest and Hypothesis alone; `make test-core` sees to it.
NEEDS = {
    "README.md": ["torch"],
    "docs/adapters.md": ["torch"],
    "docs/dynamic.md": ["torch"],
    "docs/filters.md": ["torch"],
    "docs/gpu.md": ["torch"],
    "docs/gradients.md": ["torch"],
    "docs/language-models.md": ["torch"],
    "docs/loops.md": ["torch", "transformers", "accelerate", "lightning"],
    "docs/packed.md": ["cli"],
    "docs/permutations.md": ["permute"],
    "docs/soft.md": ["torch"],
    "docs/train.md": ["torch"],
    "docs/traps.md": ["cli", "torch"],
    "masksolve/_methods/flow.py": ["flow"],
    "masksolve/_methods/lp.py": ["lp"],
    "masksolve/checkpoint": ["cli"],
    "masksolve/checkpoint/_adaprune.py": ["transformers"],
    "masksolve/checkpoint/_permute.py": ["permute", "transformers"],
    "masksolve/cli": ["cli"],
    "masksolve/cli/_models.py": ["torch"],
    "masksolve/permute.py": ["permute"],
    "masksolve/torch": ["torch"],
    "masksolve/torch/_permute": ["permute"],
    "masksolve/torch/_solver/kernels.py": ["triton"],
    "masksolve/torch/integrations/lightning.py": ["lightning"],
    "masksolve/torch/integrations/pytorch_lightning.py": ["pytorch_lightning"],
    "masksolve/torch/integrations/transformers.py": ["transformers", "accelerate"],
    "tests/checkpoint": ["cli"],
    "tests/checkpoint/test_adaprune.py": ["transformers"],
    "tests/checkpoint/test_cluster.py": ["cluster"],
    "tests/checkpoint/test_identification.py": ["transformers"],
    "tests/checkpoint/test_permute.py": ["permute", "transformers"],
    "tests/checkpoint/test_selection.py": ["torch", "transformers"],
    "tests/checkpoints.py": ["cli"],
    "tests/cli": ["cli"],
    "tests/cli/test_adaprune.py": ["torch"],
    "tests/cli/test_permute.py": ["permute", "transformers"],
    "tests/studies/test_adaprune.py": ["cli", "lp", "torch", "matplotlib"],
    "tests/studies/test_figures.py": ["cli", "lp", "matplotlib"],
    "tests/studies/test_language_model.py": ["torch", "transformers", "matplotlib"],
    "tests/studies/test_neighbours.py": ["torch", "matplotlib"],
    "tests/studies/test_permutation.py": ["cli", "lp", "permute", "torch", "transformers", "matplotlib"],
    "tests/studies/test_pretraining.py": ["lp", "torch", "matplotlib"],
    "tests/studies/test_training.py": ["lp", "torch", "matplotlib"],
    "tests/studies/test_tune.py": ["torch"],
    "tests/test_permute.py": ["permute"],
    "tests/test_rooms.py": ["grimp"],
    "tests/torch": ["torch"],
    "tests/torch/test_accelerate.py": ["transformers", "accelerate"],
    "tests/torch/test_device.py": ["triton"],
    "tests/torch/test_gpu.py": ["triton"],
    "tests/torch/test_lightning.py": ["lightning", "pytorch_lightning"],
    "tests/torch/test_trainer.py": ["transformers", "accelerate"],
    "tests/torch/test_transformers.py": ["transformers"],
}


Reported = Generator[None, pytest.CollectReport, pytest.CollectReport]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Reported:
    """Skip a file whose extras in NEEDS are not all installed, without importing it; no other file may be skipped."""
    if not isinstance(collector, pytest.File):
        return (yield)
    place = collector.path.relative_to(collector.config.rootpath).as_posix()
    needed = [each for start, listed in NEEDS.items() if f"{place}/".startswith(f"{start}/") for each in listed]
    collect = collector.collect

    def collect_if_installed() -> Iterable[pytest.Item | pytest.Collector]:
        for each in needed:
            extras.need(each)
        return collect()

    collector.collect = collect_if_installed  # type: ignore[method-assign]
    report = yield
    if report.skipped and not needed:
        report.outcome, report.longrepr = "failed", f"{place} is skipped, but NEEDS in conftest.py does not list it"
    return report


@settings(max_examples=1, database=None)
@given(strategies.none())
def draw_once(_: None) -> None:
    """Start Hypothesis."""


def pytest_collection_finish() -> None:
    """Leave what all tests have been given (libraries, thousands of tests) out of every garbage collection."""
    # The first test of Hypothesis asks who refers to its random numbers, which cannot be told once they are left out.
    draw_once()
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the case of a method whose library is not installed."""
    method = getattr(getattr(item, "callspec", None), "params", {}).get("method")
    name = getattr(method, "name", method)
    if name in extras.METHODS:
        extras.need(name)
