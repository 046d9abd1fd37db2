"""Every private name of torch (and of Python) that distwd uses, each behind a plain name.

Above each stands the public thing that would replace it. Nothing else in the package names anything private of torch;
tests/test_torch_names.py checks that each of these names exists in the installed torch.

What differs between the releases of torch that distwd runs on (2.7 and newer) stands here, too: one fallback each, with
the release since when it is not needed. It can be deleted when that release is the oldest one in pyproject.toml.
"""

from __future__ import annotations

import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental import _config
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs

# --- DTensor --------------------------------------------------------------------------------------------------------


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether a value is a DTensor."""
    # (Nothing private, but to import DTensor takes half a second, and whoever has none should not wait for it. Where it has
    # not been imported nothing is one.)
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_strided_shard(placement: Placement) -> bool:
    """Whether a placement is the one that FSDP2 over TP writes."""
    # Waits for: a public class; DTensor.placements returns it already.
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def dtensor_of(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], stride: Sequence[int]
) -> DTensor:
    """The DTensor of this shape whose part here is `local`, where that lies. No communication, no autograd."""
    # Waits for: a DTensor.from_local that leaves shards on the CPU there; it brings them to the mesh's device, and what is
    # offloaded has a mesh of cards.
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
    return DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def layout_spec(tensor: DTensor) -> Any:
    """Mesh, placements, shape, strides and dtype of a DTensor as one object that can be compared."""
    # Waits for: a public record of these; compared one by one they would cost several attribute reads per parameter and
    # step.
    return tensor._spec


# --- process groups -------------------------------------------------------------------------------------------------


def device_types(group: dist.ProcessGroup) -> tuple[str, ...]:
    """The device types that the backends of a process group send from."""
    # Waits for: a public list of a group's devices; dist.get_backend_config returns text that differs between releases.
    return tuple(device.type for device in group._device_types)


def first_backend(group: dist.ProcessGroup) -> Any:
    """The backend of a process group's first device type."""
    # Waits for: a public way to the options of a group, for its timeout.
    return group._get_backend(torch.device(device_types(group)[0]))


def timeout_of(backend: Any) -> timedelta | None:
    """How long a backend's collectives wait now; None for a backend without timeout (torch's fake one)."""
    # Waits for: a public getter; dist has only a setter.
    timeout: timedelta | None = getattr(getattr(backend, "options", None), "_timeout", None)
    return timeout


def store_of(group: dist.ProcessGroup) -> Any:
    """The key-value store of a process group."""
    # Not needed since torch 2.9: before, a group does not hand out its store.
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return dist.distributed_c10d._get_process_group_store(group)


def join_fake_group(rank: int, size: int) -> None:
    """Make this process rank `rank` of `size` in torch's "fake" process group, which sends nothing."""
    # Waits for: a public way to a fake group. Imported here, since only a simulation needs torch's testing tools.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def ddp_models_of(params: Iterable[Tensor]) -> list[weakref.ref[DistributedDataParallel]]:
    """The DistributedDataParallel models that hold any of these parameters. Looks at every object that there is."""
    # Waits for: a public way from a parameter to the DDP around it.
    ids = set(map(id, params))
    # From the classes to what refers to them, which a model does: a loop in Python over all objects takes several times
    # as long.
    kinds = {DistributedDataParallel}
    while more := {kind for parent in kinds for kind in parent.__subclasses__()} - kinds:
        kinds |= more
    return [
        weakref.ref(one)
        for one in gc.get_referrers(*kinds)
        # By type, since isinstance asks the object, and some answer for others.
        if type(one) in kinds and "_join_config" in vars(one) and any(id(param) in ids for param in one.parameters())
    ]


def is_joining(model: DistributedDataParallel | None) -> bool:
    """Whether a DDP model is in a `join()` in which ranks without batches stand in for its collectives."""
    # Waits for: a public question.
    config = model._join_config if model is not None else None
    return config is not None and config.enable and not config.throw_on_early_termination


# --- FSDP1 ----------------------------------------------------------------------------------------------------------

# What torch's wrappers call the module that they wrap. Waits for: a public way to names without them. The last two are
# Lightning Fabric's, for the module as it runs and as it was: the same parameters twice.
WRAPPED_CHILD_NAMES = (
    "_fsdp_wrapped_module",
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_original_module",
)


def flat_param_of(module: nn.Module) -> Tensor | None:
    """The FlatParameter of a module that FSDP1 wraps; None for other modules, and where nothing is sharded."""
    # Waits for: a public way from a FullyShardedDataParallel module to its parameters' layout. FSDP1 is frozen: none
    # will come.
    return getattr(getattr(module, "_handle", None), "flat_param", None)


def original_params(flat_param: Tensor) -> list[tuple[Tensor, tuple[int, ...]]]:
    """The parameters that a FlatParameter holds, with their whole shapes; empty for use_orig_params=False."""
    # Waits for: as above.
    params = getattr(flat_param, "_params", None)
    if params is None:
        return []
    shapes = flat_param._shapes  # type: ignore[attr-defined]
    return [(param, tuple(shape)) for param, shape in zip(params, shapes, strict=True)]


def is_flat_param(tensor: Tensor) -> bool:
    """Whether a tensor is a FlatParameter of FSDP1."""
    # Waits for: a public class; torch itself asks this attribute, since the class fakes isinstance with it.
    return getattr(tensor, "_is_flat_param", False)


def is_in_fsdp1(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that FSDP1 shards, flattened or original."""
    # Waits for: as above.
    return getattr(tensor, "_fsdp_flattened", False)


def padding_of_shard(tensor: Tensor) -> int:
    """Elements at the end of a local FlatParameter that belong to nobody; 0 for other tensors."""
    # Waits for: as above.
    padding: int = getattr(tensor, "_shard_numel_padded", 0)
    return padding


# Tensors that are memory and nothing else, by their very type: a subclass may have no address, or hold something other
# than its elements. (Nothing private, but torch has no word for it.)
ORDINARY = (Tensor, nn.Parameter)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of `tensor` in this rank's memory.

    tensor: a DTensor, or a plain tensor, which is returned as it is.
    Returns a plain tensor over the same storage, without autograd and without communication.
    """
    # Plain tensors are told apart first: to look for an attribute that a tensor does not have takes longer than all the
    # rest.
    if type(tensor) in ORDINARY:
        return tensor
    # The attribute is read anew in every step and never cached, so a parameter may be given other storage at any time.
    # Waits for: a DTensor.to_local() that neither dispatches nor records autograd; it costs more than the arithmetic on
    # small shards.
    local = tensor._local_tensor if is_dtensor(tensor) else tensor
    # A redistributed DTensor can hold an AsyncCollectiveTensor, which still waits for its collective.
    wait = getattr(local, "wait", None)
    return local if wait is None else wait()


# --- the machine ----------------------------------------------------------------------------------------------------


def cache_size() -> int:
    """Bytes of second-level cache that a core of this CPU has; 0 where torch does not know it."""
    # Not needed since torch 2.11: 2.9 and older do not tell. It is public, and does not know every CPU.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    size: int = known.get("l2_cache_size", 0)
    return size


# --- modules and tensors --------------------------------------------------------------------------------------------


def write_count(tensor: Tensor) -> int:
    """A number that grows with each write to a tensor."""
    # Waits for: a public version counter.
    return tensor._version


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values, as all have that are made under FakeTensorMode."""
    # Waits for: a public class.
    return isinstance(tensor, FakeTensor)


def fake_tensors() -> Any:
    """A context in which tensors are made without values and without memory, on whatever device they say."""
    # Waits for: a public FakeTensorMode. What is a real tensor already, a constant of a model's code, is taken as it is.
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made within are real and on the CPU, whatever FakeTensorMode and torch.set_default_device say outside."""
    # Waits for: a public way out of FakeTensorMode.
    with unset_fake_temporarily(), torch.device("cpu"):
        yield


def is_in_backward() -> bool:
    """Whether backward() runs now, on whatever thread."""
    # Waits for: a public question; hooks that step inside backward() can only be recognised by this.
    return bool(torch._C._current_graph_task_id() != -1)


def optimizers_in_backward(param: Tensor) -> Iterable[torch.optim.Optimizer]:
    """The optimizers that torch.distributed.optim._apply_optimizer_in_backward steps for a parameter."""
    # Waits for: a public list of them.
    optimizers: Iterable[torch.optim.Optimizer] = getattr(param, "_in_backward_optimizers", ())
    return optimizers


# --- optimizers -----------------------------------------------------------------------------------------------------


def has_step_hooks(optimizer: Any) -> bool:
    """Whether an optimizer keeps step hooks of its own; a wrapper that passes attributes on does not."""
    # Waits for: a public way to ask; `register_step_pre_hook` exists on wrappers too, and does nothing there.
    return "_optimizer_step_pre_hooks" in vars(optimizer)


def step_pre_hooks(optimizer: torch.optim.Optimizer) -> Iterable[Callable[..., Any]]:
    """The hooks that run before an optimizer's step, in order."""
    # Waits for: a public list of hooks.
    return optimizer._optimizer_step_pre_hooks.values()


def run_first_after_step(optimizer: torch.optim.Optimizer, handle: Any) -> None:
    """Let the post hook of this handle run before all others."""
    # Waits for: register_step_post_hook(..., prepend=True), as modules have.
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]


def can_init_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's class makes state through torch's usual method, see `init_group`."""
    # Waits for: see `init_group`.
    return hasattr(optimizer, "_init_group")


def overrides_init_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody has replaced that method on this one optimizer."""
    # Waits for: see `init_group`.
    return "_init_group" in vars(optimizer)


def init_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Make the state of a group's parameters, as the first step would."""
    # Waits for: a public way to make an optimizer's state without a step.
    method = optimizer._init_group  # type: ignore[attr-defined]
    # The lists that the method fills besides differ by class; all its parameters but the group are such lists.
    num_lists = len(inspect.signature(method).parameters) - 1
    method(group, *([] for _ in range(num_lists)))


def state_of_constructor(inner: torch.optim.Optimizer, group: dict[str, Any], example: Tensor) -> dict[str, Any]:
    """The state that an optimizer of this kind makes when it is constructed; {} for all that make it in their steps.

    group: the settings to construct it with.
    example: a tensor like the parameter.
    """
    # Not needed since torch 2.13: before, Adagrad makes its state in its constructor, and `_init_group` expects it
    # there.
    if not isinstance(inner, torch.optim.Adagrad):
        return {}
    known = inspect.signature(torch.optim.Adagrad).parameters
    made = torch.optim.Adagrad([example], **{key: group[key] for key in known if key != "params" and key in group})
    return dict(made.state[example])


def own_param_list(optimizer: torch.optim.Optimizer) -> list[Tensor] | None:
    """The list of parameters that LBFGS keeps beside its groups; None for other optimizers."""
    # Waits for: an LBFGS that reads its groups.
    params: list[Tensor] | None = getattr(optimizer, "_params", None)
    return params


def applies_grad_scaler(optimizer: Any) -> bool:
    """Whether an optimizer's own kernel unscales gradients, and skips the step if they are not finite."""
    # Waits for: a public flag; GradScaler asks this one.
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def scaler_states(scaler: torch.amp.GradScaler) -> Any:
    """What a GradScaler knows of each optimizer until its next update; a new object after each update."""
    # Waits for: a public way to read whether a GradScaler has skipped a step.
    return scaler._per_optimizer_states


# --- compiler and interpreter ---------------------------------------------------------------------------------------

# Waits for: a torch.compiler.disable that does not import the compiler when it decorates.
disable_compiler = _disable_dynamo

# Waits for: a public setting, per call of torch.compile, that equal lengths are not taken for one number.
shape_config = _config


def is_in_dispatch_mode() -> bool:
    """Whether an operation of this thread would be seen by a dispatch mode (CommDebugMode, FlopCounterMode)."""
    # Waits for: a public question. (torch's own flag is the process's: where two threads enter modes at once and leave
    # them in the same order, it stays up for good.)
    return _get_current_dispatch_mode() is not None


# Waits for: a public base class of modes that see every operation of a block.
DispatchMode = TorchDispatchMode


def calling_frame(depth: int = 1) -> FrameType:
    """The Python frame `depth` calls above the function that calls this one; 0 is that function's own."""
    # Waits for: nothing; inspect.currentframe() is the same call, documented as possibly None.
    return sys._getframe(depth + 1)
