"""Tokens/s and peak memory of one training step on a GPU, beside transformers (and peft), in one run.

    python benchmarks/step_speed.py

Llama-3.2-1B's shapes in bf16, random tokens, LoRA r=16 on all projections and full training. transformers trains its
bf16 parameters with torch's AdamW; this library keeps fp32 masters, as it does by default. Needs peft.
"""

import gc
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.optim import MasterAdamW, OptimConfig
from nemo_automodel.components.peft import LoRAConfig, apply_lora
from nemo_automodel.recipes.train import train_step

ROWS, LENGTH, WARM_UP, STEPS = 2, 4096, 3, 5
DEVICE = torch.device("cuda")


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def transformers_step(lora: bool) -> Callable[[torch.Tensor], None]:
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16, attn_implementation="sdpa").train()
    if lora:
        adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(ids: torch.Tensor) -> None:
        ids = ids.to(DEVICE)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(lora: bool) -> Callable[[torch.Tensor], None]:
    model = NeMoAutoModelForCausalLM.from_config(config(), dtype="bfloat16", device=DEVICE).train()
    if lora:
        apply_lora(model, LoRAConfig(), model.state_dict_adapter.layout)
    optimizer = MasterAdamW(((n, p) for n, p in model.named_parameters() if p.requires_grad), OptimConfig())
    return lambda ids: train_step(model, optimizer, [{"input_ids": ids, "labels": ids}], 1e-5, DEVICE) and None


def measure(name: str, step: Callable[[torch.Tensor], None]) -> None:
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(WARM_UP + STEPS):
        ids = torch.randint(0, 128256, (ROWS, LENGTH))  # on the CPU, as data comes
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(ids)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    speed = ROWS * LENGTH / median(seconds[WARM_UP:])
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"what": name, "tokens_per_second": round(speed), "peak_gib": round(peak, 1)}), flush=True)


def main() -> None:
    for lora in (True, False):
        for name, build in (("transformers", transformers_step), ("nemo_automodel", our_step)):
            measure(f"{name}, {'LoRA r=16' if lora else 'all weights'}", build(lora))
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
