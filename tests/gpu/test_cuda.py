"""On a CUDA device: the fused models against transformers in fp32 and bf16, and the training loop end to end.

Run on a GPU machine with ``pytest -m gpu tests/gpu``.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.config import load_config
from nemo_automodel.recipes.train import TrainConfig, train
from tests.conftest import assert_same_step, tiny, tokens, twins
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FAMILIES = {
    "llama": (LlamaForCausalLM, {"head_dim": 64, "hidden_size": 128}),
    "qwen2 sliding": (
        Qwen2ForCausalLM,
        {"hidden_size": 128, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
}
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
PACKED = torch.cat([torch.arange(20), torch.arange(13), torch.arange(31)])[None]


def _twins(family: str, attn: str) -> tuple[Any, Any]:
    hf_class, changes = FAMILIES[family]
    config = tiny(LlamaConfig if hf_class is LlamaForCausalLM else Qwen2Config, attn, **changes)
    return twins(hf_class, config)


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_fp32_logits_loss_and_gradients(family: str, attn: str, packed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    hf, ours = (model.cuda() for model in _twins(family, attn))
    ids = tokens(1, 64).cuda()
    extra = {"position_ids": PACKED.cuda()} if packed else {}
    # the embedding's gradient is summed by atomics in any order: measured up to 1.05e-5 apart on an H100
    assert_same_step(hf, ours, input_ids=ids, labels=ids, use_cache=False, atol=3e-5, **extra)


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("rms_norm", ["torch", "torch_fp32"])
def test_bf16_is_no_further_from_float64_than_transformers(attn: str, rms_norm: str) -> None:
    """Mean error over eight seeds: one draw of roundings varies by some tenths, the mean by a few hundredths."""
    errors: dict[str, list[float]] = {"hf": [], "ours": []}
    for seed in range(8):
        hf_class, changes = FAMILIES["llama"]
        hf, ours = twins(hf_class, tiny(attn=attn, **changes), seed, backend={"rms_norm": rms_norm})
        exact = copy.deepcopy(hf)
        exact.set_attn_implementation("eager")
        exact = exact.double().cuda()
        ids = tokens(2, 64, seed).cuda()
        truth = exact(ids).logits
        for name, model in (("hf", hf), ("ours", ours)):
            output = model.to("cuda", torch.bfloat16)(ids).logits.double()
            errors[name].append(((output - truth).norm() / truth.norm()).item())
    hf_error, our_error = (sum(errors[name]) / 8 for name in ("hf", "ours"))
    assert 0 < our_error < 1.1 * hf_error, errors


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
def test_packed_documents_do_not_see_each_other(attn: str) -> None:
    _, ours = _twins("llama", attn)
    ours.cuda().bfloat16()
    ids = tokens(1, 64).cuda()
    other = ids.clone()
    other[:, :20] = tokens(1, 20, seed=1).cuda()
    with torch.no_grad():
        a, b = (ours(x, position_ids=PACKED.cuda(), use_cache=False).logits for x in (ids, other))
    assert torch.equal(a[:, 20:], b[:, 20:])
    assert not torch.equal(a[:, :20], b[:, :20])


def test_loading_onto_the_device_leaves_nothing_behind(checkpoint: Path) -> None:  # noqa: F811
    model = NeMoAutoModelForCausalLM.from_pretrained(checkpoint, device="cuda", dtype="bfloat16")
    same = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).float().cuda()
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = tokens(1, 16).cuda()
    assert torch.equal(model.float().generate(ids, max_new_tokens=12), same.generate(ids, max_new_tokens=12))


@pytest.mark.parametrize("options", [{}, {"lora__r": 4}], ids=["full", "lora"])
def test_training_in_bf16_learns_resumes_and_exports(
    overrides: Callable[..., list[str]],  # noqa: F811
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    packing = {"data__packing": "true", "data__max_length": 128, "train__batch_size": 2, "train__micro_batch_size": 1}
    words = overrides(train__max_steps=20, train__save_every=20, **packing, **options)
    summary = train(load_config(TrainConfig, None, words), say=lambda line: None)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert summary.loss < 0.7 * first["loss"]
    assert 0 < first["memory_gb"] < 1
    assert train(load_config(TrainConfig, None, words), say=lambda line: None).steps == 20
    exported = AutoModelForCausalLM.from_pretrained(summary.hf_folder)
    assert exported.dtype == torch.bfloat16
