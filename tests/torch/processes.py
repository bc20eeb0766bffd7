"""The work of each of two processes for the tests of DDP, FSDP2 and DTensor. Run by `tests.torch.test_distributed`."""

import copy
import datetime
import gc
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.nn.parallel import DistributedDataParallel

from masksolve._tiles import Direction
from masksolve.torch import Sparsifier, add_adapters, merge_adapters
from masksolve.torch._layers import masked_attributes
from masksolve.torch._solver import device
from masksolve.torch._solver import solve as solver
from tests.torch import masked

STEPS = 3
ONE_SIDED: tuple[Direction, ...] = ("rows", "columns")
# Before PyTorch 2.7 its forward asks the CPU for an event, which the CPU has not.
FSDP_RUNS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
# Every scenario, by name; what it returns is saved for the tests to judge.
SCENARIOS: dict[str, Any] = {}
MESHES: list[DeviceMesh] = []


def scenario(function: Any) -> Any:
    SCENARIOS[function.__name__] = function
    return function


def run(rank: int, folder: str) -> None:
    """One process: all scenarios, one after the other; last, the names of the threads that are left of its group."""
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    # On a busy machine one may still import what the other has long imported.
    timeout = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timeout)
    for name, function in SCENARIOS.items():
        try:
            result = function(rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, Path(folder) / f"{name}-{rank}.pt")
        if isinstance(result, str):
            # The other process may wait for this one in vain.
            break
    else:
        # Whoever leaves first would cut the other one off.
        dist.barrier()
    leave()
    torch.save(threads_of_gloo(), Path(folder) / f"threads-{rank}.pt")


def leave() -> None:
    """Destroy the process group, and end its threads.

    They end with the last reference to the group. A thread that outlives it may still hold the tensors of a collective
    that everyone has waited for, and aborts the process when it lets go of them while the interpreter is going
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    # fully_shard keeps the class of every module that it was given; a parametrized module's class keeps the module.
    _fully_shard.cls_to_fsdp_cls.clear()
    # Models may be in cycles, with the traceback of an error that was expected.
    gc.collect()
    for mesh in MESHES:
        # PyTorch's caches of DTensor operations keep every mesh, and the mesh its groups.
        getattr(mesh, "_pg_registry", {}).clear()
    dist.destroy_process_group()


def threads_of_gloo() -> list[str]:
    """The threads that Gloo has in this process, by name; none where the system does not say."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def new_mesh() -> DeviceMesh:
    MESHES.append(init_device_mesh("cpu", (2,)))
    return MESHES[-1]


def net(seed: int = 0) -> nn.Sequential:
    """0.weight shards into whole 1:4 and 3:4 tiles, 2.weight does not, 4.weight is a convolution over one pixel."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.Unflatten(1, (12, 1)),
        nn.Conv1d(12, 16, 1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def batch(step: int) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, sparsifier: Sparsifier, rank: int | None, steps: int = STEPS) -> None:
    """Half of each batch for either process, all of it for a process alone."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(steps):
        x = batch(step) if rank is None else batch(step).chunk(2)[rank]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        sparsifier.step()


def held(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The dense weight and the mask of every masked layer."""
    found = {}
    for name, module in model.named_modules():
        if masked_attributes(module):
            weight, mask = masked.held(module)
            found[name] = weight.detach(), mask
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (whole(weight).clone(), whole(mask).clone()) for name, (weight, mask) in held(model).items()}


class Counted:
    """Notes the shapes that are solved in this process."""

    def __enter__(self) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        self.solve = solver.solve_matrix

        def solve(weights: Any, *arguments: Any, **options: Any) -> Any:
            shapes.append(weights.shape)
            return self.solve(weights, *arguments, **options)

        solver.solve_matrix = solve  # type: ignore[assignment]
        return shapes

    def __exit__(self, *_: object) -> None:
        solver.solve_matrix = self.solve


def with_adapters() -> nn.Module:
    """A sparse model with adapters, B of which is not zero any more."""
    model = net()
    Sparsifier(model, "1:2").finalize()
    add_adapters(model, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    return model


@scenario
def adapters(rank: int) -> dict[str, Any]:
    """The gradients that DDP makes of half a batch in either process."""
    model = DistributedDataParallel(with_adapters())
    model(batch(0).chunk(2)[rank]).square().mean().backward()
    grads = {name: each.grad for name, each in model.module.named_parameters() if each.grad is not None}
    try:
        add_adapters(DistributedDataParallel(net()), 2)
    except ValueError as error:
        return {"grads": grads, "message": str(error)}
    return {"grads": grads, "message": ""}


@scenario
def ddp(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(net(seed=rank))
    with Counted() as shapes:
        sparsifier = Sparsifier(model, "3:4", refresh_every=1)
        train(model, sparsifier, rank)
    record = sparsifier.last_refresh
    found = {"layers": gathered(model.module), "shapes": shapes, "kept": [x.kept_importance for x in record.layers]}
    sparsifier.finalize()
    return {**found, "keys": list(model.module.state_dict())}


@scenario
def ddp_on_device(rank: int) -> dict[str, Any]:
    """Masks as on a GPU, found where the weights lie; but with no rounds, so that the CPU is left with every tile."""
    elsewhere, stages_for = solver._is_solved_where_it_lies, device.stages_for
    solver._is_solved_where_it_lies = lambda scores: True
    device.stages_for = lambda *tile: tuple(replace(stage, last=-1) for stage in stages_for(*tile))
    try:
        with Counted() as shapes:
            model = DistributedDataParallel(net(seed=rank))
            sparsifier = Sparsifier(model, "1:2", refresh_every=1)
            train(model, sparsifier, rank)
    finally:
        solver._is_solved_where_it_lies, device.stages_for = elsewhere, stages_for
    records = sparsifier.last_refresh.layers
    return {"layers": gathered(model.module), "shapes": shapes, "records": records}


@scenario
def ddp_not_finite(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(net())
    sparsifier = Sparsifier(model, "2:4")
    before = gathered(model.module)
    with torch.no_grad():
        for weight, _ in held(model.module).values():
            weight.normal_()
        held(model.module)["2"][0][1, 2] = float("nan")
    try:
        sparsifier.refresh()
        message = ""
    except (ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    after = gathered(model.module)
    return {"message": message, "same": all(torch.equal(before[name][1], after[name][1]) for name in before)}


@scenario
def wrapped_after(rank: int) -> dict[str, Any]:
    model = net(seed=rank)
    sparsifier = Sparsifier(model, "1:4", refresh_every=1)
    train(DistributedDataParallel(model), sparsifier, rank)
    return {"layers": gathered(model)}


def sharded(mesh: DeviceMesh) -> tuple[nn.Sequential, Sparsifier]:
    model = net()
    sparsifier = Sparsifier(model, "3:4", refresh_every=1)
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, sparsifier


def fsdp_trained(rank: int) -> dict[str, Any]:
    model, sparsifier = sharded(new_mesh())
    train(model, sparsifier, rank)
    return {"layers": gathered(model)}


def adapted() -> nn.Sequential:
    model = net()
    Sparsifier(model, "3:4").finalize()
    add_adapters(model, rank=2)
    return model


def fsdp_adapters(rank: int) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    mesh, model = new_mesh(), adapted()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train_adapters(model, rank)
    try:
        merge_adapters(model)
        message = ""
    except RuntimeError as error:
        message = str(error)
    try:
        add_adapters(fully_shard(nn.Linear(8, 8), mesh=mesh), rank=2)
        late = ""
    except ValueError as error:
        late = str(error)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"state": state, "merge": message, "late": late}


def train_adapters(model: nn.Module, rank: int | None) -> None:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.5)
    for step in range(STEPS):
        x = batch(step) if rank is None else batch(step).chunk(2)[rank]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


if FSDP_RUNS_ON_CPU:
    scenario(fsdp_trained)
    scenario(fsdp_adapters)


@scenario
def fsdp(rank: int) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    mesh = new_mesh()
    model, sparsifier = sharded(mesh)
    generator = torch.Generator().manual_seed(rank)
    with Counted() as shapes, torch.no_grad():
        for _ in range(STEPS):
            for weight, _ in held(model).values():
                local = weight.to_local()
                local.add_(torch.randn(local.shape, generator=generator), alpha=0.1)
            sparsifier.refresh()
    found = {"layers": gathered(model), "shapes": shapes, "kept": sparsifier.last_refresh.layers}
    try:
        sparsifier.finalize()
        message = ""
    except RuntimeError as error:
        message = str(error)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        held(model)["0"][0].to_local()[1, 1] = float("nan") if rank == 1 else 0.0
    try:
        sparsifier.refresh()
        not_finite = ""
    except ValueError as error:
        not_finite = str(error)
    try:
        Sparsifier(fully_shard(nn.Linear(8, 8), mesh=mesh), "2:4")
        late = ""
    except ValueError as error:
        late = str(error)
    saved = copy.deepcopy(sparsifier.state_dict())
    flips = {}
    for hysteresis in (1e9, 0.0):
        sparsifier.hysteresis = hysteresis
        with torch.no_grad():
            for weight, _ in held(model).values():
                weight.to_local().copy_(torch.randn(weight.to_local().shape, generator=generator))
        flips[hysteresis] = sum(layer.sad for layer in sparsifier.refresh().layers)
    return {
        **found,
        "flips": flips,
        "finalize": message,
        "state": state,
        "not finite": not_finite,
        "late": late,
        "saved": saved,
    }


@scenario
def one_sided(rank: int) -> dict[str, Any]:
    """Both layers are sharded in halves of 6, in which groups of 4 lie whole only across."""
    found: dict[str, Any] = {}
    for direction in ONE_SIDED:
        torch.manual_seed(rank)
        ddp = DistributedDataParallel(nn.Sequential(nn.Linear(8, 12)))
        Sparsifier(ddp, "3:4", direction=direction)
        found[f"ddp {direction}"] = gathered(ddp.module)

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.Unflatten(1, (12, 1)), nn.ConvTranspose1d(12, 8, 1))
        sparsifier = Sparsifier(model, "3:4", direction=direction)
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=new_mesh())
        with Counted() as shapes, torch.no_grad():
            for weight, _ in held(model).values():
                weight.to_local().add_(torch.randn(weight.to_local().shape))
            sparsifier.refresh()
        found[direction] = gathered(model)
        found[f"shapes {direction}"] = shapes
    return found


@scenario
def tensor_parallel(rank: int) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = new_mesh()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with Counted() as shapes:
        sparsifier = Sparsifier(model, "1:4", refresh_every=1, gradient="sr-ste")
        train(model, sparsifier, None)
    found = {"layers": gathered(model), "shapes": shapes, "sad": [x.sad for x in sparsifier.last_refresh.layers]}
    saved = copy.deepcopy(sparsifier.state_dict())
    flipped = {name: whole(mask).flip(0) for name, mask in saved["masks"].items()}
    sparsifier.load_state_dict({**saved, "masks": flipped})
    found["flipped"] = gathered(model)
    sparsifier.load_state_dict(saved)
    found["loaded"] = gathered(model)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    Sparsifier(plain, "1:4").load_state_dict(saved)
    found["loaded plainly"] = gathered(plain)
    sparsifier.finalize()
    return {**found, "state": {name: whole(value) for name, value in model.state_dict().items()}}


@scenario
def thinned_gradients(rank: int) -> Any:
    """The gradients under DDP, and those of this process alone: of its own data, drawn with its own seed."""
    found = []
    for is_alone in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(8, 16)
        wrapped = model if is_alone else DistributedDataParallel(model)
        Sparsifier(wrapped, "4:8", gradient_sparsity="2:4")
        torch.manual_seed(rank)
        wrapped(torch.randn(12, 8)).square().sum().backward()
        found.append(masked.held(model)[0].grad)
    return {"alone": found[0], "together": found[1]}
