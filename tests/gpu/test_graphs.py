"""CUDA graphs compute what the launches one by one do: losses, norms and weights over a few steps of training.

Run on a GPU machine with ``pytest -m gpu tests/gpu/test_graphs.py``.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from nemo_automodel.components.data import collate_packed
from nemo_automodel.components.data.examples import Example
from nemo_automodel.components.models.common.capabilities import ATTENTIONS, absent
from nemo_automodel.components.models.common.graphs import MOST, Graphs
from nemo_automodel.recipes.bench_variant import Job, bench_config, our_job
from tests.conftest import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")
WIDE = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 257,
    "pad_token_id": 0,
}
STEPS = 8
PACKAGES = ("flash2", "flash3")
"""Of FlashAttention; with version 4 graphs are refused."""


class Case(NamedTuple):
    """A training: the family, its options, how many rows a forward pass has, and the rows of each step."""

    config_class: Any = LlamaConfig
    options: tuple[str, ...] = ()
    tied: bool = True
    packed: bool = False
    window: int | None = None
    lengths: tuple[int, ...] = (96,)

    def batch(self, number: int) -> dict[str, Tensor]:
        """Four rows; with labels on some, and others at each step."""
        generator = torch.Generator().manual_seed(number)
        length = self.lengths[number % len(self.lengths)]
        if self.packed:
            documents = [[17, 40, 39], [96], [50, 46], [1] * 3 + [93]][number % 3 :]
            examples = [[self.example(n, generator) for n in row] for row in (documents * 2)[:4]]
            return collate_packed(examples, 96, 0)
        ids = torch.randint(1, 256, (4, length), generator=generator)
        labels = ids.clone()
        labels[:, : 20 * (number % 2)] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    @property
    def replays(self) -> int:
        """Of a training: forward and backward, of every micro-batch but the first of its shape."""
        return 2 * (STEPS * (2 if "train.micro_batch_size=2" in self.options else 1) - len(self.lengths))

    def example(self, length: int, generator: torch.Generator) -> Example:
        ids = torch.randint(1, 256, (length,), generator=generator)
        labels = ids.clone()
        labels[0] = -100
        return Example(ids, labels)

    def job(self, folder: Path, graphs: bool) -> Job:
        windows = {} if self.window is None else {"sliding_window": self.window}
        tiny(self.config_class, **WIDE, **windows, tie_word_embeddings=self.tied).save_pretrained(folder)
        words = [f"--model.path={folder}", "--model.from_scratch=true", "--train.batch_size=4", "--optim.lr=1e-3"]
        words += ["--model.dtype=bfloat16", f"--model.cuda_graphs={str(graphs).lower()}"]
        if any(option.startswith("lora") for option in self.options):
            words.append("--lora={r: 8, alpha: 32}")
        return our_job(bench_config(words, self.options), DEVICE, packing=self.packed)


CASES = {
    "all weights, tied": Case(),
    "all weights, biases, a head of its own": Case(Qwen2Config, tied=False),
    "norms of queries and keys": Case(Qwen3Config),
    "two micro-batches": Case(options=("train.micro_batch_size=2",)),
    "adapters": Case(options=("lora.r=8",)),
    "adapters, two micro-batches": Case(options=("lora.r=8", "train.micro_batch_size=2")),
    "adapters over float8": Case(options=("lora.r=8", "lora.base_dtype=float8")),
    "packed documents": Case(packed=True),
    "three lengths": Case(lengths=(96, 33, 64)),
    "windows": Case(MistralConfig, window=33),
    **{f"{name}, whole rows": Case(options=(f"backend.attn={name}",)) for name in PACKAGES},
    **{f"{name}, packed": Case(options=(f"backend.attn={name}",), packed=True) for name in PACKAGES},
    "torch's operations": Case(options=("backend.kernels=torch",)),
    "stochastic rounding": Case(options=("optim.masters=stochastic", "optim.moments=bfloat16")),
}


def trained(case: Case, folder: Path, graphs: bool) -> tuple[list[float], dict[str, Tensor], Any]:
    job = case.job(folder, graphs)
    losses = []
    for number in range(STEPS):
        losses.append(float(job.step(case.batch(number))))
        if number == 2:  # what has no gradient is computed as ever, in between
            job.model.eval()
            with torch.no_grad():
                job.model(case.batch(0)["input_ids"].to(DEVICE))
            job.model.train()
    weights = {name: p.detach().float() for name, p in job.model.named_parameters() if p.requires_grad}
    return losses, weights, job.model.base_model.graphs


def params() -> Iterator[Any]:
    """Cases of packages that are not installed say so."""
    for words, case in CASES.items():
        name = words.split(",")[0]
        why = absent(ATTENTIONS[name]) if name in PACKAGES else None
        yield pytest.param(case, id=words, marks=pytest.mark.skipif(why is not None, reason=f"{name} {why}"))


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each launch of a graph."""
    found: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(self: Any) -> None:
        found.append(1)
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return found


@pytest.mark.parametrize("case", list(params()))
def test_training_is_as_without(case: Case, tmp_path: Path, replays: list[int]) -> None:
    losses, weights, none = trained(case, tmp_path, graphs=False)
    again, weights_again, _ = trained(case, tmp_path, graphs=False)
    assert not replays
    ours, our_weights, graphs = trained(case, tmp_path, graphs=True)
    assert none is None
    assert len(graphs._made) == len(case.lengths)
    assert len(replays) == case.replays
    assert losses[0] != losses[-1]
    # attention's backward pass adds up in any order: the bound is a few times what two runs without differ by, and
    # far below what one step is worth
    apart = max(abs(a - b) for a, b in zip(losses, again, strict=True))
    assert ours == pytest.approx(losses, abs=4 * apart + 2e-3)
    for name, weight in weights.items():
        noise = (weight - weights_again[name]).norm() / weight.norm()
        assert (weight - our_weights[name]).norm() / weight.norm() <= 4 * noise + 5e-3, name


def test_of_many_shapes_the_first_have_graphs(tmp_path: Path) -> None:
    case = Case(lengths=tuple(range(32, 32 + 2 * (MOST + 2), 2)))
    job, without = case.job(tmp_path, graphs=True), case.job(tmp_path, graphs=False)
    numbers = range(2 * (MOST + 2))
    losses = [float(job.step(case.batch(number))) for number in numbers]
    assert losses == pytest.approx([float(without.step(case.batch(number))) for number in numbers], rel=5e-3)
    assert len(job.model.base_model.graphs._made) == MOST


def twice(backbone: Any, ids: Tensor) -> Tensor:
    """What the second pass gives, of which there is a graph."""
    for _ in range(2):
        hidden = backbone(ids, use_cache=False).last_hidden_state.detach()
    return hidden


def test_weights_that_moved_are_captured_anew(tmp_path: Path, replays: list[int]) -> None:
    case = Case()
    job = case.job(tmp_path, graphs=True)
    backbone, ids = job.model.base_model, case.batch(0)["input_ids"].to(DEVICE)
    before = twice(backbone, ids).clone()
    weight = backbone.layers[0].self_attn.qkv_proj.weight
    weight.data = torch.zeros_like(weight)
    after = twice(backbone, ids).clone()
    assert len(replays) == 1 + 2  # whose shape has been seen
    backbone.graphs = None
    assert torch.equal(after, backbone(ids, use_cache=False).last_hidden_state)
    assert not torch.equal(after, before)


def test_another_shape_within_a_step(tmp_path: Path, replays: list[int]) -> None:
    """Its graph is made while the gradients of the first one wait to be added up."""
    case, losses = Case(lengths=(96, 64)), []
    for graphs in (False, True):
        job = case.job(tmp_path, graphs)
        losses.append([float(job.step([case.batch(0), case.batch(1)])) for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)
    assert len(job.model.base_model.graphs._made) == 2
    assert len(replays) == 2 * 2 * 3


def test_auto_takes_them_where_the_host_would_be_waited_for(tmp_path: Path) -> None:
    case = Case()
    tiny(case.config_class, **WIDE).save_pretrained(tmp_path)
    words = [f"--model.path={tmp_path}", "--model.from_scratch=true", "--train.batch_size=4"]
    job = our_job(bench_config(words, []), DEVICE)
    graphs = job.model.base_model.graphs
    assert graphs.description.startswith("CUDA graphs for up to ")
    job.step(case.batch(0))
    job.step(case.batch(1))
    assert len(graphs._made) == 1
    graphs.tokens = 4 * 96 - 1
    graphs._made.clear()
    job.step(case.batch(0))
    assert not graphs._made


def test_what_it_does_not_know_is_computed_as_ever(tmp_path: Path) -> None:
    backbone = Case().job(tmp_path, graphs=True).model.base_model
    ids = Case().batch(0)["input_ids"].to(DEVICE)
    assert backbone(ids, use_cache=False, output_hidden_states=True).hidden_states is not None
    assert backbone(ids, use_cache=True).past_key_values is not None
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    masked = backbone(ids, attention_mask=mask, use_cache=False).last_hidden_state[:, 5:].detach()
    assert not backbone.graphs._made
    assert not torch.equal(masked, twice(backbone, ids)[:, 5:])
    assert len(backbone.graphs._made) == 1


def test_a_model_that_waits_for_the_device_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing left behind by a capture that failed: there was none."""
    case = Case()
    job = case.job(tmp_path, graphs=True)
    backbone, norm = job.model.base_model, type(job.model.base_model.norm).forward
    backbone.graphs = Graphs(backbone)
    monkeypatch.setattr(type(backbone.norm), "forward", lambda self, x: norm(self, x * (1 if x.sum().item() else 2)))
    with pytest.warns(UserWarning, match=r"cannot be a CUDA graph.*synchronizing"):
        losses = [float(job.step(case.batch(number))) for number in range(3)]
    assert all(map(math.isfinite, losses))
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device=DEVICE).isfinite().all()


def test_gradients_of_two_passes_at_once(tmp_path: Path, replays: list[int]) -> None:
    """The second must not overwrite what the first one keeps."""
    backbone = Case().job(tmp_path, graphs=True).model.base_model
    weight = backbone.layers[0].self_attn.qkv_proj.weight
    one, other = (Case().batch(number)["input_ids"].to(DEVICE) for number in (0, 1))

    def gradient(*ids: Tensor) -> Tensor:
        outputs = [backbone(each, use_cache=False).last_hidden_state for each in ids]
        (found,) = torch.autograd.grad(sum(each.float().square().sum() for each in outputs), [weight])
        return found.float().clone()

    gradient(one)
    first, second, both = gradient(one), gradient(other), gradient(one, other)
    assert len(replays) == 2 * 3  # the second of two at once has none
    assert (first + second - both).norm() < 0.02 * both.norm()  # bf16, three times
    assert (2 * second - both).norm() > 0.1 * both.norm()
