"""Two processes over gloo: DDP, FSDP2 and tensor parallelism."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from masksolve._tiles import Direction
from masksolve.torch import Sparsifier, merge_adapters
from tests import oracle
from tests.torch import processes as torch_processes
from tests.torch.processes import STEPS, net, train

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes, which have ended by now, saved what they found."""
    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.spawn(torch_processes.run, (str(folder),), nprocs=2, join=False)
    done = context.join(timeout=120)
    while not done:
        done = context.join(timeout=120)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """The findings of both processes, for every scenario."""
    found = {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
        for name in torch_processes.SCENARIOS
        if Path(folder / f"{name}-0.pt").exists()
    }
    for name, results in found.items():
        for result in results:
            assert not isinstance(result, str), f"{name}:\n{result}"
    return found


def test_no_thread_outlives_the_process_group(results: Results, folder: Path) -> None:
    """One that does may abort its process as it exits; that something of ours keeps the group would show here too."""
    assert all(results.values())
    for rank in range(2):
        assert torch.load(folder / f"threads-{rank}.pt") == []


def matrix(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.flatten(1).numpy()


def same_on_both(results: list[dict[str, Any]]) -> bool:
    first, second = (result["layers"] for result in results)
    return all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))


def alone(pattern: str) -> nn.Module:
    """The same training in one process."""
    model = net()
    train(model, Sparsifier(model, pattern, refresh_every=1), None)
    return model


def assert_trained_as(expected: nn.Module, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (weight, mask) in torch_processes.held(expected).items():
        torch.testing.assert_close(layers[name][0], weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(layers[name][1], mask)


def test_under_ddp_both_processes_have_the_masks_of_one(results: Results) -> None:
    assert same_on_both(results["ddp"])
    assert_trained_as(alone("3:4"), results["ddp"][0]["layers"])
    for weight, mask in results["ddp"][0]["layers"].values():
        assert oracle.is_optimal(matrix(weight), matrix(mask), 3, 4)


def test_under_ddp_masks_of_a_device_are_shared_like_those_of_the_cpu(results: Results) -> None:
    assert same_on_both(results["ddp_on_device"])
    assert_trained_as(alone("1:2"), results["ddp_on_device"][0]["layers"])
    first, second = (result["records"] for result in results["ddp_on_device"])
    assert first == second
    assert [layer.solved_on_cpu for layer in sorted(first, key=lambda layer: layer.name)] == [32, 48, 48, 16]
    assert not any(result["shapes"] for result in results["ddp_on_device"])


def test_under_ddp_adapters_get_the_gradients_of_the_whole_batch(results: Results) -> None:
    model = torch_processes.with_adapters()
    model(torch_processes.batch(0)).square().mean().backward()
    expected = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert all("lora" in name for name in expected)
    for result in results["adapters"]:
        torch.testing.assert_close(result["grads"], expected)
        assert "would not see adapters that come later; add them first, then wrap" in result["message"]


def test_under_ddp_every_tensor_is_solved_once(results: Results) -> None:
    shapes = [result["shapes"] for result in results["ddp"]]
    assert all(shapes)
    expected = [(16, 8), (12, 16), (1, 1, 16, 12), (4, 16)] * (STEPS + 1)
    assert sorted(map(str, shapes[0] + shapes[1])) == sorted(map(str, expected))


def test_under_ddp_both_processes_report_the_same(results: Results) -> None:
    first, second = (result["kept"] for result in results["ddp"])
    assert first == second
    assert len(first) == 4
    assert all(result["keys"] == list(net().state_dict()) for result in results["ddp"])


def test_under_ddp_a_weight_that_is_not_finite_stops_both_processes(results: Results) -> None:
    messages = sorted(result["message"] for result in results["ddp_not_finite"])
    assert messages[0].startswith("RuntimeError: process ")
    assert all("parameter '2.weight': [1, 2] is nan" in message for message in messages)
    assert messages[1].startswith("ValueError: parameter")
    assert all(result["same"] for result in results["ddp_not_finite"])


def test_a_model_that_is_wrapped_after_has_the_same_masks_everywhere_too(results: Results) -> None:
    assert same_on_both(results["wrapped_after"])
    assert_trained_as(alone("1:4"), results["wrapped_after"][0]["layers"])


@pytest.mark.skipif(not torch_processes.FSDP_RUNS_ON_CPU, reason="FSDP2 trains on the CPU from PyTorch 2.7 on")
def test_under_fsdp_both_processes_have_the_masks_of_one(results: Results) -> None:
    assert same_on_both(results["fsdp_trained"])
    assert_trained_as(alone("3:4"), results["fsdp_trained"][0]["layers"])


@pytest.mark.skipif(not torch_processes.FSDP_RUNS_ON_CPU, reason="FSDP2 trains on the CPU from PyTorch 2.7 on")
def test_adapters_train_under_fsdp_and_are_merged_in_a_plain_model(results: Results) -> None:
    first = results["fsdp_adapters"][0]
    assert "parameter '0.weight' is sharded by fully_shard" in first["merge"]
    assert "a shard: add adapters before the model is sharded" in first["late"]
    gathered, alone = torch_processes.adapted(), torch_processes.adapted()
    before = alone[0].weight.detach()
    gathered.load_state_dict(first["state"])
    torch_processes.train_adapters(alone, None)
    for model in (gathered, alone):
        merge_adapters(model)
    for one, two in zip(gathered.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert torch.equal(gathered[0].weight != 0, before != 0)
    assert float((gathered[0].weight.detach() - before).abs().max()) > 1e-3


def test_under_fsdp_the_masks_of_both_processes_make_up_the_optimum(results: Results) -> None:
    assert same_on_both(results["fsdp"])
    for weight, mask in results["fsdp"][0]["layers"].values():
        assert oracle.is_optimal(matrix(weight), matrix(mask), 3, 4)


def test_shards_of_whole_tiles_are_solved_where_they_lie(results: Results) -> None:
    """12 rows make two shards of 6, and 4 rows two of 2: these are not multiples of 4."""
    for result in results["fsdp"]:
        assert result["shapes"] == [(8, 8), (12, 16), (1, 1, 8, 12), (4, 16)] * STEPS


def test_under_fsdp_the_records_are_those_of_whole_tensors(results: Results) -> None:
    for result in results["fsdp"]:
        for layer, (weight, mask) in zip(result["kept"], result["layers"].values(), strict=True):
            share = weight.abs()[mask].sum() / weight.abs().sum()
            assert layer.kept_importance == pytest.approx(float(share), rel=1e-5)


def test_under_fsdp_hysteresis_compares_the_masks_of_each_shard(results: Results) -> None:
    assert results["fsdp"][0]["flips"] == results["fsdp"][1]["flips"]
    assert results["fsdp"][0]["flips"][1e9] == 0 < results["fsdp"][0]["flips"][0.0]


def test_a_gathered_fsdp_checkpoint_is_finalized_in_a_plain_model(results: Results) -> None:
    first = results["fsdp"][0]
    assert "parameter '0.weight' is sharded by fully_shard" in first["finalize"]
    model = net()
    sparsifier = Sparsifier(model, "3:4")
    model.load_state_dict(first["state"])
    sparsifier.load_state_dict(first["saved"])
    sparsifier.finalize()
    assert list(model.state_dict()) == list(net().state_dict())
    for name, (weight, mask) in first["layers"].items():
        assert torch.equal(model.get_submodule(name).weight, torch.where(mask, weight, 0))


def test_under_fsdp_a_shard_that_is_not_finite_stops_both_processes(results: Results) -> None:
    for result in results["fsdp"]:
        assert "parameter '0.weight': a shard of the weights holds NaN or infinities" in result["not finite"]


def test_a_model_that_is_sharded_already_is_refused(results: Results) -> None:
    for result in results["fsdp"]:
        assert "sharded by fully_shard already; make the Sparsifier before" in result["late"]


@pytest.mark.parametrize(
    ("direction", "shapes"),
    [("rows", [(6, 8), (1, 1, 8, 12)]), ("columns", [(12, 8), (1, 1, 8, 6)])],
)
def test_one_sided_masks_of_both_processes_make_up_the_optimum(
    results: Results, direction: Direction, shapes: list[tuple[int, ...]]
) -> None:
    for kind in (direction, f"ddp {direction}"):
        first, second = (result[kind] for result in results["one_sided"])
        for name, (weight, mask) in first.items():
            assert torch.equal(mask, second[name][1])
            dense, ones = (matrix(each).T if name == "2" else matrix(each) for each in (weight, mask))
            assert oracle.is_optimal(dense, ones, 3, 4, direction=direction)
    for result in results["one_sided"]:
        assert result[f"shapes {direction}"] == shapes


def test_tensor_parallel_weights_are_solved_where_they_lie_and_trained_as_one(results: Results) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    sparsifier = Sparsifier(model, "1:4", refresh_every=1, gradient="sr-ste")
    train(model, sparsifier, None)
    assert same_on_both(results["tensor_parallel"])
    for result in results["tensor_parallel"]:
        assert_trained_as(model, result["layers"])
        assert result["shapes"] == [(8, 8)] * 2 * (STEPS + 1)
        assert result["sad"] == [layer.sad for layer in sparsifier.last_refresh.layers]
    sparsifier.finalize()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(results["tensor_parallel"][0]["state"][name], value, rtol=1e-4, atol=1e-6)


def test_masks_are_loaded_whole_or_sharded_into_weights_that_are_whole_or_sharded(results: Results) -> None:
    for result in results["tensor_parallel"]:
        for name, (_, mask) in result["layers"].items():
            assert torch.equal(result["flipped"][name][1], mask.flip(0))
            assert not torch.equal(mask.flip(0), mask)
            assert torch.equal(result["loaded"][name][1], mask)
            assert torch.equal(result["loaded plainly"][name][1], mask)


def test_under_ddp_each_process_thins_its_own_gradients(results: Results) -> None:
    one, other = results["thinned_gradients"]
    assert not torch.equal(one["alone"], other["alone"])
    for result in (one, other):
        torch.testing.assert_close(result["together"], (one["alone"] + other["alone"]) / 2)
