"""Try the installed package, in an environment without extras: `python -I .ci/try_installed.py [TAG]`."""

import subprocess
import sys
from importlib.metadata import metadata, version
from importlib.resources import files
from pathlib import Path

import numpy as np

import masksolve as ms

checkout = Path(__file__).parents[1]
assert checkout / "masksolve" not in Path(ms.__file__).parents, f"{ms.__file__} is the checkout's"
assert ms.__version__ == version("masksolve") == metadata("masksolve")["Version"]
tag = sys.argv[1] if len(sys.argv) > 1 else ""
assert tag in ("", f"v{ms.__version__}"), f"the tag {tag} is not that of version {ms.__version__}"
assert files(ms).joinpath("py.typed").is_file()

weights = np.random.default_rng(0).standard_normal((40, 72), dtype=np.float32)
mask = ms.solve_matrix(weights, 3, 8)
ms.check_mask(mask, 3, 8, saturated=True)
assert ms.certify(weights, mask, 3, 8).optimal
assert ms.available_methods() == ("exact", "enumerate", "greedy", "two-approx")

done = subprocess.run([sys.executable, "-I", "-m", "masksolve", "methods"], capture_output=True, text=True, check=False)
assert done.returncode != 0, "the command ran without its extra"
assert "pip install 'masksolve[cli]'" in done.stderr, done.stderr
print(f"masksolve {ms.__version__} from {Path(ms.__file__).parent} works")
