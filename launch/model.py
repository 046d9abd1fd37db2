"""A Llama from `transformers`, with random weights, cut over a mesh: tensor parallelism first, FSDP2 around it."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

NUM_BYTES = 256


def build_model(
    layers: int, hidden: int, heads: int, mlp: int, context: int, seed: int, device: torch.device
) -> LlamaForCausalLM:
    """The same weights on every rank and every mesh: drawn on the CPU, from the seed, before anything is cut."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    nn.Module.to(model, device)
    return model


def check_divisible(mesh: DeviceMesh | None, heads: int, mlp: int) -> None:
    """Tensor parallelism gives each rank whole heads and equal parts of the rest."""
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
        return
    ranks = mesh["tp"].size()
    for what, number in (("--heads", heads), ("--mlp", mlp), ("the number of byte values", NUM_BYTES)):
        if number % ranks:
            raise ValueError(f"tp={ranks} does not divide {what}, {number}; change one of them")


def shard_model_(model: LlamaForCausalLM, mesh: DeviceMesh | None) -> None:
    """Cut the model as the axes of the mesh say: `tp` inside a layer, `fsdp` over it, `dp` as whole copies (HSDP)."""
    axes = () if mesh is None else mesh.mesh_dim_names or ()
    if mesh is not None and "tp" in axes:
        # FSDP2 sees that the logits are a view of what tensor parallelism gathered. Nothing here writes into them.
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        parallelize_module(model, mesh["tp"], tensor_parallel_plan())
    if mesh is not None and "fsdp" in axes:
        data_mesh = mesh["dp", "fsdp"] if "dp" in axes else mesh["fsdp"]
        for layer in model.model.layers:
            fully_shard(layer, mesh=data_mesh)
        fully_shard(model, mesh=data_mesh)


def tensor_parallel_plan() -> dict[str, ParallelStyle]:
    """Into each block by columns, out of it by rows, so that a block ends in one all-reduce. Norms stay whole."""
    into = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    out_of = ("self_attn.o_proj", "mlp.down_proj")
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        **{f"model.layers.*.{name}": ColwiseParallel() for name in into},
        **{f"model.layers.*.{name}": RowwiseParallel() for name in out_of},
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


def cross_entropy(model: nn.Module, sequences: torch.Tensor) -> torch.Tensor:
    """The mean loss, in nats per byte, of each byte of `sequences` after those before it."""
    logits = model(input_ids=sequences[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())
