"""Transformer Engine on a CUDA device: no further from float64 than eager, whole models, trainings, float8 recipes.

Run on a GPU machine that has it with ``pytest -m gpu tests/gpu/test_te.py``.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.distributed import parallelize_tensors
from nemo_automodel.components.distributed.fsdp import fully_shard_layers
from nemo_automodel.components.models.common.capabilities import ATTENTIONS, absent
from nemo_automodel.components.models.common.norm import LayerNorm, NormSpec, RMSNorm
from nemo_automodel.components.models.common.rope import RopeSpec, RotaryEmbedding, apply_rotary_pos_emb
from nemo_automodel.components.models.common.te.engine import package
from nemo_automodel.components.models.common.te.float8 import TEFloat8
from nemo_automodel.components.models.common.te.modules import TELinear, float8_state, te_norm
from nemo_automodel.components.models.common.te.rope import turn
from nemo_automodel.components.models.common.tp_plan import tp_plan_of
from nemo_automodel.components.models.common.varlen import Documents
from nemo_automodel.config import load_config
from nemo_automodel.recipes.train import Run, TrainConfig
from tests.components.models.test_te import ROPES
from tests.conftest import randomize, tiny, tokens, twins
from tests.gpu import test_varlen
from tests.gpu.test_varlen import POSITIONS, WINDOW, error, heads, rowwise
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

if (why := absent(ATTENTIONS["te"])) is not None:
    pytest.skip(f"te {why}", allow_module_level=True)
package("pytorch")  # by itself it would load the system's cuDNN beside torch's
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16 = torch.bfloat16
ALL = {"attn": "te", "linear": "te", "rms_norm": "te", "rope_fusion": True}
HEAD_DIMS = [head_dim for head_dim in (64, 96, 128, 256) if head_dim in ATTENTIONS["te"].on["cuda"].head_dims]
PACKED = {"data__packing": "true", "data__max_length": 128, "train__batch_size": 2}


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def assert_no_further(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor], slack: float = 1.15) -> None:
    """Roundings of the same number and size, over many values: equal to a few hundredths."""
    assert len(ours) == len(eager) == len(exact)
    for place, (a, b, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert a.shape == truth.shape
        assert a.dtype == b.dtype
        assert error(a, truth) < slack * error(b, truth) + 1e-12, f"number {place} (0 is the output)"


def made(function: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    return randomize(function(*args, **options)).to("cuda", BF16)


def of_module(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    names = [name for name, _ in module.named_parameters()]

    def called(x: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
        return output

    return gradients(called, [x, *(p.detach() for p in module.parameters())], grad)


NORMS = {
    "rms": NormSpec(),
    "rms, an offset": NormSpec(offset=1.0, fp32=True, initial=0.0),
    "layer": NormSpec(kind="layer", bias=True),
    "layer, an offset, no bias": NormSpec(kind="layer", offset=1.0, initial=0.0),
}


@pytest.mark.parametrize("spec", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("width", [64, 100, 129, 1536, 4096, 5000, 8192])
def test_norms(spec: NormSpec, width: int) -> None:
    ours = made(te_norm, spec, width, 1e-6)
    kind = RMSNorm if spec.kind == "rms" else LayerNorm
    eager = kind(width, 1e-6, fp32=spec.fp32, bias=spec.bias, offset=spec.offset).to("cuda", BF16)
    eager.kernels = False  # type: ignore[assignment]
    eager.load_state_dict(ours.state_dict())
    x, grad = torch.randn(2, 3, 61, width, device="cuda").to(BF16)
    exact = of_module(copy.deepcopy(eager).double(), x.double(), grad.double())
    # eager's gradient of the weight is summed in bf16 at times: ours may be far nearer, never further
    assert_no_further(of_module(ours, x, grad), of_module(eager, x, grad), exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (512, 1376), (1536, 8)], ids=str)
def test_linear_layers(shape: tuple[int, int], bias: bool) -> None:
    ours = made(TELinear, *shape, bias=bias)
    eager = nn.Linear(*shape, bias=bias, device="cuda", dtype=BF16)
    eager.load_state_dict(ours.state_dict())
    x, grad = torch.randn(3, 37, shape[0], device="cuda", dtype=BF16), torch.randn(3, 37, shape[1], device="cuda")
    grad = grad.to(BF16)
    exact = of_module(copy.deepcopy(eager).double(), x.double(), grad.double())
    assert_no_further(of_module(ours, x, grad), of_module(eager, x, grad), exact)


@pytest.mark.parametrize("positions", ["alike", "packed"])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("rope", ROPES)
def test_every_type_of_rope(rope: str, share: float, positions: str) -> None:
    """Queries and keys as the decoder gives them; ``share`` of their channels turn."""
    parameters = {"rope_theta": 10000.0, "rope_type": "default", **ROPES[rope], "partial_rotary_factor": share}
    if rope == "longrope":
        half = int(64 * share) // 2
        parameters |= {name: torch.linspace(1, 3, half).tolist() for name in ("short_factor", "long_factor")}
    table = RotaryEmbedding(tiny(head_dim=64, rope_parameters=parameters), RopeSpec(share=share)).cuda()
    query, key, _, grad = heads(4, 64)
    where = (POSITIONS if positions == "packed" else torch.arange(POSITIONS.shape[1])[None]).cuda()

    def by_tables(q: Tensor, k: Tensor) -> Tensor:
        table.fused = False
        cos, sin = table(q, where)
        return torch.cat(apply_rotary_pos_emb(q, k, cos, sin), 1)

    def by_angles(q: Tensor, k: Tensor) -> Tensor:
        table.fused = True
        return torch.cat(turn(q, k, table(q, where)), 1)

    both = torch.cat((grad, grad[:, :, :2]), 2).transpose(1, 2)
    exact = gradients(by_tables, [query.double(), key.double()], both.double())
    ours = gradients(by_angles, [query, key], both)
    assert error(ours[0], exact[0]) > 0
    assert_no_further(ours, gradients(by_tables, [query, key], both), exact)


def attend(name: str, inputs: list[Tensor], window: int | None, documents: Documents | None = None) -> list[Tensor]:
    """As `test_varlen.attend`, which knows sdpa with a mask, and varlen."""
    if name != "te":
        return test_varlen.attend(name, inputs, window)
    from nemo_automodel.components.models.common.te.attention import te_attention_forward

    query, key, value, grad = inputs
    layer: Any = SimpleNamespace(training=False, is_causal=True)
    seen = Documents.of(POSITIONS.cuda()) if documents is None else documents

    def called(*x: Tensor) -> Tensor:
        return te_attention_forward(layer, *x, seen, scaling=query.shape[-1] ** -0.5, sliding_window=window)[0]

    return gradients(called, [query, key, value], grad)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_attention_of_packed_documents(group: int, head_dim: int, window: int | None) -> None:
    inputs = heads(group, head_dim)
    exact = [torch.cat(parts) for parts in zip(*rowwise(inputs, window), strict=True)]
    assert_no_further(attend("te", inputs, window), attend("sdpa", inputs, window), exact)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_of_a_document_in_each_row(head_dim: int, window: int | None) -> None:
    """The plain case, which takes another kernel: it equals the packed one given the same bounds."""
    inputs = heads(4, head_dim)
    batch, _, length, _ = inputs[0].shape
    plain = attend("te", inputs, window, Documents.rows(batch, length, torch.device("cuda")))
    ends = torch.tensor([0, length, 2 * length, 2 * length], dtype=torch.int32, device="cuda")  # an empty one more
    bounded = attend("te", inputs, window, Documents(ends, length))
    for a, b in zip(plain, bounded, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # two kernels, in bf16


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_document_leaves_the_others_alone(head_dim: int) -> None:
    inputs = heads(4, head_dim)
    begin, end = 201, 257  # the third document of the first row
    changed = [x.clone() for x in inputs]
    for x in changed[:3]:
        x[0, :, begin:end] = x[0, :, begin:end].flip(-1) * 2
    before, after = (attend("te", each, None)[0] for each in (inputs, changed))
    assert not torch.equal(before[0, begin:end], after[0, begin:end])
    before[0, begin:end] = after[0, begin:end] = 0
    assert torch.equal(before, after)


def test_deterministic_attention_is() -> None:
    inputs = heads(8, 128)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (attend("te", inputs, None) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


def test_dropout_drops_in_training_only() -> None:
    _, ours = large(LlamaForCausalLM, attention_dropout=0.5)
    ours.set_attn_implementation("te")
    ids = tokens(2, 64).cuda()
    with torch.no_grad():
        one, two = (ours.train()(ids, use_cache=False).logits for _ in range(2))
        assert not torch.equal(one, two)
        one, two = (ours.eval()(ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(one, two)


def large(kind: Any, config: Any = None, backend: dict[str, Any] | None = None, **changes: Any) -> tuple[Any, Any]:
    """transformers' model in float64, and ours on the GPU in bf16, wide enough to round on average."""
    shape = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2}
    made = {**shape, "head_dim": 64, "max_position_embeddings": 512, **changes}
    config = tiny(*([] if config is None else [config]), attn="eager", **made)
    hf, ours = twins(kind, config, backend=backend)
    for model in (hf, ours):  # randomize's weights are for narrow layers; these would saturate
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data *= 0.25
    return copy.deepcopy(hf).double().cuda(), ours.to("cuda", BF16).train()


WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
FAMILIES: dict[str, tuple[Any, ...]] = {
    "Llama": (LlamaForCausalLM, None, {}, ALL),
    "Qwen2, biases": (Qwen2ForCausalLM, Qwen2Config, {}, ALL),
    "Qwen3, norms of heads": (Qwen3ForCausalLM, Qwen3Config, {}, ALL),
    "Cohere2, windows, layer norms": (Cohere2ForCausalLM, Cohere2Config, WINDOWED, ALL),
    "Gemma2, windows and a softcap, which flex has": (
        *(Gemma2ForCausalLM, Gemma2Config),
        *({**WINDOWED, "query_pre_attn_scalar": 64}, {**ALL, "attn": "flex"}),
    ),
}


@pytest.mark.parametrize("batch", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_whole_models(family: tuple[Any, ...], batch: str) -> None:
    """Gradients no further from float64 than those of plain operations with masks."""
    kind, config, changes, backend = family
    eager = {"attn": "eager", "kernels": "torch"}
    exact, ours = large(kind, config, backend, **changes)
    _, plain = large(kind, config, eager, **changes)
    ids = tokens(*POSITIONS.shape).cuda()
    real = (torch.arange(ids.shape[1]) < torch.tensor([[384], [364]])).long().cuda()
    inputs = {"position_ids": POSITIONS.cuda(), "labels": ids}
    if batch == "padded":
        inputs = {"attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}
    for model in (exact, ours, plain):
        model(input_ids=ids, use_cache=False, **inputs).loss.backward()
    truth = ours.state_dict_adapter.from_hf({name: p.grad for name, p in exact.named_parameters()})
    errors = {name: error(p.grad, truth[name]) for name, p in plain.named_parameters()}
    for name, parameter in ours.named_parameters():
        # one draw of roundings each, of all the layers above: they vary by a tenth or two
        assert error(parameter.grad, truth[name]) < 1.3 * errors[name], name


def test_what_its_attention_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'te' has no softcap on the scores.*'flex'"):
        NeMoAutoModelForCausalLM.from_config(tiny(Gemma2Config, head_dim=64), backend={"attn": "te"})
    model = NeMoAutoModelForCausalLM.from_config(tiny(head_dim=64), backend={"attn": "te"}).cuda()
    with pytest.raises(ValueError, match="'te' has no kernel for float32 on cuda"):
        model(tokens(1, 8).cuda(), use_cache=False)


def test_greedy_tokens_are_those_of_torch() -> None:
    """In float32, norms and RoPE by Transformer Engine; in bf16, everything, wherever the choice is clear."""
    exact, ours = large(LlamaForCausalLM, backend={"rms_norm": "te", "rope_fusion": True})
    ids = tokens(2, 5).cuda()
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = exact.generate(ids, **options)
    assert torch.equal(ours.float().eval().generate(ids, **options), _reloaded(ours, exact).generate(ids, **options))
    _, half = large(LlamaForCausalLM, backend=ALL)
    with torch.no_grad():
        truth, found = exact(expected, use_cache=False).logits, half.eval()(expected, use_cache=False).logits
    first, second = truth.topk(2, -1).values.unbind(-1)
    clear = first - second > 0.1
    assert clear.float().mean() > 0.5
    assert torch.equal(found.argmax(-1)[clear], truth.argmax(-1)[clear])


def _reloaded(ours: Any, exact: Any) -> Any:
    """transformers' model with the weights that ours has, which were rounded."""
    model = copy.deepcopy(exact).float()
    model.load_state_dict(ours.state_dict_adapter.to_hf(ours.state_dict()))
    return model.eval()


TRAININGS: dict[str, dict[str, Any]] = {
    "everything": ALL,
    "linear layers and norms": {"linear": "te", "rms_norm": "te"},
    "current float8": {"linear": "te", "te_fp8.recipe": "current"},
    "block float8": {"linear": "te", "te_fp8.recipe": "block"},
    "delayed float8": {"linear": "te", "te_fp8.recipe": "delayed", "te_fp8.amax_history": 16},
}


def losses_of(overrides: Callable[..., list[str]], name: str, backend: dict[str, Any], **more: Any) -> list[float]:  # noqa: F811
    options = {f"model__backend__{field.replace('.', '__')}": value for field, value in backend.items()}
    steps = {"train__max_steps": 50, "optim__lr": "2e-3", **PACKED, **more}
    run = Run(load_config(TrainConfig, None, overrides(name, **options, **steps)), lambda line: None)
    for step in range(1, 51):
        run.step(step)
    return [row["loss"] for _, row in run.rows(until=50)]


@pytest.mark.parametrize("backend", TRAININGS.values(), ids=TRAININGS)
def test_fifty_steps_follow_the_reference(backend: dict[str, Any], overrides: Callable[..., list[str]]) -> None:  # noqa: F811
    reference = losses_of(overrides, "reference", {"attn": "sdpa", "kernels": "torch"})
    losses = losses_of(overrides, "ours", backend)
    assert reference[-1] < 0.8 * reference[0]
    if any(name.startswith("te_fp8") for name in backend):
        # three bits of every operand: where the loss has come to a tenth, some single step is 0.11 away
        apart = (torch.tensor(losses) / torch.tensor(reference) - 1).square().mean().sqrt()
        assert 0 < apart < 0.08
    else:  # bf16 rounds otherwise in each, which fifty steps add up
        assert losses == pytest.approx(reference, rel=0.04)


@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("backend", [ALL, {**ALL, "te_fp8": {}}], ids=["bf16", "float8"])
def test_layers_that_are_computed_again(backend: dict[str, Any], how: Any) -> None:
    from nemo_automodel.components.distributed.parallelize import _checkpoint_activations

    _, ours = large(LlamaForCausalLM, backend=backend)
    ids = tokens(*POSITIONS.shape).cuda()
    found = []
    for again in (False, True):
        if again:
            _checkpoint_activations(ours, how)
        ours.zero_grad()
        ours(ids, labels=ids, position_ids=POSITIONS.cuda(), use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in ours.named_parameters()})
    # the same operations; attention's gradients are summed in any order
    torch.testing.assert_close(*found, rtol=0.02, atol=1e-3)


def test_compiled_layers_compute_the_same() -> None:
    _, ours = large(LlamaForCausalLM, backend=ALL)
    ids = tokens(2, 64).cuda()
    found = []
    for compiled in (False, True):
        ours.zero_grad()
        for layer in ours.model.layers if compiled else ():
            layer.compile()
        ours(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in ours.named_parameters()})
    for name, gradient in found[0].items():
        assert error(found[1][name], gradient.double()) < 0.03, name  # fused operations round elsewhere


@pytest.fixture
def alone() -> Iterator[Any]:
    """A mesh of this process alone."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", [ALL, {**ALL, "te_fp8": {}}], ids=["bf16", "float8"])
@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_sharded_over_one_gpu(kind: str, backend: dict[str, Any], alone: Any) -> None:
    """Parameters are DTensors; two steps, so that what is gathered again is used."""
    gradients = []
    for sharded in (False, True):
        _, ours = large(Qwen3ForCausalLM, Qwen3Config, backend)
        if sharded and kind == "fsdp":
            fully_shard_layers(ours, {"DecoderLayer"}, alone)
        elif sharded:
            parallelize_tensors(ours, tp_plan_of(ours), alone, {"DecoderLayer"})
        ids = tokens(2, 64).cuda()
        for _ in range(2):
            ours(ids, labels=ids, use_cache=False).loss.backward()
        whole = {name: p.grad for name, p in ours.named_parameters()}
        gradients.append({name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in whole.items()})
    for name, gradient in gradients[0].items():
        assert error(gradients[1][name], gradient.double()) < 0.02, name


RECIPES = [TEFloat8(), TEFloat8(recipe="block"), TEFloat8(recipe="delayed"), TEFloat8(format="e4m3")]


@pytest.mark.parametrize("float8", RECIPES, ids=lambda float8: f"{float8.recipe} {float8.format}")
@pytest.mark.parametrize("count", [128, 61])
def test_products_in_float8(float8: TEFloat8, count: int) -> None:
    """Near bf16's, as near as three bits of mantissa are, and not the same; any number of tokens."""
    ours = made(TELinear, 256, 512, float8=float8)
    x, grad = (torch.randn(count, width, device="cuda", dtype=BF16) for width in (256, 512))
    for _ in range(3):  # delayed scales are of the steps before
        found = of_module(ours, x, grad)
    eager = nn.Linear(256, 512, device="cuda", dtype=torch.double)
    eager.load_state_dict(ours.state_dict())
    for a, truth in zip(found[:3], of_module(eager, x.double(), grad.double())[:3], strict=True):
        assert 0.005 < error(a, truth) < 0.08


def test_histories_are_saved_and_come_back(overrides: Callable[..., list[str]]) -> None:  # noqa: F811
    """Six steps at once are three and three more."""
    backend = {"linear": "te", "te_fp8.recipe": "delayed", "te_fp8.amax_history": 8}
    options = {f"model__backend__{field.replace('.', '__')}": value for field, value in backend.items()}
    options |= {"model__backend__attn": "sdpa", "train__max_steps": 6}

    def steps(name: str, end: int) -> tuple[list[float], dict[str, Tensor]]:
        run = Run(load_config(TrainConfig, None, overrides(name, **options)), lambda line: None)
        began = {name: tensor.clone() for name, tensor in float8_state(run.model).items()}
        for step in range(run.done + 1, end + 1):
            run.step(step)
        losses = [row["loss"] for _, row in run.rows(until=end)]
        run.save(end)
        run.checkpoints.wait()
        ended = {name: tensor.clone() for name, tensor in float8_state(run.model).items()}
        states.append((began, ended))
        return losses, ended

    states: list[Any] = []
    whole, at_once = steps("a", 6)
    parts = [loss for end in (3, 6) for loss in steps("b", end)[0]]
    torch.testing.assert_close(states[2][0], states[1][1], rtol=0, atol=0)
    assert any(tensor.any() for name, tensor in states[1][1].items() if "amax" in name)
    assert parts == pytest.approx(whole, rel=1e-3)
    torch.testing.assert_close(states[2][1], at_once, rtol=0.05, atol=1e-3)


def test_exported_and_loaded_without_extra_states(tmp_path: Path) -> None:
    _, ours = large(LlamaForCausalLM, backend={**ALL, "te_fp8": {"recipe": "delayed"}})
    ids = tokens(2, 64).cuda()
    ours(ids, labels=ids, use_cache=False).loss.backward()
    ours.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "extra" in key]
    loaded = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, device="cuda", backend=ALL)
    plain = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, device="cuda")
    assert loaded.load_state_dict(ours.state_dict()).missing_keys == []
    with torch.no_grad():
        a, b = (model(ids, use_cache=False).logits for model in (loaded, plain))
    assert error(a, b.double()) < 0.02


def test_modules_of_the_package_itself_neither_leak_nor_block(tmp_path: Path) -> None:
    """In a model written by hand, of whatever is in the package."""
    te = package("pytorch")
    _, ours = large(LlamaForCausalLM)
    _, plain = large(LlamaForCausalLM)
    layer = ours.model.layers[0]
    linear = te.Linear(768, 512, bias=False, params_dtype=BF16, device="cuda")
    linear.load_state_dict(layer.mlp.down_proj.state_dict(), strict=False)
    layer.mlp.down_proj = linear
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    ours.save_pretrained(tmp_path)
    loaded = NeMoAutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.cuda().parameters(), plain.parameters()))


def test_gradients_of_padded_tokens_are_of_float8_too() -> None:
    """What fills the tokens up leaves nothing behind."""
    linear = made(TELinear, 64, 64, float8=TEFloat8())
    x = torch.randn(5, 64, device="cuda", dtype=BF16)
    filled = F.pad(x, (0, 0, 0, 11))
    grad = torch.randn(5, 64, device="cuda", dtype=BF16)
    short, long = of_module(linear, x, grad), of_module(linear, filled, F.pad(grad, (0, 0, 0, 11)))
    torch.testing.assert_close(short[2], long[2], rtol=0, atol=0)
    torch.testing.assert_close(short[1], long[1][:5], rtol=0, atol=0)
