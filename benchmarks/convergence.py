"""Do fast variants learn what the reference learns? Loss curves of one small Llama on fixed data, side by side.

    python benchmarks/convergence.py                                              # 100M shapes, on a GPU
    python benchmarks/convergence.py --variant optim.moments=bfloat16 --variant backend.attn=flex
    python benchmarks/convergence.py --tiny                                       # on a CPU
    python benchmarks/convergence.py --tiny --variant model.float8=rowwise        # there, emulated in fp32
    python benchmarks/convergence.py --lora --variant lora.base_dtype=float8      # adapters on frozen weights

Random models (of seeds 0 and 1, or as many as --seeds says) are trained on the same data in every variant, each from
the same weights: by transformers in fp32 with eager attention (the reference), by transformers in bf16 with torch's
AdamW on the bf16 parameters, by this library in bf16 with its defaults, and once more for each --variant. The data is
a Markov chain of order two, so the loss can fall from ln(tokens) to the chain's entropy. With --lora the weights,
which have learnt the chain with its likeliest tokens the least likely, are frozen under adapters of every projection,
peft's in the reference; all begin as this library draws them. A variant's distance is the mean absolute difference of
its smoothed loss curve to the reference's, from the same weights. Status 1: one of ours is further than the reference
is from itself between seeds, in the mean over them.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from nemo_automodel.components.float8_training import to_float8
from nemo_automodel.components.optim import OptimConfig
from nemo_automodel.components.peft import save_adapter
from nemo_automodel.recipes.bench_variant import BenchConfig, Job, bench_config, our_job
from nemo_automodel.recipes.building import pick_device

SHOWN = (1, 10, 50, 100, 200)
WINDOW = 10
ADAPTER = "adapter"
"""Folder beside the weights, of where all adapters begin."""
REFERENCE, HF_BF16 = "hf float32 eager", "hf bfloat16"
PROBABILITIES = (0.5, 0.25, 0.125, 0.125)


@dataclass(frozen=True)
class Size:
    """Shapes, and rows and tokens of a step."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    rows: int
    length: int
    lr: float
    tied: bool = False
    rank: int | None = None

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=self.length,
            tie_word_embeddings=self.tied,
        )


SMALL = Size(512, 768, 2560, 12, 12, rows=32, length=512, lr=1e-3)
TINY = Size(512, 64, 160, 2, 4, rows=8, length=64, lr=5e-3)


class Chain:
    """A Markov chain of order two: which four tokens may follow a token depends on the group of the one before.

    Args:
        tokens: how many there are.
        groups: of tokens, as far as a token two places on is concerned.
        probabilities: of the four.
    """

    def __init__(self, tokens: int, groups: int = 4, probabilities: Sequence[float] = PROBABILITIES):
        self.tokens, self.groups, self.probabilities = tokens, groups, torch.tensor(probabilities)
        generator = torch.Generator().manual_seed(1234)
        self.following = torch.randint(0, tokens, (groups, tokens, len(probabilities)), generator=generator)
        self.entropy = -sum(p * math.log(p) for p in probabilities)

    def batch(self, rows: int, length: int, number: int) -> Tensor:
        """Token ids ``[rows, length]`` of step ``number``, always the same ones."""
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, self.tokens, (rows, length), generator=generator)
        choices = torch.multinomial(self.probabilities, rows * length, True, generator=generator)
        for t in range(2, length):
            choice = choices.view(rows, length)[:, t]
            ids[:, t] = self.following[ids[:, t - 2] % self.groups, ids[:, t - 1], choice]
        return ids


def optimizer_options(size: Size, steps: int) -> OptimConfig:
    lr = size.lr * (2 if size.rank else 1)  # adapters want larger steps
    return OptimConfig(lr=lr, warmup_steps=steps // 10, min_lr_ratio=0.1)


def transformers_curve(
    folder: Path, dtype: torch.dtype, attn: str, batches: Sequence[Tensor], optim: OptimConfig, device: torch.device
) -> list[float]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn)
    if (folder / ADAPTER).exists():
        model = PeftModel.from_pretrained(model, folder / ADAPTER, is_trainable=True, autocast_adapter_dtype=False)
    model.to(device).train()
    betas, trained = (optim.beta1, optim.beta2), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, betas=betas, eps=optim.eps, weight_decay=0.0)
    losses = []
    for number, ids in enumerate(batches):
        ids = ids.to(device)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(number, len(batches))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optim.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def our_config(folder: Path, size: Size, optim: OptimConfig, overrides: Sequence[str]) -> BenchConfig:
    words = [f"--model.path={folder}", "--model.dtype=bfloat16", f"--train.batch_size={size.rows}"]
    words += [f"--optim.{key}={getattr(optim, key)}" for key in ("lr", "warmup_steps", "min_lr_ratio")]
    if size.rank:
        words.append(f"--lora={{r: {size.rank}, alpha: {2 * size.rank}}}")
    config = bench_config(words, overrides)
    if (config.lora.r if config.lora else None) != size.rank or config.train.batch_size != size.rows:
        raise ValueError(f"{' '.join(overrides)}: would train something else, which no curve here can be compared with")
    return config


def our_curve(config: BenchConfig, batches: Sequence[Tensor], device: torch.device) -> list[float]:
    recipe = config.model.float8
    if emulated := recipe != "off" and device.type == "cpu":
        config = replace(config, model=replace(config.model, float8="off"))
    job = our_job(config, device)
    if emulated:
        to_float8(job.model, recipe, emulate=True)
    return losses_of(job, batches, config.optim)


def losses_of(job: Job, batches: Sequence[Tensor], optim: OptimConfig) -> list[float]:
    losses = []
    for number, ids in enumerate(batches):
        loss = job.step({"input_ids": ids, "labels": ids}, optim.lr_at(number, len(batches)))
        losses.append(loss.clone() if isinstance(loss, Tensor) else loss)
    return [float(loss) for loss in losses]


def adapt(folder: Path, size: Size, steps: int, optim: OptimConfig, device: torch.device) -> None:
    """Weights that know another chain take the place of those in ``folder``, and adapters lie beside them."""
    whole, other = replace(size, rank=None), Chain(size.vocabulary, probabilities=PROBABILITIES[::-1])
    first = optimizer_options(whole, steps)
    job = our_job(our_config(folder, whole, first, []), device)
    losses = losses_of(job, [other.batch(size.rows, size.length, number) for number in range(steps)], first)
    print(f"weights that know another chain: {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
    job.model.save_pretrained(folder)
    (folder / ADAPTER).mkdir(exist_ok=True)
    save_adapter(our_job(our_config(folder, size, optim, []), device).model, folder / ADAPTER)


def smoothed(curve: Sequence[float]) -> Tensor:
    """The mean of each step and up to nine before it."""
    return torch.tensor([sum(curve[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(curve))])


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    return (smoothed(one) - smoothed(other)).abs().mean().item()


def curves_of(
    size: Size,
    variants: Sequence[Sequence[str]],
    steps: int,
    seeds: int,
    device: torch.device,
    done: Callable[[dict[str, list[list[float]]]], object],
) -> dict[str, list[list[float]]]:
    """The loss of each step, by variant and seed; ``done`` is called with all of them after each curve."""
    chain, optim = Chain(size.vocabulary), optimizer_options(size, steps)
    batches = [chain.batch(size.rows, size.length, number) for number in range(steps)]
    curves: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="convergence-") as name:
        folder = Path(name)
        size.config().save_pretrained(folder)
        configs = {" ".join(["ours", *words]): our_config(folder, size, optim, words) for words in variants}
        for seed in range(seeds):
            torch.manual_seed(seed)
            LlamaForCausalLM(size.config()).save_pretrained(folder)
            if size.rank:
                adapt(folder, size, steps, optim, device)
            jobs: dict[str, Callable[[], list[float]]] = {
                REFERENCE: partial(transformers_curve, folder, torch.float32, "eager", batches, optim, device),
                HF_BF16: partial(transformers_curve, folder, torch.bfloat16, "sdpa", batches, optim, device),
                **{name: partial(our_curve, config, batches, device) for name, config in configs.items()},
            }
            for variant, job in jobs.items():
                curve = job()
                curves.setdefault(variant, []).append(curve)
                print(f"seed {seed}, {variant}: {curve[0]:.3f} to {curve[-1]:.3f}", flush=True)
                done(curves)
    return curves


def show(curves: dict[str, list[list[float]]], size: Size, steps: int) -> bool:
    """Print the table; whether each of ours is as near to the reference as the reference to itself."""
    shown = [step for step in SHOWN if step <= steps]
    entropy = Chain(size.vocabulary).entropy
    noise = mean(distance(*pair) for pair in combinations(curves[REFERENCE], 2))
    width = max(map(len, curves))
    print(f"\nknowing nothing: a loss of {math.log(size.vocabulary):.3f}; the chain: {entropy:.3f}; means of the seeds")
    heads = "".join(f"{f'step {step}':>10}" for step in shown)
    print(f"{'':{width}}  {heads}    distance")
    near = True
    for name, of_seeds in curves.items():
        means = [mean(curve[step - 1] for curve in of_seeds) for step in shown]
        apart = mean(distance(*both) for both in zip(of_seeds, curves[REFERENCE], strict=True))
        far = not apart <= noise  # NaN is far
        near &= not (far and name.startswith("ours"))
        verdict = "" if name == REFERENCE else "  further than the seeds" if far else "  within the seeds' noise"
        print(f"{name:{width}}  {''.join(f'{each:10.4f}' for each in means)}  {apart:10.5f}{verdict}")
    print(f"{'between seeds of the reference':{width}}  {noise:.5f}")
    return near


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tiny", action="store_true", help="two layers, for a CPU")
    parser.add_argument("--tied", action="store_true", help="a head that is the embeddings' weight too")
    parser.add_argument("--lora", action="store_true", help="adapters of every projection, on frozen weights")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2, help="random models (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the curves, after each")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    size, device = TINY if options.tiny else SMALL, pick_device(options.device)
    if device.type == "cpu" and not options.tiny:
        parser.error("no GPU here: use --tiny")
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: the noise is between two at least")
    size = replace(size, tied=options.tied, rank=16 if options.lora else None)

    def keep(curves: dict[str, list[list[float]]]) -> None:
        if options.json:  # whatever comes later
            options.json.write_text(json.dumps(curves))

    curves = curves_of(size, [[], *options.variant], options.steps, options.seeds, device, keep)
    return 0 if show(curves, size, options.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
