"""From a training's configuration to its model: on this device, with its adapters, sharded over the ranks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel.components.checkpoint.training_state import TrainingCheckpoint
from nemo_automodel.components.distributed import ALONE, Mesh, Options, Pipeline, parallelize
from nemo_automodel.components.distributed.stages import ZERO_BUBBLE
from nemo_automodel.components.float8_training import check_float8, to_float8
from nemo_automodel.components.models.common.attention import DecoderAttention
from nemo_automodel.components.models.common.capabilities import ATTENTIONS, BY_IMPLEMENTATION, Need, refuse
from nemo_automodel.components.models.common.tp_plan import tp_plan_of
from nemo_automodel.components.optim import MasterAdamW, OptimConfig
from nemo_automodel.components.peft import apply_lora, init_adapters, join_adapters, layout_of, quantize_base
from nemo_automodel.recipes.meshes import stages_of_rank
from nemo_automodel.recipes.served import attention_for, graphs_for, no_graphs, refuse_graphs
from nemo_automodel.recipes.step import compute_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nemo_automodel.components.data import BatchStream
    from nemo_automodel.components.models.common.backend import BackendConfig
    from nemo_automodel.components.models.common.graphs import Graphs
    from nemo_automodel.recipes.train import ModelConfig, TrainConfig

ROUND = 64
"""Tokens of which lengths are multiples where few of them are wanted."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is a GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not usable here: {error}") from error
    return torch.device(name)


def auto_dtype(device: torch.device) -> torch.dtype:
    """What ``model.dtype: auto`` means: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is often slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_parts(
    config: "TrainConfig", resumed: TrainingCheckpoint | None, device: torch.device, mesh: Mesh
) -> dict[int, "PreTrainedModel"]:
    """Number of each pipeline stage that this rank has -> that part of the model; without ``pp``, the model as 0."""
    state, numbers = torch.get_rng_state(), stages_of_rank(config, mesh)
    parts = {}
    for number in numbers:
        torch.set_rng_state(state)  # weights from scratch are drawn for the whole model each time
        stages = mesh.pp * len(numbers)
        parts[number] = build_model(config, resumed, device, config.data.packing, mesh, stage=number, stages=stages)
    return parts


def build_pipeline(parts: Mapping[int, "PreTrainedModel"], config: "TrainConfig", mesh: Mesh) -> Pipeline:
    """What trains a model whose stages several ranks have."""
    options = config.mesh
    return Pipeline(parts, mesh.pp * len(parts), mesh, options.pp_schedule, compute_stage, options.pp_reduce_each)


def build_model(
    config: "TrainConfig",
    resumed: TrainingCheckpoint | None,
    device: torch.device,
    packing: bool = False,
    mesh: Mesh = ALONE,
    stage: int = 0,
    stages: int = 1,
) -> "PreTrainedModel":
    """The model to train, in training mode, with adapters at their start; on several ranks, this rank's shards of it.

    Where ``resumed`` will bring all weights, none are read here; nor on the device ``meta``, where there are none. With
    ``packing``, attention that is ``auto`` takes the documents' bounds where one can serve the model. Of several
    pipeline ``stages`` it is the one numbered ``stage``.

    Raises:
        ValueError: the attention that is asked for does not run here, or not with such data and ranks.
    """
    options, several = config.model, mesh.size > 1
    dtype = DTYPES.get(options.dtype, auto_dtype(device))
    _check(config, device, dtype, packing, mesh)

    def prepare(model: Any) -> None:
        for module in model.modules():  # dropout, too, before weights are read
            if isinstance(module, DecoderAttention):
                refuse(BY_IMPLEMENTATION.get(model.config._attn_implementation), module.need())
        if config.lora is not None:
            apply_lora(model, config.lora, layout_of(model))
        if options.float8 != "off":
            to_float8(model, options.float8)
        parallelize(
            model,
            mesh,
            Options(
                tp_plan=tp_plan_of(model) if mesh.tp > 1 else {},
                stage=stage,
                stages=stages,
                checkpointing=options.gradient_checkpointing,
                compile=options.compile,
                cpu_offload=options.cpu_offload,
            ),
        )

    common: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": options.attn_implementation,
        "backend": _backend_of(config, mesh),
        "trust_remote_code": options.trust_remote_code,
    }
    if (resumed and config.lora is None) or options.from_scratch or device.type == "meta":
        # drawn whole, by the CPU's generator, so that all ranks draw the same; sharding moves them to the device
        source = resumed.folder / "hf" if resumed else options.path
        drawn_on = "cpu" if several and device.type != "meta" else device
        model = NeMoAutoModelForCausalLM.from_config(source, device=drawn_on, **common)
        prepare(model)
        if several and mesh.averaged == 1:  # which FSDP would have done
            model.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
    else:
        model = NeMoAutoModelForCausalLM.from_pretrained(options.path, device=device, prepare=prepare, **common)
        if config.lora is not None:
            init_adapters(model, config.train.seed)
    if config.lora is not None:
        if config.lora.base_dtype == "float8":
            quantize_base(model)
        elif options.backend.kernels == "auto":
            join_adapters(model)
    _choose(model, options, packing, several)
    return model.train()


def _check(config: "TrainConfig", device: torch.device, dtype: torch.dtype, packing: bool, mesh: Mesh) -> None:
    """Refuse what a configuration asks for, and this device or these ranks do not have, before any weight is read."""
    options = config.model
    named = options.attn_implementation  # which decides, also where the table does not know it
    asked = ATTENTIONS.get(options.backend.attn) if named is None else BY_IMPLEMENTATION.get(named)
    refuse(asked, Need(device=device, dtype=dtype, backward=True, packing=packing, tp=mesh.tp, cp=mesh.cp))
    if options.cuda_graphs is True and (reason := no_graphs(options, device, mesh.size > 1)) is not None:
        refuse_graphs(reason)
    if config.lora is not None and config.lora.base_dtype == "float8":
        _check_float8(device)
    if options.float8 != "off":
        check_float8(device)
        if mesh.tp > 1:
            raise ValueError(f"model.float8={options.float8} does not go with mesh.tp={mesh.tp}; leave it at off")


def _choose(model: Any, options: "ModelConfig", packing: bool, several: bool) -> None:
    """What is left to ``auto``: the attention, and whether CUDA graphs launch the layers."""
    chosen, _ = attention_for(model, options, packing)
    if chosen is not None:
        model.set_attn_implementation(chosen)
    if (graphs := graphs_for(model, options, packing, several)) is not None:
        model.base_model.graphs = graphs


def let_lengths_recur(model: Any, stream: "BatchStream", config: "TrainConfig", longest: int) -> None:
    """Round the lengths of padded rows up, where each then has a CUDA graph: rows of all lengths would have few.

    Args:
        model: built.
        stream: of the rows to train on, of which the longest has ``longest`` tokens.
        config: of the training.
        longest: as said.
    """
    graphs: Graphs | None = getattr(model.base_model, "graphs", None)
    if graphs is None or config.data.packing:
        return
    rounded = -(-longest // ROUND) * ROUND
    rows = config.train.micro_batch_size or config.train.batch_size
    limit = getattr(model.config, "max_position_embeddings", None) or rounded
    if rows * rounded <= graphs.tokens and rounded <= limit:
        stream.multiple_of = ROUND


def _backend_of(config: "TrainConfig", mesh: Mesh) -> "BackendConfig":
    """As asked for, without kernels where the schedule takes backward passes apart.

    torch lets a weight's part begin at the first output of what uses the weight, and a norm by the kernel has two; nor
    does a kernel compute the one part without the other.
    """
    apart = mesh.pp > 1 and config.mesh.pp_schedule in ZERO_BUBBLE
    return replace(config.model.backend, kernels="torch") if apart else config.model.backend


def build_optimizer(model: nn.Module | Pipeline, optim: OptimConfig, seed: int, mesh: Mesh = ALONE) -> MasterAdamW:
    """The optimizer of what ``model`` trains."""
    if isinstance(model, Pipeline):
        return MasterAdamW(model.parameters.items(), optim, seed, ranks=mesh.stage, shared=model.shared)
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return MasterAdamW(trained, optim, seed, ranks=mesh.stage)


def _check_float8(device: torch.device) -> None:
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(
            f"lora.base_dtype=float8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper, ...); this one has "
            f"{capability[0]}.{capability[1]}. Leave it at auto"
        )
