"""What `prune_filters` refuses before it changes anything, and whose filters it is asked to leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from masksolve._globs import matches, none_of
from masksolve._kinds import each_reason_once
from masksolve.torch._dtensor import is_sharded
from masksolve.torch._filters.channels import ChannelMap
from masksolve.torch._layers import adapted_attributes, check_module, masked_attributes, thresholded_attributes


@dataclass(frozen=True)
class Globs:
    """Globs of the names of weights whose filters may be cut, all of them if None, and of those that may not."""

    include: Sequence[str] | None
    exclude: Sequence[str] | None

    def reason(self, name: str) -> str | None:
        """Return why the filters of a weight are left, if they are."""
        excluding = next((glob for glob in self.exclude or () if matches(name, [glob])), None)
        if excluding is not None:
            return f"excluded by {excluding!r}"
        return "not included" if self.include is not None and not matches(name, self.include) else None

    def check(self, names: Sequence[str]) -> None:
        """Refuse globs that match no weight."""
        for option, globs in (("include", self.include), ("exclude", self.exclude)):
            for glob in globs or ():
                if not any(matches(name, [glob]) for name in names):
                    raise ValueError(f"{option} {glob!r} matches {none_of(names, 'weight')}")


def check_model(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be cut."""
    check_module(model)
    for name, module in model.named_modules():
        if masked := masked_attributes(module):
            raise ValueError(f"{masked[0]!r} of {name!r} is masked by a Sparsifier; prune filters before, or finalize")
        if thresholded := thresholded_attributes(module):
            raise ValueError(
                f"{thresholded[0]!r} of {name!r} has trainable thresholds; finalize its DynamicSparsifier first"
            )
        if adapted := adapted_attributes(module):
            raise ValueError(f"{adapted[0]!r} of {name!r} has an adapter; merge_adapters first")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or parameter.is_meta:
            where = "sharded" if is_sharded(parameter) else "on the meta device"
            raise ValueError(f"parameter {name!r} is {where}; prune the whole model, with its values")
    if not any(isinstance(module, (nn.Linear, _ConvNd)) for module in model.modules()):
        raise ValueError(f"no filters of this {type(model).__name__} can be cut: it has no Linear and no convolution")


def check_groups(model: nn.Module, channels: ChannelMap, globs: Globs) -> None:
    """Refuse a model of which nothing can be cut, and globs that match nothing."""
    names = [*(layer.name for layer in channels.layers), *channels.others]
    globs.check([f"{name}.weight" if name else "weight" for name in names])
    if not channels.groups:
        raise ValueError(f"no filters of this {type(model).__name__} can be cut ({reasons_to_stay(channels)})")


def reasons_to_stay(channels: ChannelMap) -> str:
    """Return in words which filters have to stay."""
    stay = [(layer.name, layer.reason) for layer in channels.layers if layer.reason is not None]
    return each_reason_once([(name or "itself", reason) for name, reason in (*stay, *channels.others.items())])
