"""Fold an adapter into its model, and prove on sample text that the export answers as the adapter did."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.tokenizer import load_tokenizer
from nemo_automodel.components.checkpoint import publish_folder
from nemo_automodel.components.models.common.pretrained import fetch
from nemo_automodel.components.peft import merge_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain of 3,000 metres it boils at about 90.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    'Question: which colour is between red and yellow?\nAnswer: {"colour": "orange"}',
)
_RANDOM_IDS, _SEED = 64, 0
# of a tokenizer and its chat template, as transformers, sentencepiece and tiktoken name them
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.jinja",
    "spiece.model", "sentencepiece*", "*.tiktoken", "additional_chat_templates",
)  # fmt: skip


@dataclass(frozen=True)
class Distance:
    """How far one model's next-token distributions are from another's, over all positions of the samples.

    Attributes:
        kl: mean over the positions of ``sum_v p(v) (log p(v) - log q(v))`` in nats, ``log p`` and ``log q`` being
            log-softmax in fp32 of the two models' logits.
        logits: the largest difference of two logits.
    """

    kl: float
    logits: float

    @classmethod
    def between(cls, reference: Sequence[Tensor], other: Sequence[Tensor]) -> "Distance":
        """``reference`` gives p, ``other`` q: per sample, logits ``[positions, vocabulary]``."""
        kls, largest = [], 0.0
        for p, q in zip(reference, other, strict=True):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
            largest = max(largest, (p.float() - q.float()).abs().max().item())
        return cls(torch.cat(kls).mean().item(), largest)


@dataclass(frozen=True)
class Receipt:
    """What `merge` did.

    Attributes:
        folder: the export.
        dtype: of its weights.
        samples: what the distances were taken on, in words.
        merged: adapter on the model vs. merged in memory.
        reloaded: adapter on the model vs. the export, loaded again.
        export: merged in memory vs. the export, loaded again; zero is expected.
    """

    folder: Path
    dtype: str
    samples: str
    merged: Distance
    reloaded: Distance
    export: Distance

    def lines(self) -> list[str]:
        """The receipt as it is printed."""
        rows = [
            ("adapter vs merged", self.merged),
            ("adapter vs reloaded export", self.reloaded),
            ("merged vs reloaded export", self.export),
        ]
        return [
            f"{self.folder}: merged, plain Hugging Face format, {self.dtype}",
            f"on {self.samples}:",
            *(f"  {name:<27} KL {d.kl:.3e} nats   max logit difference {d.logits:.3e}" for name, d in rows),
            "  (KL: mean over positions of sum_v p (log p - log q), log-softmax in fp32, p being the first of the two;",
            "  1e-7 either side of zero is rounding)",
        ]


def merge(
    model: str | Path, adapter: str | Path, out: str | Path, *, dtype: str = "auto", device: str = "auto"
) -> Receipt:
    """Write ``model`` with ``adapter`` folded in to ``out``: weights, config, tokenizer and chat template.

    Args:
        model: checkpoint folder or Hub id.
        adapter: folder in peft's format.
        out: folder to write; it must not hold a model.
        dtype: of the weights (default: the model's own); the sum is taken in fp32 and rounded to it once.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...

    Raises:
        CheckpointError: the model cannot be loaded.
        ValueError: ``out`` holds a model or is the model's or adapter's folder, or the adapter cannot be honoured.
    """
    out = Path(out)
    _refuse_out(out, Path(model), Path(adapter))
    base = fetch(model)
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    name, samples, description, with_adapter, merged = _export(base, adapter, out, options)
    # only now: two models at once need not fit
    reloaded = _logits(NeMoAutoModelForCausalLM.from_pretrained(out, **options), samples)
    return Receipt(
        folder=out,
        dtype=name,
        samples=description,
        merged=Distance.between(with_adapter, merged),
        reloaded=Distance.between(with_adapter, reloaded),
        export=Distance.between(merged, reloaded),
    )


def _export(
    base: Path, adapter: str | Path, out: Path, options: dict[str, Any]
) -> tuple[str, list[Tensor], str, list[Tensor], list[Tensor]]:
    """Write the folder; returns dtype, samples, their description, logits with the adapter and merged."""
    model = NeMoAutoModelForCausalLM.from_pretrained(base, adapter=adapter, **options)
    samples, description = _samples(base, model.config.vocab_size)
    with_adapter = _logits(model, samples)
    merge_lora(model)
    merged = _logits(model, samples)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        _copy_tokenizer(base, folder)

    publish_folder(out, write)
    return str(model.dtype).removeprefix("torch."), samples, description, with_adapter, merged


def _refuse_out(out: Path, model: Path, adapter: Path) -> None:
    for what, folder in (("model", model), ("adapter", adapter)):
        if out.exists() and folder.exists() and out.samefile(folder):
            raise ValueError(f"--out {out} is the {what}'s own folder; choose another")
    if out.is_dir():
        weights = (*out.glob("*.safetensors*"), *out.glob("*.bin"), *out.glob("config.json"))
        if held := sorted(file.name for file in weights):
            raise ValueError(
                f"--out {out} holds a model or an adapter already ({held[0]}); choose another, or empty it"
            )


def _samples(folder: Path, vocabulary: int) -> tuple[list[Tensor], str]:
    """Token ids ``[1, positions]`` per sample, and what they are, in words."""
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab.*")):
        generator = torch.Generator().manual_seed(_SEED)
        ids = torch.randint(vocabulary, (len(SAMPLES), _RANDOM_IDS), generator=generator)
        return list(ids.split(1)), f"{ids.numel()} random token ids ({folder} has no tokenizer, so no text)"
    tokenizer = load_tokenizer(folder)
    encoded = [torch.tensor([tokenizer(text)["input_ids"]]) for text in SAMPLES]
    return encoded, f"{len(SAMPLES)} sample texts, {sum(ids.numel() for ids in encoded)} tokens"


@torch.no_grad()
def _logits(model: "PreTrainedModel", samples: Sequence[Tensor]) -> list[Tensor]:
    return [model(input_ids=ids.to(model.device)).logits[0].cpu() for ids in samples]


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """The files themselves: what a tokenizer class would write anew may differ from what it read."""
    for file in {file for pattern in _TOKENIZER_FILES for file in source.glob(pattern)}:
        if file.is_dir():
            shutil.copytree(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)
