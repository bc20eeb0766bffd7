"""Prune a checkpoint with the workers of a Dask cluster: `python examples/dask_cluster.py`. Needs masksolve[cluster].

The cluster is two processes on this machine. With one of your own, start a scheduler and workers that see the same
files, and pass its address: from Python as here, in a shell by `masksolve prune ... --scheduler tcp://HOST:PORT`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from distributed import LocalCluster
from safetensors.numpy import save_file

from masksolve.checkpoint import check_checkpoint, dask_executor, prune_checkpoint


def main() -> None:
    """Make a checkpoint, prune it, check it."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "dense.safetensors"), Path(folder, "sparse.safetensors")
        layers = {f"layers.{k}.weight": rng.standard_normal((1024, 1024), np.float32) for k in range(8)}
        save_file(layers, source)
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            dask_executor(cluster.scheduler_address, timeout=60) as workers,
        ):
            report = prune_checkpoint(source, target, "4:8", workers=workers)
            checked = check_checkpoint(target, "4:8", workers=workers)
        print(
            f"{len(report.tensors)} tensors pruned, {report.mean_kept_importance:.2%} kept, optimal: {report.optimal}"
        )
        bad = [tensor.name for tensor in checked.tensors if tensor.problem is not None]
        print(f"{len(checked.tensors)} tensors checked, {len(bad)} are not 4:8")
        assert not bad


if __name__ == "__main__":
    main()
