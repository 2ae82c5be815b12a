"""What a rank needs, by formula: bytes that it sends in a step, and an estimate of what it holds beside its shards.

Bytes sent are by the ring's convention (`components.distributed.traffic.sent`), n being the axis's ranks. A is one
rank's hidden states of a step, ``tokens / cp * hidden * bytes``:

    fsdp          all-gather of all parameters, for the forward pass and again for the backward pass, and
                  reduce-scatter of the trained ones' gradients in fp32: per micro-batch, rows padded to a multiple of n
    dp_replicate  all-reduce of a rank's shard of those gradients, per micro-batch
    tp            2 A for every planned product of a layer: all-gather and reduce-scatter (sequence parallel), or an
                  all-reduce. Embeddings: an all-reduce of A, and of A at the head's input in the backward pass; 3 fp32
                  numbers a token for the loss; gradients of what is whole on every rank (norms, half of the adapters)
    cp            all_to_all: queries, keys and values out, attention back, forward and backward. ring: all-gather of
                  keys and values, forward and backward, and their fp32 gradients once round

    pp            a stage sends A to the next, and its gradient to the one before; gradients of tied embeddings

With pp FSDP gathers once more than there are micro-batches (zero bubble: once), and reduces once; but with
mesh.pp_reduce_each it does as without pp.
What checkpointing computes again is sent again, but for the last sum of a layer.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_automodel.components.distributed.mesh import Mesh
from nemo_automodel.components.distributed.stages import ZERO_BUBBLE
from nemo_automodel.components.distributed.tensor import styles_of
from nemo_automodel.components.distributed.traffic import sent
from nemo_automodel.components.elsewhere import Elsewhere
from nemo_automodel.components.kernels.linear_cross_entropy import CHUNK
from nemo_automodel.components.models.common.tp_plan import tp_plan_of
from nemo_automodel.components.placement import local

JOINED = "replicated_with_grad_allreduce"

if TYPE_CHECKING:
    from nemo_automodel.recipes.train import TrainConfig

ACTIVATIONS = (
    "activations: per token and layer, in elements of the model's dtype (h hidden, q and kv channels of the heads, i "
    "of the MLP; t = tp, s = tp if sequence_parallel else 1): 2h/s + 2h + (2q + 2kv + 3i)/t, for streams, inputs of "
    "the products, queries, keys, values, attention, gate, up and their product (kernels that make norms and "
    "activations again keep less); checkpointing selectively h/s + 2h + (2q + 2kv + 2i)/t; fully h/s, and one layer as "
    "without; with pp times the micro-batches in flight. And for the loss 2h a token and one chunk of logits"
)
GATHERED = (
    "gathered: whole parameters of the outermost FSDP unit and of two layers (one computes, one is on its way), and "
    "where they are trained their gradients, and the fp32 copy of one unit's that is being reduced; with pp, but for "
    "mesh.pp_reduce_each, the whole stage, and its gradients in fp32, which wait there for the last micro-batch"
)


@dataclass(frozen=True)
class Work:
    """One rank's part of an optimizer step, all rows being as long as they may be.

    Attributes:
        rows: that the rank computes, with its ``cp`` and ``tp`` neighbours.
        micro_batches: in which it does.
        length: tokens of a row.
        tokens: of these rows, those that this rank has.
        largest: tokens of its largest micro-batch.
        global_tokens: of all ranks.
        gathers: how often FSDP gathers a parameter.
        reductions: how often it reduces a gradient.
        in_flight: micro-batches whose activations a pipeline's rank has at the same time, those of one stage being one.
    """

    rows: int
    micro_batches: int
    length: int
    tokens: int
    largest: int
    global_tokens: int
    gathers: int
    reductions: int
    in_flight: float


def work_of(config: "TrainConfig", mesh: Mesh) -> Work:
    """What the configuration gives each rank to do."""
    loop, length = config.train, config.data.max_length
    rows = -(-loop.batch_size // mesh.data)
    each = min(loop.micro_batch_size or rows, rows)
    own = -(-length // mesh.sequence_cut) * mesh.sequence_cut // mesh.cp
    count, schedule = -(-rows // each), config.mesh.pp_schedule
    gathers, reductions = 2 * count, count
    if (
        mesh.pp > 1 and not config.mesh.pp_reduce_each
    ):  # forward passes let go of parameters, backward passes do not; zero-bubble ones never do
        gathers, reductions = 1 if schedule in ZERO_BUBBLE else count + 1, 1
    in_flight = _in_flight(schedule, mesh, count, config.mesh.pp_virtual_stages or 2)
    tokens, global_tokens = rows * own, loop.batch_size * length
    return Work(rows, count, length, tokens, each * own, global_tokens, gathers, reductions, in_flight)


def _in_flight(schedule: str, mesh: Mesh, count: int, stages: int) -> float:
    """`Work.in_flight`, by the schedules' warm-up (Narayanan et al. 2021, arXiv:2104.04473), or as many as ranks."""
    if mesh.pp == 1 or schedule == "GPipe":
        return 1 if mesh.pp == 1 else count
    later = mesh.pp - mesh.place["pp"] - 1
    if "Interleaved" in schedule:
        return min(count * stages, 2 * later + (stages - 1) * mesh.pp + 1) / stages
    return min(count, mesh.pp if schedule == "ZBVZeroBubble" else later + 1)


def gradient_bytes(parameter: nn.Parameter, accumulating: bool) -> int:
    """Of this rank's gradient: in the parameter's dtype, but summed over micro-batches in fp32."""
    itemsize = max(parameter.itemsize, 4) if accumulating else parameter.itemsize
    return local(parameter).numel() * itemsize if parameter.requires_grad else 0


def layers_of(model: Any) -> list[nn.Module]:
    """The layers that are gathered one at a time; FSDP has made subclasses of theirs."""
    classes = set(model._no_split_modules)
    return [module for module in model.modules() if classes & {each.__name__ for each in type(module).__mro__}]


def gathered_bytes(model: Any, waits: bool) -> int:
    """The estimate `GATHERED`; 0 where FSDP shards nothing.

    Args:
        model: this rank's.
        waits: whether gradients wait, with the weights, for a step's last micro-batch.
    """
    if not any(_ranks(p, "fsdp") > 1 for p in model.parameters()):
        return 0
    if waits:
        return sum(_gathered(p) * (p.itemsize + 4 * p.requires_grad) for p in model.parameters())
    layers = layers_of(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    layer = max(layers, key=lambda each: sum(map(_gathered, each.parameters())))
    root, one = [p for p in model.parameters() if id(p) not in inside], list(layer.parameters())
    trained = [[p for p in unit if p.requires_grad] for unit in (root, one)]
    reduced = max(4 * sum(map(_gathered, unit)) for unit in trained)
    return sum(_gathered(p) * p.itemsize for p in (*root, *one, *one, *trained[0], *trained[1])) + reduced


def _channels(config: Any) -> tuple[int, int]:
    """Of all queries, and of all keys."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width


def activation_bytes(model: Any, mesh: Mesh, work: Work, checkpointing: Any) -> int:
    """The estimate `ACTIVATIONS`, for the layers that ``model`` has."""
    layers = len(layers_of(model))
    config, t = model.config, mesh.tp
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden  # as GPT-2, which does not say
    stream = hidden / (t if mesh.sequence_parallel else 1)
    q, kv = _channels(config)
    kept = 2 * stream + 2 * hidden + (2 * q + 2 * kv + 3 * inner) / t
    selective = stream + 2 * hidden + (2 * q + 2 * kv + 2 * inner) / t
    layer = {False: kept, "selective": selective, True: stream}[checkpointing]
    elements = work.largest * (layers * layer * work.in_flight + (kept if checkpointing is True else 0))
    if ends(model):
        elements += work.largest * 2 * hidden + min(CHUNK, work.largest * config.vocab_size // t)
    return int(model.dtype.itemsize * elements)


def traffic(parts: Mapping[int, Any], mesh: Mesh, work: Work, checkpointing: Any) -> dict[str, int]:
    """Axis -> bytes that this rank sends in an optimizer step, by the formulas above.

    Args:
        parts: of the model, those that the rank has, by the number of their stage; the whole model as 0.
        mesh: of all ranks.
        work: of the rank.
        checkpointing: as the configuration says.
    """
    total: Counter[str] = Counter()
    for number, part in parts.items():
        total += _traffic(part, mesh, work, checkpointing)
        # hidden states to the next stage, their gradients to the one before, where those are on other ranks
        others = [
            near for near in (number - 1, number + 1) if near in range(mesh.pp * len(parts)) and near not in parts
        ]
        if others:
            total["pp"] += len(others) * work.tokens * part.config.hidden_size * part.dtype.itemsize
    if not {0, mesh.pp * len(parts) - 1} <= parts.keys():  # tied embeddings and head on two ranks
        for parameter in (p for part in parts.values() for name, p in part.named_parameters() if name in _split(part)):
            total["pp"] += sent("all-reduce", gradient_bytes(parameter, work.micro_batches > 1), 2)
    return dict(total)


def _split(part: Any) -> Mapping[str, str]:
    return getattr(part, "split_ties", None) or {}


def _traffic(model: Any, mesh: Mesh, work: Work, checkpointing: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for parameter in model.parameters():
        if (n := _ranks(parameter, "fsdp")) > 1:
            whole = _gathered(parameter)
            total["fsdp"] += work.gathers * sent("all-gather", whole * parameter.itemsize, n)
        else:
            whole = local(parameter).numel()
        if parameter.requires_grad and isinstance(parameter, DTensor) and (copies := mesh.dp_replicate) > 1:
            total["dp_replicate"] += work.reductions * sent("all-reduce", whole // n * 4, copies)
        if parameter.requires_grad and n > 1:
            total["fsdp"] += work.reductions * sent("reduce-scatter", whole * 4, n)
    if mesh.tp > 1:
        total["tp"] = _tensor_parallel(model, mesh, work, checkpointing)
    if mesh.cp > 1:
        total["cp"] = len(layers_of(model)) * _attention(model, mesh, work, checkpointing)
    return total


def begins(part: Any) -> bool:
    """Whether it has the embeddings."""
    return not isinstance(part.get_input_embeddings(), Elsewhere)


def ends(part: Any) -> bool:
    """Whether it has the head."""
    return not isinstance(part.get_output_embeddings(), Elsewhere)


def _attention(model: Any, mesh: Mesh, work: Work, checkpointing: Any) -> int:
    """Of one layer's attention to sequences that ranks share."""
    (q, kv), n, passes = _channels(model.config), mesh.cp, 3 if checkpointing else 2
    if mesh.cp_method == "ring":
        pieces = work.tokens * 2 * kv // mesh.tp
        return passes * sent("all-gather", n * pieces * model.dtype.itemsize, n) + n * sent("send", pieces * 4, n)
    return passes * sent("all-to-all", work.tokens * (2 * q + 2 * kv) // mesh.tp * model.dtype.itemsize, n)


def _tensor_parallel(model: Any, mesh: Mesh, work: Work, checkpointing: Any) -> int:
    n = mesh.tp
    states = work.tokens * model.config.hidden_size * model.dtype.itemsize
    gathered, reduced = sent("all-gather", states, n), sent("all-reduce", states, n)
    styles = styles_of(model, tp_plan_of(model))
    columns, rows = (sum(style == kind for style in styles.values()) for kind in ("colwise", "rowwise"))
    layers = len(layers_of(model))
    # transformers has the embeddings' output ask for a gradient where layers are checkpointed
    asked = bool(checkpointing) or not begins(model) or model.get_input_embeddings().weight.requires_grad
    total = 2 * gathered * (columns + rows)
    if checkpointing:  # again, but for each layer's last sum, if nothing comes after it that keeps its input
        spared = 0 if model.base_model.spec.norms.after_mlp else layers
        total += gathered * (columns + rows - spared) if mesh.sequence_parallel else reduced * (rows - spared)
    if not asked:  # nobody asks for the gradient of the first layer's input
        total -= gathered if mesh.sequence_parallel else reduced
    if mesh.sequence_parallel:  # into the first layer, backward; out of the last
        total += gathered * (1 + asked)
    total += reduced * begins(model)  # embeddings
    total += (reduced + 3 * sent("all-reduce", work.tokens * 4, n)) * ends(
        model
    )  # the head's input, backward; the loss
    again = 2 if checkpointing else 1
    for name in (
        name for name, style in styles.items() if style == JOINED and _of_all_heads(model, name)
    ):  # queries or keys, gathered for their norm, and their gradients
        states = work.tokens * model.get_submodule(name).weight.numel() * model.dtype.itemsize
        total += (1 + again) * sent("all-gather", states, n)
    for name, parameter in model.named_parameters():  # DoRA: the length of each row, of which a rank has a part
        owner, magnitude, _ = name.partition(".lora_magnitude")
        if magnitude and styles.get(owner) == "rowwise":
            total += again * work.micro_batches * sent("all-reduce", parameter.numel() * 4, n)
    return total + sum(_sums_of_whole(model, mesh, work))


def _of_all_heads(model: Any, name: str) -> bool:
    attention = model.get_submodule(name.rpartition(".")[0])
    return bool(model.get_submodule(name).weight.numel() > attention.head_dim)


def _sums_of_whole(model: nn.Module, mesh: Mesh, work: Work) -> Iterator[int]:
    """Of gradients of parameters that tensor-parallel ranks have whole, each its term of the sum, in fp32 at least."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not isinstance(parameter, DTensor) or _ranks(parameter, "tp") == 1:
            continue
        if not _placement(parameter, "tp").is_replicate():
            continue
        if name.endswith(".bias") and not mesh.sequence_parallel:
            continue  # added to the sum of all, once
        sharded = _ranks(parameter, "fsdp") > 1 or _ranks(parameter, "dp_replicate") > 1
        times = work.micro_batches if sharded else 1  # the optimizer adds up once
        yield times * sent("all-reduce", parameter.numel() * max(parameter.itemsize, 4), mesh.tp)


def _placement(parameter: DTensor, axis: str) -> Any:
    return parameter.placements[(parameter.device_mesh.mesh_dim_names or ()).index(axis)]


def _ranks(parameter: Tensor, axis: str) -> int:
    """How many ranks of ``axis`` share ``parameter``, or have it; 1: it knows nothing of that axis."""
    names = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
    return parameter.device_mesh.size(names.index(axis)) if axis in names else 1  # type: ignore[attr-defined]


def _gathered(parameter: Tensor) -> int:
    """Elements that FSDP gathers of a parameter: its tensor-parallel shard, rows padded to a multiple of the ranks."""
    rows, n = parameter.shape[0], _ranks(parameter, "fsdp")
    if isinstance(parameter, DTensor) and (t := _ranks(parameter, "tp")) > 1:
        placement = _placement(parameter, "tp")
        if placement.is_shard() and placement.dim == 0:
            each = -(-rows // t)
            place = parameter.device_mesh.get_local_rank("tp")
            rows = max(0, min(each, rows - place * each))
    return -(-rows // n) * n * math.prod(local(parameter).shape[1:])
