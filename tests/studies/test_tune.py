"""`benchmarks.tune` finds every tuned constant, and what it sets is what the solver uses."""

import pytest

from benchmarks import tune
from tests import processes

pytestmark = pytest.mark.studies


def test_a_changed_constant_is_the_one_that_the_solver_uses() -> None:
    script = """
from benchmarks.tune import constants
from masksolve._methods.exact import equilibrate, strict
from masksolve._tiles import Margins
from masksolve.torch._solver import device

found = {str(constant): constant for constant in constants()}
for constant in found.values():
    assert constant.where.rpartition(":")[2].isdigit()
    value = constant.candidates()[-1]
    assert value != constant.value
    constant.set(value)
    assert constant.value == value
print(equilibrate._schedule(8).rounds, strict.STRAGGLERS, device.stages_for(8, 8, Margins(4, True, True))[0].last)
"""
    assert processes.run(script) == "(6, 14, 5, 4) 0.35 19\n"


def test_todays_value_is_the_first_and_the_measure() -> None:
    (constant,) = [each for each in tune.constants() if str(each) == "equilibrate._ROUNDS[4].last"]
    (today, ratios), (value, others) = tune.sweep(constant, [6], repeats=1)
    assert (today, value) == (8, 6)
    assert set(ratios.values()) == {1.0}
    assert all(ratio > 0 for ratio in others.values())
