"""From a training's configuration to the mesh of its ranks, and what is refused before anything is built."""

from typing import TYPE_CHECKING

import torch

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM, read_config
from nemo_automodel.components.data import micro_batches
from nemo_automodel.components.distributed import Mesh
from nemo_automodel.components.distributed.mesh import Divided, check_divides
from nemo_automodel.components.distributed.stages import ZERO_BUBBLE, stages_of, takes_micro_batches
from nemo_automodel.components.together import Together
from nemo_automodel.recipes.checks import blame

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from nemo_automodel.recipes.train import TrainConfig


def build_mesh(config: "TrainConfig", device: torch.device) -> Mesh:
    """The ranks of this run by axis; all ranks call this.

    Raises:
        ValueError: sizes that are not those of the ranks there are, or that the model or the data does not divide into.
    """
    sizes = config.mesh.sizes(Together().size)
    mesh = Mesh(sizes, device.type, config.mesh.sequence_parallel, config.mesh.cp_method)
    _check_options(config, mesh)
    if mesh.sharers > 1:
        with blame("model.path"):
            model = read_config(config.model.path, config.model.trust_remote_code)
        _check_model(config, mesh, model)
    return mesh


def stages_of_rank(config: "TrainConfig", mesh: Mesh) -> list[int]:
    """Numbers of the pipeline stages that this rank has."""
    if mesh.pp == 1:
        return [0]
    return stages_of(mesh.place["pp"], mesh.pp, config.mesh.pp_schedule, config.mesh.pp_virtual_stages)


def _check_options(config: "TrainConfig", mesh: Mesh) -> None:
    """What needs no model."""
    if config.model.cpu_offload and (mesh.device_type == "cpu" or mesh.averaged == 1):
        raise ValueError(
            f"model.cpu_offload moves FSDP's shards off GPUs, and here is {mesh.device_type}, {mesh}; leave it at "
            "false, or give mesh.dp_shard more than one GPU"
        )
    if config.lora is not None and config.lora.base_dtype == "float8":
        axes = {"dp_shard": mesh.dp_shard, "cp": mesh.cp, "tp": mesh.tp}
        cut = [f"mesh.{axis}={size}" for axis, size in axes.items() if size > 1]
        if cut:
            raise ValueError(
                f"lora.base_dtype=float8 is for weights that are whole on a GPU, not with {cut[0]}: give the ranks to "
                "mesh.dp_replicate or mesh.pp, or leave it at auto"
            )
        if config.model.cpu_offload:
            raise ValueError("lora.base_dtype=float8 is for weights that stay on a GPU: set model.cpu_offload=false")
    if config.data.packing and config.data.max_length % (each := mesh.sequence_cut):
        raise ValueError(
            f"data.max_length={config.data.max_length} must be a multiple of {each}, over which {mesh} cuts sequences"
        )
    if config.data.packing and _ring(config, mesh):
        raise ValueError("mesh.cp_method=ring has no packed documents: set mesh.cp_method=all_to_all, or no packing")


def _check_model(config: "TrainConfig", mesh: Mesh, model: "PreTrainedConfig") -> None:
    """What the mesh shares of a model of that config."""
    if NeMoAutoModelForCausalLM.registered(model) is None:
        raise ValueError(
            f"mesh: {mesh} shares what {' or '.join(model.architectures or ['?'])}, transformers' own class, computes "
            "as a whole; leave tp, cp and pp at 1 (dp_shard works), or add the architecture (automodel new)"
        )
    kv_heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    check_divides(
        mesh,
        [
            Divided("KV heads", kv_heads, "tp"),
            Divided("rows of the MLP", model.intermediate_size, "tp"),
            *([] if _ring(config, mesh) else [Divided("KV heads", kv_heads, "cp", mesh.tp)]),
        ],
    )
    if mesh.pp > 1:
        stages = mesh.pp * len(stages_of_rank(config, mesh))
        if stages > (layers := model.num_hidden_layers):
            raise ValueError(f"mesh: pp={mesh.pp} makes {stages} stages of the {layers} layers: some would have none")
        _check_pipeline(config, mesh)


def _ring(config: "TrainConfig", mesh: Mesh) -> bool:
    return mesh.cp > 1 and config.mesh.cp_method == "ring"


def _check_pipeline(config: "TrainConfig", mesh: Mesh) -> None:
    loop, schedule = config.train, config.mesh.pp_schedule
    size = loop.micro_batch_size or loop.batch_size

    def takes(micro_batch_size: int) -> bool:
        return takes_micro_batches(schedule, mesh.pp, micro_batches(loop.batch_size, micro_batch_size, mesh.data))

    if not takes(size):
        fitting = [n for n in range(1, -(-loop.batch_size // mesh.data) + 1) if takes(n)]
        raise ValueError(
            f"mesh: {schedule} over pp={mesh.pp} does not go with {micro_batches(loop.batch_size, size, mesh.data)} "
            f"micro-batches a step, of train.micro_batch_size={loop.micro_batch_size} of the {loop.batch_size} rows of "
            + (f"{mesh}; it may be {', '.join(map(str, fitting))}" if fitting else f"{mesh}; raise train.batch_size")
        )
    if config.model.compile and schedule in ZERO_BUBBLE:
        raise ValueError(f"mesh.pp_schedule={schedule} takes backward passes apart, which model.compile=true joins")
