"""The private names that distwd relies on exist in the installed torch, each on the object that it is read from."""

from __future__ import annotations

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distwd
from distwd import _torch

PACKAGE = Path(distwd.__file__).parent


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def sharded(group) -> DTensor:
    return distribute_tensor(torch.arange(6.0).reshape(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])


def test_local_tensor(sharded):
    assert torch.equal(_torch.local_tensor(sharded), torch.arange(6.0).reshape(3, 2))


def test_spec(sharded):
    assert _torch.layout_spec(sharded).placements == (Shard(0),)


def test_a_part_on_the_cpu_stays_there_under_a_mesh_of_cards(group, monkeypatch):
    """CPU offload. `DTensor.from_local` would bring it to the card."""
    mesh = init_device_mesh("cpu", (1,))
    param = torch.nn.Parameter(distribute_tensor(torch.rand(2, 3, 4) + 1, mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.rand(2, 3, 4), mesh, [Shard(0)])
    monkeypatch.setattr(type(mesh), "device_type", property(lambda self: "cuda"))
    rules = [distwd.WeightDecay(0.1, toward="initial"), distwd.Hyperball()]
    chain = distwd.Chain([("w", param)], distwd.Adam(), *rules, distwd.LR(0.1))
    chain.step()
    kept = {key: value for key, value in chain.state[param].items() if isinstance(value, DTensor)}
    assert kept.keys() >= {"exp_avg", "distwd_WeightDecay_anchor", "distwd_Hyperball_radius"}
    assert {value.to_local().device.type for value in kept.values()} == {"cpu"}
    assert kept["exp_avg"].placements == param.placements
    assert kept["distwd_Hyperball_radius"].shape == (2,)


def test_strided_shard():
    strided = torch.distributed.tensor.placement_types._StridedShard(1, split_factor=2)
    assert strided.split_factor == 2
    assert _torch.is_strided_shard(strided)
    assert not _torch.is_strided_shard(Shard(1))


def test_device_types(group):
    assert "cpu" in _torch.device_types(group)


def test_backend_and_its_timeout(group):
    timeout = _torch.timeout_of(_torch.first_backend(group))
    assert timeout is not None
    assert timeout.total_seconds() > 0


@pytest.mark.filterwarnings("ignore")  # torch warns of FSDP1 on a CPU
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_params(group, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        model = FullyShardedDataParallel(
            torch.nn.Linear(3, 2), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
    flat = _torch.flat_param_of(model)
    assert flat is not None
    assert _torch.is_flat_param(flat)
    assert not _torch.is_flat_param(torch.ones(1))
    assert hasattr(flat, "_shard_numel_padded")
    assert _torch.padding_of_shard(flat) == 0
    assert [shape for _, shape in _torch.original_params(flat)] == ([(2, 3), (2,)] if use_orig_params else [])


def test_a_parameter_of_fsdp1_is_marked(group):
    from torch.distributed.fsdp import FullyShardedDataParallel, _common_utils

    assert _common_utils.FSDP_FLATTENED == "_fsdp_flattened"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("torch.cuda.is_available", lambda: False)
        model = FullyShardedDataParallel(torch.nn.Linear(3, 2), device_id=torch.device("cpu"), use_orig_params=True)
    assert all(map(_torch.is_in_fsdp1, model.parameters()))
    assert not _torch.is_in_fsdp1(torch.ones(1))


def test_store_of_a_group(group, monkeypatch):
    _torch.store_of(group).set("key", "value")
    # As torch before 2.9, where a group has no such method.
    monkeypatch.delattr(dist.ProcessGroup, "get_group_store", raising=False)
    assert _torch.store_of(group).get("key") == b"value"


def test_ddp_and_its_join(group):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    (found,) = _torch.ddp_models_of(list(model.parameters())[:1])
    assert found() is model
    assert _torch.ddp_models_of([torch.ones(1)]) == []
    assert not _torch.is_joining(model)
    with model.join():
        assert _torch.is_joining(model)
    with model.join(throw_on_early_termination=True):
        assert not _torch.is_joining(model)
        model(torch.ones(1))
    assert not _torch.is_joining(None)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("meta"):
        with _torch.plain_tensors():
            plain = torch.ones(1)
            assert plain.item() == 1
        fake = torch.ones(1)
        assert fake.is_meta
    assert _torch.is_fake(fake)
    assert not _torch.is_fake(plain)


def test_wrapped_child_names():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp import _common_utils

    assert _common_utils.FSDP_WRAPPED_MODULE in _torch.WRAPPED_CHILD_NAMES
    assert checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE in _torch.WRAPPED_CHILD_NAMES
    compiled = torch.compile(torch.nn.Linear(1, 1))
    assert set(dict(compiled.named_children())) <= set(_torch.WRAPPED_CHILD_NAMES)


def test_version():
    tensor = torch.zeros(1)
    before = _torch.write_count(tensor)
    tensor.add_(1)
    assert _torch.write_count(tensor) == before + 1


def test_current_graph_task_id():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(_torch.is_in_backward()))
    x.sum().backward()
    assert (seen, _torch.is_in_backward()) == ([True], False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch itself calls it when imported
def test_in_backward_optimizers():
    from torch.distributed.optim import _apply_optimizer_in_backward

    param = torch.nn.Parameter(torch.ones(1))
    assert not _torch.optimizers_in_backward(param)
    _apply_optimizer_in_backward(torch.optim.SGD, [param], {"lr": 0.1})
    assert [type(optimizer) for optimizer in _torch.optimizers_in_backward(param)] == [torch.optim.SGD]


def test_step_hooks():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert _torch.has_step_hooks(optimizer)
    said: list[str] = []
    optimizer.register_step_pre_hook(hook := lambda *_: None)
    assert list(_torch.step_pre_hooks(optimizer)) == [hook]
    optimizer.register_step_post_hook(lambda *_: said.append("first made"))
    _torch.run_first_after_step(
        optimizer, optimizer.register_step_post_hook(lambda *_: said.append("made to run first"))
    )
    optimizer.step()
    assert said == ["made to run first", "first made"]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Rprop, torch.optim.Adadelta])
def test_init_group(cls):
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.zeros(2)
    optimizer = cls([param], lr=0.1)
    assert _torch.can_init_group(optimizer)
    assert not _torch.overrides_init_group(optimizer)
    _torch.init_group(optimizer, optimizer.param_groups[0])
    assert optimizer.state[param]


@pytest.mark.parametrize("cls", [torch.optim.Adagrad, torch.optim.AdamW])
def test_state_of_the_constructor(cls):
    optimizer = cls([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    made = _torch.state_of_constructor(optimizer, optimizer.param_groups[0], torch.ones(3))
    # Either the constructor makes the state, and it fits, or torch's optimizers make it themselves at a step.
    assert made.keys() == next(iter(optimizer.state.values()), {}).keys()
    assert all(value.shape in [(3,), ()] for value in made.values())


def test_size_of_the_cache():
    assert _torch.cache_size() >= 0


def test_params_of_lbfgs():
    param = torch.nn.Parameter(torch.ones(2))
    params = _torch.own_param_list(torch.optim.LBFGS([param]))
    assert params is not None
    assert params[0] is param
    assert _torch.own_param_list(torch.optim.SGD([param], lr=0.1)) is None


def test_step_supports_amp_scaling():
    param = torch.nn.Parameter(torch.ones(2))
    assert _torch.applies_grad_scaler(torch.optim.AdamW([param], fused=True))
    assert not _torch.applies_grad_scaler(torch.optim.AdamW([param]))


def test_per_optimizer_states():
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    before = _torch.scaler_states(scaler)
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = torch.optim.SGD([param], lr=0.1)
    scaler.step(optimizer)
    assert _torch.scaler_states(scaler) is before
    scaler.update()
    assert _torch.scaler_states(scaler) is not before


def test_disable_compiler():
    assert _torch.disable_compiler(lambda: 3)() == 3


def test_shape_config():
    assert isinstance(_torch.shape_config.use_duck_shape, bool)


def test_dispatch_mode():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert _torch.is_in_dispatch_mode()
    assert not _torch.is_in_dispatch_mode()


def test_dispatch_modes_of_two_threads(monkeypatch):
    """They are entered and left in the same order, after which torch's flag of the process says that there still is one."""
    from torch.utils import _python_dispatch
    from torch.utils.flop_counter import FlopCounterMode

    for name in [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]:
        monkeypatch.setattr(_python_dispatch, name, False)  # and put back afterwards
    modes = [FlopCounterMode(display=False) for _ in range(2)]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for act in ("__enter__", "__exit__"):
            for thread, mode in zip((one, other), modes, strict=True):
                thread.submit(getattr(mode, act), *([None] * 3 if act == "__exit__" else [])).result()
                assert thread.submit(_torch.is_in_dispatch_mode).result() is (act == "__enter__")
                assert not _torch.is_in_dispatch_mode()


def test_getframe():
    def called():
        return _torch.calling_frame().f_code.co_name

    assert called() == "test_getframe"


PRIVATE = re.compile(r"_getframe|from torch[\w.]*\._\w+|from torch[\w.]* import [^\n]*\b_\w+|torch\.(?!_foreach)_\w+")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_names_stand_in_one_file(path):
    found = set(PRIVATE.findall(path.read_text(encoding="utf-8")))
    assert path.name == "_torch.py" or not found
