"""Async tensor parallelism: Inductor fuses every product along the sequence in our layers, and they train the same.

There is no symmetric memory here: what torch's fused operations compute is computed part by part, one after the other.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.fx_passes import post_grad
from transformers import LlamaConfig, Qwen2Config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.distributed import Mesh, Options, parallelize
from nemo_automodel.components.models.common.tp_plan import tp_plan_of
from nemo_automodel.components.peft import LoRAConfig, apply_lora, init_adapters, layout_of
from nemo_automodel.recipes.plan import pretended
from tests.conftest import tiny
from tests.distributed.equality import SABOTAGE, assert_equal_training, options_of, record, words_of


@contextmanager
def _watching() -> Iterator[list[Counter[str]]]:
    """Of each graph that has collectives among its products, its operations after Inductor's pass; the layers' only."""
    found: list[Counter[str]] = []
    fuse = post_grad.micro_pipeline_tp_pass

    def spy(graph: torch.fx.Graph) -> None:
        fuse(graph)
        operations = Counter(str(node.target).removesuffix(".default") for node in graph.nodes)
        if operations["symm_mem.fused_all_gather_matmul"] or operations["aten.mm"]:
            found.append(operations)

    with pytest.MonkeyPatch.context() as patch, inductor.patch(force_disable_caches=True):
        SABOTAGE["_async_on_cpu"](patch)
        patch.setattr(post_grad, "micro_pipeline_tp_pass", spy)
        yield found


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("config_class", "lora"),
    [
        (LlamaConfig, None),
        (LlamaConfig, {"r": 4}),
        pytest.param(Qwen2Config, None, marks=pytest.mark.slow),
        pytest.param(Qwen2Config, {"r": 4, "dora": True}, marks=pytest.mark.slow),
    ],
    ids=["full", "LoRA", "biases", "biases, DoRA"],
)
def test_nothing_that_layers_send_along_the_sequence_is_left_alone(
    config_class: Any, lora: dict[str, Any] | None
) -> None:
    torch._dynamo.reset()
    with pretended(0, 2), _watching() as graphs:
        model = NeMoAutoModelForCausalLM.from_config(tiny(config_class, num_hidden_layers=2))
        if lora is not None:
            apply_lora(model, LoRAConfig(**lora), layout_of(model))
            init_adapters(model, 0)
        parallelize(model, Mesh({"tp": 2}, async_tp=True), Options(tp_plan=tp_plan_of(model), compile=True))
        ids = torch.zeros(2, 16, dtype=torch.long)
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    each = 2 if lora is None else 4  # wide products, and those of the adapters
    # of adapters in the first layer nobody asks for the gradient of the input
    first = set() if lora is None else {(each, each - 1)}
    names = ("symm_mem.fused_all_gather_matmul", "symm_mem.fused_matmul_reduce_scatter")
    assert {tuple(graph[name] for name in names) for graph in graphs} == {(each, each)} | first
    for graph in graphs:
        assert not [name for name in graph if re.search("all_gather_into|reduce_scatter_tensor", name)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"model__gradient_checkpointing": "selective"}),
        ("qwen2", {"data__packing": "true", "data__max_length": 96, "lora__r": 4}),
        ("qwen2", {"lora__r": 4, "lora__dora": "true"}),
    ],
    ids=str,
)
def test_fused_products_train_the_same(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    options = options_of(tmp_path, family, True, **more)
    record(words_of({**options, "output_dir": tmp_path / "one"}), tmp_path / "one-tensors")
    options |= {"model.compile": "true", "mesh.async_tp": "true"}
    assert_equal_training(tmp_path, options, {"tp": 2}, 2, "_async_on_cpu", timeout=480)  # Inductor's
