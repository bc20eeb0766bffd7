"""Weights of a checkpoint, some at a time, into a model of transformers and back: by its own conversion, both ways."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from masksolve.torch._model_config import quietly

# What has to be undone before weights are stored.
Conversions = list[Any]


class PartialWeights:
    """The weights of a model on the meta device, of which some are loaded.

    Parameters
    ----------
    model : nn.Module
        Of transformers.

    Raises
    ------
    ImportError
        If this release of transformers converts weights in another way.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
        from transformers.modeling_utils import LoadStateDictConfig

        self._model: Any = model
        # Until release 5.14 it has a plan for tensor parallelism as an argument of its own.
        arguments = inspect.signature(convert_and_load_state_dict_in_model).parameters
        without_plan: dict[str, Any] = {"tp_plan": None} if "tp_plan" in arguments else {}
        self._convert: Any = partial(convert_and_load_state_dict_in_model, **without_plan)
        self._revert = revert_weight_conversion
        self._mapping: Any = get_model_conversion_mapping
        self._config = LoadStateDictConfig

    def load(self, tensors: Mapping[str, Tensor]) -> Conversions:
        """Load tensors of a checkpoint, all that some parameters are made of; return what `stored` needs.

        Raises
        ------
        ValueError
            If one of them is of another shape than the model's.
        """
        dtype = self._model.dtype
        config = self._config(
            dtype=dtype, dtype_plan=self._model._get_dtype_plan(dtype), weight_mapping=self._mapping(self._model)
        )
        with quietly():
            info, _ = self._convert(self._model, dict(tensors), config)
        if info.mismatched_keys or info.conversion_errors:
            name = next(iter([*(each[0] for each in info.mismatched_keys), *info.conversion_errors]))
            raise ValueError(f"{name} has another shape in the checkpoint than in its model")
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._missing = info.missing_keys
        found: Conversions = self._model._weight_conversions
        return found

    def tie(self) -> None:
        """Tie what has been loaded to what the checkpoint has no weights of its own for."""
        self._model.tie_weights(missing_keys=self._missing, recompute_mapping=False)

    def stored(
        self, parameters: Mapping[str, Tensor], names: Iterable[str], conversions: Conversions
    ) -> dict[str, Tensor]:
        """Return the tensors of these names in the checkpoint, from the parameters that one call of `load` loaded.

        Raises
        ------
        ValueError
            If there is one that they do not make.
        """
        self._model._weight_conversions = conversions
        found = self._revert(self._model, dict(parameters))
        prefix = f"{self._model.base_model_prefix}."
        made = {}
        for name in names:
            # A head's checkpoint may be that of the model below it, or the other way round.
            candidates = [each for each in (name, f"{prefix}{name}", name.removeprefix(prefix)) if each in found]
            if not candidates:
                raise ValueError(f"{name} cannot be written as it is stored from what its model makes of it")
            made[name] = found[candidates[0]]
        return made

    def unload(self, modules: Iterable[nn.Module]) -> None:
        """Put the parameters of these modules on the meta device again."""
        for module in modules:
            for owner in module.modules():
                for name, parameter in owner._parameters.items():
                    if parameter is not None:
                        owner._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
