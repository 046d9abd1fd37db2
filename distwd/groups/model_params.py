"""The parameters of a model, by the bare model's names and whole shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .._torch import WRAPPED_CHILD_NAMES, flat_param_of, is_flat_param, original_params
from ..sharding.params import check_has_shape

# --- the parameters of a model ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ParamName:
    """One name of a parameter.

    name: the dotted name in the bare model, without the prefixes that wrappers add.
    within: the modules that contain the parameter, from the root to the one that holds it, wrappers included.
    """

    name: str
    within: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ModelParam:
    """One parameter of a model.

    name: the first of its names.
    param: the tensor that the model holds; on a rank of a sharded model this may be a piece.
    shape: the shape of the whole tensor, before it was sharded or flattened.
    aliases: all its names; several if the parameter is tied, or if the module that holds it is shared.
    """

    name: str
    param: Tensor
    shape: tuple[int, ...]
    aliases: tuple[ParamName, ...]


def params_of(model: nn.Module | Sequence[nn.Module]) -> list[ModelParam]:
    """List the parameters of a model, each once, in the order of `named_parameters`.

    model: a module, or a list of modules (the pipeline stages of one rank).
    Returns tied parameters once, with all their names.
    Raises ValueError if two parameters share a name, or if FSDP1 has flattened parameters so that their shapes are lost.
    """
    parts = [model] if isinstance(model, nn.Module) else list(model)
    if not all(isinstance(part, nn.Module) for part in parts):
        raise ValueError("model must be a torch.nn.Module or a list of them; pass the model, not its parameters")
    params: dict[int, Tensor] = {}
    aliases: dict[int, list[ParamName]] = {}
    param_by_name: dict[str, int] = {}
    for part in parts:
        for alias, param in _named_params(part):
            # Rules and checkpoints address parameters by name. Two stages that both count their layers from 0 would
            # silently get each other's settings.
            if param_by_name.setdefault(alias.name, id(param)) != id(param):
                raise ValueError(
                    f"two parameters are called {alias.name!r}; give the parts of the model different names"
                )
            # By id: tied parameters come under several names, and tensors compare by elements.
            params[id(param)] = param
            aliases.setdefault(id(param), []).append(alias)
    # FSDP1 (use_orig_params=True) leaves flat pieces in the model, and the whole shapes in the FlatParameter.
    flattened: dict[int, tuple[int, ...]] = {}
    for module in (module for part in parts for module in part.modules()):
        flat = flat_param_of(module)
        if flat is not None:
            flattened.update((id(param), shape) for param, shape in original_params(flat))
    found = []
    for key, param in params.items():
        name = aliases[key][0].name
        if is_flat_param(param):
            raise ValueError(
                f"{name} is many parameters that FSDP1 has flattened into one; wrap with use_orig_params=True, so that "
                "matrices and vectors can be told apart"
            )
        check_has_shape(name, param)
        # A DTensor's shape is the whole one. DeepSpeed's ZeRO-3 leaves an empty tensor and keeps the shape in ds_shape.
        shape = flattened.get(key) or tuple(getattr(param, "ds_shape", param.shape))
        found.append(ModelParam(name, param, shape, tuple(aliases[key])))
    return found


def _named_params(root: nn.Module) -> Iterator[tuple[ParamName, Tensor]]:
    """Every name of every parameter of a model, as the bare model would call it."""
    around: dict[
        str, tuple[str, tuple[nn.Module, ...]]
    ] = {}  # by path: prefix in the bare model, modules from the root
    # Duplicates are kept: the second name of a shared module is a name that a rule may use.
    for path, module in root.named_modules(remove_duplicate=False):
        prefix, within = "", (module,)
        if path:
            parent, _, child = path.rpartition(".")
            prefix, outer = around[parent]
            # These call what they wrap "module". Other models may use this name for a real part.
            is_parallel = child == "module" and isinstance(
                outer[-1], (DistributedDataParallel, DataParallel, AveragedModel)
            )
            if child not in WRAPPED_CHILD_NAMES and not is_parallel:
                prefix = f"{prefix}{child}."
            within = (*outer, module)
        around[path] = prefix, within
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            yield ParamName(prefix + name, within), param
