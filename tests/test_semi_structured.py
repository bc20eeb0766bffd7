"""Products under a 2:4 mask: the dense product on a CPU; what hinders sparse tensor cores, in words."""

from __future__ import annotations

import re

import pytest
import torch

import masksolve as ms
from masksolve.torch import _semi_structured
from masksolve.torch._device import solve_on_device
from masksolve.torch._semi_structured import acceleration_reason, linear, pack

HOPPER = ("cuda:0", (9, 0), (128, 64), torch.bfloat16, ms.Pattern(2, 4))


def masked_weight() -> torch.Tensor:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return weight * solve_on_device(weight, ms.Pattern(2, 4)).masks


def test_what_suits_is_accelerated() -> None:
    assert _semi_structured._obstacles(*HOPPER) == []


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (1, None, "need a CUDA device, the weight is on cuda:0"),
        (1, (7, 5), "8.0 to 9.x, cuda:0 has 7.5"),
        (1, (10, 0), "8.0 to 9.x, cuda:0 has 10.0"),
        (2, (128, 72), r"multiples of 64, its shape is \(128, 72\)"),
        (2, (64,), "has to be a matrix"),
        (3, torch.float32, "not torch.float32"),
        (4, ms.Pattern(1, 4), "2:4 alone, the pattern is 1:4"),
        (4, ms.Pattern(4, 8), "2:4 alone, the pattern is 4:8"),
    ],
)
def test_each_obstacle_is_named_with_what_was_given(position: int, value: object, words: str) -> None:
    case = [*HOPPER]
    case[position] = value  # type: ignore[call-overload]
    (reason,) = _semi_structured._obstacles(*case)  # type: ignore[arg-type]
    assert re.search(words, reason)


def test_every_reason_is_given_at_once() -> None:
    reason = acceleration_reason(torch.zeros(5, 3), ms.Pattern(4, 8))
    assert all(word in reason for word in ("not accelerated", "cpu", "4:8", "float32", "(5, 3)"))
    assert "float16 or" not in acceleration_reason(torch.zeros(5, 3), ms.Pattern(4, 8), torch.bfloat16)


def test_on_a_cpu_it_is_the_masked_dense_product() -> None:
    inputs, masked = torch.randn(2, 3, 12, dtype=torch.float64), masked_weight()
    assert torch.equal(linear(inputs, masked, None), inputs @ masked.T)


def test_the_gradients_of_the_packed_product_are_those_of_the_dense_one() -> None:
    # A dense tensor in the place of the packed one: its products are what the packed forms compute.
    inputs = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    masked = masked_weight().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: linear(x, w, w.detach()), (inputs, masked), atol=1e-6) is True
    assert torch.allclose(linear(inputs, masked, masked.detach()), linear(inputs, masked, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_tensor_cores_compute_the_masked_dense_product(dtype: torch.dtype) -> None:
    weight = torch.randn(256, 128, device="cuda", dtype=dtype)
    if acceleration_reason(weight, ms.Pattern(2, 4)) != "accelerated":
        pytest.skip(acceleration_reason(weight, ms.Pattern(2, 4)))
    masked = (weight * solve_on_device(weight, ms.Pattern(2, 4)).masks).requires_grad_()
    inputs = torch.randn(3, 40, 128, device="cuda", dtype=dtype, requires_grad=True)
    gradient = torch.randn(3, 40, 256, device="cuda", dtype=dtype)
    results = []
    for packed in (None, pack(masked)):
        output = linear(inputs, masked, packed)
        results.append((output, *torch.autograd.grad(output, (inputs, masked), gradient)))
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense)
