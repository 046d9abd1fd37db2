"""What a model holds, by the bare model's names and whole shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .._torch import WRAPPED_CHILD_NAMES, child_modules, flat_param_of, is_flat_param, original_params


@dataclass(frozen=True, slots=True, eq=False)
class ParamName:
    """One name of a parameter, without wrappers' prefixes, and the modules around it from the root."""

    name: str
    within: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ModelParam:
    """One parameter with all its names (several if it is tied), and its whole shape."""

    param: Tensor
    shape: tuple[int, ...]
    aliases: tuple[ParamName, ...]

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.aliases[0].name


def params_of(model: nn.Module | Sequence[nn.Module]) -> list[ModelParam]:
    """The parameters of a model, or of several parts of one, each once. Raises ValueError for one name of two parameters."""
    parts = [model] if isinstance(model, nn.Module) else list(model)
    if not all(isinstance(part, nn.Module) for part in parts):
        raise ValueError("model must be a torch.nn.Module or a list of them; pass the model, not its parameters")
    params: dict[int, Tensor] = {}
    aliases: dict[int, list[ParamName]] = {}
    owner: dict[str, int] = {}
    for part in parts:
        for alias, param in _walk(part, "", ()):
            if owner.setdefault(alias.name, id(param)) != id(param):
                raise ValueError(
                    f"two parameters are called {alias.name!r}; give the parts of the model different names"
                )
            params[id(param)] = param
            aliases.setdefault(id(param), []).append(alias)
    shapes = _flattened_shapes(parts)
    return [
        ModelParam(param, _whole_shape(param, shapes, aliases[key][0].name), tuple(aliases[key]))
        for key, param in params.items()
    ]


def _walk(module: nn.Module, prefix: str, within: tuple[nn.Module, ...]) -> Iterator[tuple[ParamName, Tensor]]:
    within = (*within, module)
    for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
        yield ParamName(prefix + name, within), param
    for name, child in child_modules(module):  # named_children would leave out the second name of a shared child
        if child is not None:
            yield from _walk(child, prefix if _is_wrapper(module, name) else f"{prefix}{name}.", within)


def _is_wrapper(module: nn.Module, child: str) -> bool:
    """Whether `module` is only a coat around its child."""
    return child in WRAPPED_CHILD_NAMES or (
        child == "module" and isinstance(module, (DistributedDataParallel, DataParallel))
    )


def _flattened_shapes(parts: Sequence[nn.Module]) -> dict[int, tuple[int, ...]]:
    """The whole shapes of parameters that FSDP1 keeps as flat pieces, by id."""
    shapes: dict[int, tuple[int, ...]] = {}
    for module in (module for part in parts for module in part.modules()):
        flat = flat_param_of(module)
        if flat is not None:
            shapes.update((id(param), shape) for param, shape in original_params(flat))
    return shapes


def _whole_shape(param: Tensor, flattened: Mapping[int, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if is_flat_param(param):
        raise ValueError(
            f"{name} is many parameters that FSDP1 has flattened into one; wrap with use_orig_params=True, so that "
            "matrices and vectors can be told apart"
        )
    # A DTensor's shape is the whole one; DeepSpeed's ZeRO-3 leaves an empty tensor and notes the shape.
    return flattened.get(id(param)) or tuple(getattr(param, "ds_shape", param.shape))
