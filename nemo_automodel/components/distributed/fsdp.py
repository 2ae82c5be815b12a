"""Data parallelism with sharded parameters, gradients and optimizer state: torch's FSDP2."""

import os
from datetime import timedelta
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

# the leading rank may export a model, or tokenize a data set, while the others wait
_PATIENCE = timedelta(hours=2)


def join_ranks(device: torch.device) -> torch.device:
    """Join the other ranks where torchrun (or Slurm, with torchrun's variables) started several.

    Returns:
        The device of this rank: ``cuda:LOCAL_RANK`` for a device ``cuda``, otherwise ``device``. It is torch's current
        one from then on.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo beside NCCL: flags, counts and checkpoints travel on the host
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    return device


def fully_shard_layers(model: nn.Module, layer_classes: set[str], mesh: DeviceMesh, cpu_offload: bool = False) -> None:
    """Shard ``model`` over the ranks of ``mesh``, layer by layer; the ranks' gradients are averaged, in fp32 at least.

    Where copies are whole, frozen parameters are left as they are, on the device they are on: FSDP would copy each of
    them before each use.

    Args:
        model: on the meta device (its weights are then read shard by shard), or whole on every rank.
        layer_classes: class names of the layers that are gathered one at a time.
        mesh: of one axis; or of two, and then whole copies of the model go along the first (HSDP).
        cpu_offload: keep shards and gradients in host memory, where the optimizer then works.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = [module for module in model.modules() if type(module).__name__ in layer_classes]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of the classes {sorted(layer_classes)} to shard by")
    dtype = torch.promote_types(torch.float32, next(model.parameters()).dtype)
    options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=dtype)}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    elif mesh.ndim == 2 and mesh.size(1) == 1:
        options["ignored_params"] = {each for each in model.parameters() if not each.requires_grad}
    for module in (*layers, model):
        # the outermost too, which torch would leave gathered after a forward pass: what is not sharded is not saved
        fully_shard(module, mesh=mesh, reshard_after_forward=True, **options)
    for layer, following in pairwise(cast("list[FSDPModule]", layers)):  # gathered while this one computes
        layer.set_modules_to_forward_prefetch([following])
