"""Ways to shard a model over gloo ranks, by name."""

from collections.abc import Callable
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

TENSOR_PARALLEL = {
    "self_attn.qkv_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def fsdp(model: Any, mesh: DeviceMesh) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _tp(model: Any, mesh: DeviceMesh) -> None:
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {name: style() for name, style in TENSOR_PARALLEL.items()})


def sharding(name: str) -> Callable[[Any], None]:
    """``"fsdp=4"``, ``"tp=2"``, ``"hsdp=2x2"``, ``"fsdp=2,tp=2"``: what shards a model over all ranks."""

    def shard(model: Any) -> None:
        sizes = dict(part.split("=") for part in name.split(","))
        if "hsdp" in sizes:
            replicas, shards = map(int, sizes["hsdp"].split("x"))
            fsdp(model, init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard")))
            return
        mesh = init_device_mesh("cpu", tuple(map(int, sizes.values())), mesh_dim_names=tuple(sizes))
        if "tp" in sizes:
            _tp(model, mesh["tp"])
        if "fsdp" in sizes:
            fsdp(model, mesh["fsdp"])

    return shard
