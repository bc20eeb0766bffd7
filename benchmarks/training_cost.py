"""What masks cost of a training step in which none is refreshed: `python -m benchmarks.training_cost`.

Layers of BERT-base on a CPU, dense and masked in turn, in CPU time: where other programs share the machine, that is
what a step costs. Memory is what PyTorch allocates during a step, beyond what there is before.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.environment import header, pin_threads
from benchmarks.marks import write_between_marks
from benchmarks.report import markdown, significant
from benchmarks.training_step import Case, bert_base
from masksolve._cores import usable_cores

if TYPE_CHECKING:
    from torch import nn

_MARK = "training-cost"
# The masked step as a multiple of the dense one.
_GOAL = 1.05


class Parts(NamedTuple):
    """CPU seconds of a step: of its parts, or shares of them."""

    forward: float
    backward: float
    optimizer: float
    whole: float


def main() -> None:
    """Measure, print, and write the table between the marks of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_cost", description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of PyTorch (all)")
    parser.add_argument("--sequences", type=int, default=8, help="batch, of 128 tokens each (8)")
    parser.add_argument("--layers", type=int, default=4, help="of BERT-base's 12 (4)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind (15)")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"replace what stands between the marks {_MARK!r}")
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    case = bert_base(arguments.sequences, arguments.layers)
    columns = ["gradient", f"step (goal ≤ {_GOAL:g})", "forward", "backward", "optimizer", "masking alone"]
    columns += ["peak memory, dense", "masked", "masked copies"]
    text = (
        f"{markdown(columns, rows(case, arguments.rounds))}\n\n"
        f"Masked against dense, medians of {arguments.rounds} steps of each in turn, {arguments.layers} layers, "
        f"{case.described}. Masking alone: every mask multiplied with its weight once, as a share of the dense step. "
        "Masked copies: those of all layers, which the backward pass needs as it needs the weights of a dense model. "
        "The optimizer is AdamW: PyTorch's square root is many times slower "
        "at zero on this CPU, and second moments are zero where `masked` prunes. "
        f"Load average at the end: {os.getloadavg()[0]:.1f}.\n\n{header(arguments.threads)}"
    )
    print(text)
    if arguments.write:
        write_between_marks(arguments.write, _MARK, text)


def rows(case: Case, rounds: int) -> list[list[str]]:
    """One row per gradient."""
    import torch

    from masksolve.torch import Sparsifier
    from masksolve.torch._training.masking import GRADIENTS, Held, masked_parameter, masked_product

    models, held = {"dense": copy.deepcopy(case.model)}, list[Held]()
    for gradient in GRADIENTS:
        models[gradient] = copy.deepcopy(case.model)
        report = Sparsifier(models[gradient], "4:8", refresh_every=None, gradient=gradient).report
        places = [line.name.rpartition(".") for line in report if line.sparse]
        found = [masked_parameter(models[gradient].get_submodule(path), name) for path, _, name in places]
        held = [each for each in found if each is not None]
    steps = {name: training(model, case) for name, model in models.items()}

    def mask_all() -> float:
        start = time.process_time()
        with torch.no_grad():
            for weight, masked in held:
                masked_product(weight, masked.mask)
        return time.process_time() - start

    for step in (*steps.values(), mask_all):
        step()
    taken: dict[str, list[Parts]] = {name: [] for name in steps}
    alone = []
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(step())
        alone.append(mask_all())
    peaks = {name: peak(step) for name, step in steps.items()}
    copies = sum(weight.nbytes for weight, _ in held)
    share = statistics.median(one / dense.whole for one, dense in zip(alone, taken["dense"], strict=True))
    lines = []
    for gradient in GRADIENTS:
        pairs = list(zip(taken[gradient], taken["dense"], strict=True))
        ratios = Parts._make(
            statistics.median(one[part] / dense[part] for one, dense in pairs) for part in range(len(Parts._fields))
        )
        verdict = "met" if ratios.whole <= _GOAL else "MISSED"
        line = [f"`{gradient}`", f"{ratios.whole:.3f}× ({verdict})"]
        line += [f"{each:.3f}×" for each in (ratios.forward, ratios.backward, ratios.optimizer)]
        line += [f"{share:.3f}", *(f"{significant(each / 2**20)} MiB" for each in (peaks["dense"], peaks[gradient]))]
        lines.append([*line, f"{significant(copies / 2**20)} MiB"])
    return lines


def training(model: nn.Module, case: Case) -> Callable[[], Parts]:
    """Return what takes a step and says how long its parts took."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> Parts:
        times = [time.process_time()]
        loss = model(case.batch).square().mean()
        times.append(time.process_time())
        loss.backward()
        times.append(time.process_time())
        optimizer.step()
        times.append(time.process_time())
        optimizer.zero_grad()
        return Parts._make([*(end - start for start, end in pairwise(times)), times[-1] - times[0]])

    return step


def peak(step: Callable[[], object]) -> int:
    """Return the most bytes that PyTorch held at a time, beyond those before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler
    assert results is not None
    events = [each for each in results.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())), default=0)


if __name__ == "__main__":
    main()
