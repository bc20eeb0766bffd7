"""The package as a whole: its public face, what it imports, what it does without a library, threads and forks."""

import json
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import masksolve as ms
from conftest import NEEDS
from masksolve.diversity import log2_count
from tests import processes
from tests.extras import EXTRAS, TOOLS, need
from tests.tables import weights_of

# What is installed only on demand or slow to load.
HEAVY = "numba torch ortools scipy pulp highspy ml_dtypes safetensors click rich filelock xxhash distributed"


def test_all_is_the_public_face() -> None:
    of_others = {"TYPE_CHECKING", "Any", "annotations", "import_module"}
    values = {name: getattr(ms, name) for name in dir(ms) if not name.startswith("_") and name not in of_others}
    public = {name for name, value in values.items() if not isinstance(value, types.ModuleType)}
    assert public | {"budget", "diversity", "odds"} == set(ms.__all__)
    assert list(ms.__all__) == sorted(ms.__all__)


# Whoever adds a name, or takes one away, does so here too.
PUBLIC = {
    "masksolve": """Certificate InvalidMaskError MethodNotInstalledError NotInstalledError Pattern available_methods
        budget certify check_mask diversity is_valid_mask odds random_mask solve_block solve_blocks solve_matrix""",
    "masksolve.budget": "Budget LayerBudget choose_patterns kept_by_n spend",
    "masksolve.diversity": "Log2Count bits_per_weight count log2_count mask_diversity",
    "masksolve.permute": "Permutation search",
    "masksolve.odds": """TileOdds choose_pattern choose_patterns group_odds row_odds share_of_groups share_of_rows
        share_of_tiles tile_odds""",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these_and_documented(module: str) -> None:
    found = import_module(module)
    assert found.__all__ == PUBLIC[module].split() == sorted(found.__all__)
    assert [name for name in found.__all__ if not (getattr(found, name).__doc__ or "").strip()] == []


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("budget", None),
        ("checkpoint", "cli"),
        ("diversity", None),
        ("odds", None),
        ("permute", None),
        ("torch", "torch"),
    ],
)
def test_every_public_module_is_an_attribute_without_an_import_of_its_own(
    module: str, extra: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if extra is not None:
        need(extra)
    monkeypatch.delitem(vars(ms), module, raising=False)
    assert getattr(ms, module) is import_module(f"masksolve.{module}")


def test_help_names_every_public_module() -> None:
    folder = Path(ms.__path__[0])
    public = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    public = {name for name in public if not name.startswith("_")} - {"cli", "conversion"}
    named = {line.removeprefix("masksolve.") for line in (ms.__doc__ or "").split() if line.startswith("masksolve.")}
    assert named == public


@pytest.mark.parametrize(
    "result",
    [ms.certify(np.ones((40, 40)), np.tile(np.eye(2), (20, 20)), 1, 2), ms.odds.tile_odds(0.5, 2, 4), log2_count(2, 4)],
    ids=lambda result: type(result).__name__,
)
def test_results_are_frozen_print_on_a_line_and_become_dictionaries(result: Any) -> None:
    (name, *_) = result.to_dict()
    with pytest.raises(FrozenInstanceError):
        setattr(result, name, None)
    assert (
        type(result)(**result.to_dict()) == result == eval(repr(result), vars(import_module(type(result).__module__)))
    )
    assert "\n" not in repr(result)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_importing_the_package_loads_no_library() -> None:
    script = f"import sys, masksolve; print(*[name for name in {['numpy', *HEAVY.split()]} if name in sys.modules])"
    assert processes.run(script) == "\n"


def test_the_former_name_of_odds_warns() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"masksolve\.conversion\.group_odds is masksolve\.odds\.group_odds now"
    ):
        assert ms.conversion.group_odds is ms.odds.group_odds
    with pytest.raises(AttributeError, match=r"'masksolve\.conversion' has no attribute 'weather'"):
        _ = ms.conversion.weather


def test_a_name_that_the_package_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'masksolve' has no attribute 'solve_everything'"):
        _ = ms.solve_everything  # type: ignore[attr-defined]


def test_asking_which_methods_there_are_loads_none_of_their_libraries() -> None:
    script = (
        "import sys, masksolve; masksolve.available_methods(); masksolve.is_valid_mask([[1]], 1, 1);"
        f"print(*[name for name in {HEAVY.split()} if name in sys.modules])"
    )
    assert processes.run(script) == "\n"


def test_the_default_method_loads_no_solver_of_the_others() -> None:
    script = (
        "import sys, masksolve; masksolve.solve_block([[1, 2], [2, 1]], 1, 2);"
        "print(*[name for name in ('torch', 'ortools', 'pulp', 'highspy') if name in sys.modules])"
    )
    assert processes.run(script) == "\n"


def test_all_methods_are_available_where_everything_is_installed() -> None:
    need("flow")
    need("lp")
    assert ms.available_methods() == ("exact", "flow", "lp", "enumerate", "greedy", "two-approx")


@pytest.mark.parametrize(("method", "library"), [("flow", "ortools"), ("lp", "scipy")])
def test_a_method_without_its_library_is_absent_and_names_the_extra(
    method: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert method not in ms.available_methods()
    with pytest.raises(ms.MethodNotInstalledError, match=rf"'{method}' needs {library}.*masksolve\[{method}\]"):
        ms.solve_block([[1, 2], [2, 1]], 1, 2, method=method)
    assert ms.solve_block([[1, 2], [2, 1]], 1, 2).tolist() == [[False, True], [True, False]]


def test_the_pulp_backend_without_pulp_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    need("lp")
    monkeypatch.setitem(sys.modules, "pulp", None)
    assert "lp" in ms.available_methods()
    with pytest.raises(ms.MethodNotInstalledError, match=r"PuLP.*masksolve\[lp\]"):
        ms.solve_block([[1, 2], [2, 1]], 1, 2, method="lp", backend="pulp")
    assert ms.solve_block([[1, 2], [2, 1]], 1, 2, method="lp").tolist() == [[False, True], [True, False]]


def test_without_any_optional_library_everything_else_works() -> None:
    script = """
import sys

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = {"ortools", "scipy", "pulp", "ml_dtypes", "safetensors", "click", "rich", "torch"}
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hide, sys.meta_path)
import numpy as np
import masksolve as ms
weights = np.random.default_rng(0).standard_normal((9, 10))
mask = ms.solve_matrix(weights, 3, 4)
assert ms.is_valid_mask(mask, 3, 4, saturated=True) and ms.certify(weights, mask, 3, 4).optimal
print(*ms.available_methods())
"""
    assert processes.run(script) == "exact enumerate greedy two-approx\n"


def test_the_tests_can_be_collected_without_any_extra() -> None:
    libraries = [*TOOLS, *(name for names in EXTRAS.values() for name in names)]
    script = f"""
import sys
sys.modules.update(dict.fromkeys({libraries}))
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", sys.argv[1]]))
"""
    assert "tests/test_certify.py::" in processes.run(script, Path(__file__).parent)


@pytest.mark.parametrize(
    ("module", "library", "extra"), [("torch", "torch", "torch"), ("checkpoint", "filelock", "cli")]
)
def test_a_module_without_its_library_names_the_extra(module: str, library: str, extra: str) -> None:
    script = f"""
import sys
sys.modules["{library}"] = None
import masksolve
try:
    masksolve.{module}
except masksolve.NotInstalledError as error:
    print(error)
"""
    assert processes.run(script) == (
        f"masksolve.{module} needs {library}, which is not installed; pip install 'masksolve[{extra}]'\n"
    )


def test_the_public_face_of_the_adapter_is_documented() -> None:
    need("torch")
    import masksolve.torch as adapter

    assert list(adapter.__all__) == sorted(adapter.__all__)
    assert all((getattr(adapter, name).__doc__ or "").strip() for name in adapter.__all__)


def test_files_that_are_skipped_without_an_extra_exist() -> None:
    root = Path(__file__).parents[1]
    assert [path for path in NEEDS if not (root / path).exists()] == []


def test_an_error_for_a_missing_library_is_an_import_error() -> None:
    assert issubclass(ms.MethodNotInstalledError, ImportError)


def test_two_python_threads_may_solve_at_once() -> None:
    matrices = [weights_of("uint8", (400, 400), seed) for seed in range(4)]
    expected = [ms.solve_matrix(matrix, 2, 5, threads=1) for matrix in matrices]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            masks = list(pool.map(lambda matrix: ms.solve_matrix(matrix, 2, 5, threads=2), matrices))
            assert all(map(np.array_equal, masks, expected))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_a_forked_process_solves_and_certifies_too() -> None:
    script = """
import os
import numpy as np
import masksolve as ms

weights = np.random.default_rng(0).integers(0, 9, (400, 400))
expected = ms.solve_matrix(weights, 2, 5, threads=2)
child = os.fork()
if child == 0:
    same = (ms.solve_matrix(weights, 2, 5, threads=2) == expected).all()
    os._exit(0 if same and ms.certify(weights, expected, 2, 5).optimal else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), (ms.solve_matrix(weights, 2, 5, threads=2) == expected).all())
"""
    assert processes.run(script) == "0 True\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_a_process_forked_while_a_thread_compiles_solves_too() -> None:
    script = """
import os, signal, threading
import numpy as np
import masksolve as ms
from masksolve import _machine_code

compiles, forked = threading.Event(), threading.Event()

def compile():
    with _machine_code.lock:
        compiles.set()
        forked.wait(0.2)

thread = threading.Thread(target=compile)
thread.start()
compiles.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if ms.solve_block(np.ones((8, 8)), 3, 8).sum() == 24 else 1)
forked.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert processes.run(script) == "0\n"


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for method in ms.available_methods():
        ms.solve_block([[1.5, 2], [2, 1]], 1, 2, method=method)
    if find_spec("pulp"):
        ms.solve_block([[1.5, 2], [2, 1]], 1, 2, method="lp", backend="pulp")
    ms.certify([[1.5, 2], [2, 1]], [[0, 1], [1, 0]], 1, 2)
    assert capfd.readouterr() == ("", "")
