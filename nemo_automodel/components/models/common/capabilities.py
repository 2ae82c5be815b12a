"""What each implementation of attention, linear layers, norms and fused RoPE has, and where it runs: the one table.

It drives the refusals (`refuse`, which names what would do instead), ``docs/backends.md`` and `automodel backends`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Package(NamedTuple):
    """What an implementation comes from, if not from torch.

    Attributes:
        name: in words.
        module: what is imported.
        install: the command.
        distribution: where several share the module, the one that is meant.
        instead: module by which transformers gets it from the Hub where it is not installed.
    """

    name: str
    module: str
    install: str
    distribution: str | None = None
    instead: str | None = None

    def installed(self) -> bool:
        """Whether it is there, or comes when it is asked for; nothing is imported."""
        if self.instead is not None and find_spec(self.instead) is not None:
            return True
        if find_spec(self.module) is None:
            return False
        try:
            return self.distribution is None or bool(metadata.version(self.distribution))
        except metadata.PackageNotFoundError:
            return False


TE = Package(
    "Transformer Engine", "transformer_engine", "pip install --no-build-isolation 'transformer_engine[pytorch]'"
)
HUB = "kernels"
"""Module of the package that fetches kernels."""
FLASH2 = Package("FlashAttention 2", "flash_attn", "pip install --no-build-isolation flash-attn", "flash-attn", HUB)
FLASH3 = Package(
    "FlashAttention 3",
    "flash_attn_interface",
    "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130",
    instead=HUB,
)
FLASH4 = Package("FlashAttention 4", "flash_attn", "pip install --pre flash-attn-4", "flash-attn-4", HUB)

HALF = (torch.bfloat16, torch.float16)
SINGLE = (torch.float32, *HALF)
DOUBLE = (torch.float64, *SINGLE)
ANY = "any"
"""A device of any kind."""


class On(NamedTuple):
    """How an implementation runs on one kind of device.

    Attributes:
        dtypes: of queries, or of activations.
        head_dims: those that it takes; None: all. A list of some is of those that were tested.
        backward: whether it trains there.
        compute: the lowest compute capability, of a GPU.
    """

    dtypes: tuple[torch.dtype, ...] = DOUBLE
    head_dims: Sequence[int] | None = None
    backward: bool = True
    compute: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What is asked of an implementation; a field that is left at its default asks for nothing.

    Attributes:
        device: where it has to run.
        dtype: in which dtype; autocast counts.
        head_dim: of the attention.
        backward: whether gradients are wanted.
        packing: documents in a row that must not see each other.
        window: tokens that a token sees, its own included.
        softcap: of the scores.
        dropout: of attention weights.
        cache: of keys and values.
        left_padding: an attention_mask with zeros before ones.
        mask: masks ready made.
        later: attention to later tokens.
        deterministic: the same bits each time.
        tp: tensor-parallel ranks.
        cp: ranks that share sequences.
        kind: of norms, where it is not the plain one.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None
    head_dim: int | None = None
    backward: bool = False
    packing: bool = False
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    cache: bool = False
    left_padding: bool = False
    mask: bool = False
    later: bool = False
    deterministic: bool = False
    tp: int = 1
    cp: int = 1
    kind: str | None = None

    @classmethod
    def of(cls, x: Tensor, **more: Any) -> "Need":
        """What computing with ``x`` needs; autocast says the dtype where it is on."""
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        deterministic = torch.are_deterministic_algorithms_enabled()
        return cls(device=x.device, dtype=dtype, deterministic=deterministic, **more)


class Feature(NamedTuple):
    """Something that not every implementation has.

    Attributes:
        title: in the table.
        words: in a refusal, with the `Need`'s value for ``{}``.
        or_else: another way out than another implementation.
    """

    title: str
    words: str
    or_else: str = ""


class Gap(NamedTuple):
    """Something that is missing: ``what`` as it follows "has no", and a way out beside other implementations."""

    what: str
    or_else: str = ""


FEATURES = {
    "packing": Feature("packed documents", "packed documents"),
    "window": Feature("sliding windows", "sliding windows ({})"),
    "softcap": Feature("softcap", "softcap on the scores, as this model needs ({})"),
    "dropout": Feature("dropout", "dropout of attention weights ({})", "set attention_dropout=0.0"),
    "cache": Feature("cache, generation", "cache of keys and values", "give use_cache=False"),
    "left_padding": Feature(
        "padding on the left", "attention_mask with padding on the left or in between (on the right it is fine)"
    ),
    "mask": Feature("masks ready made", "masks ready made, only position_ids that start again"),
    "later": Feature("later tokens", "attention to later tokens"),
    "deterministic": Feature("deterministic", "deterministic mode"),
    "tp": Feature("tensor parallel", "tensor parallelism (mesh.tp={})"),
    "cp": Feature("context parallel", "sequences shared among ranks (mesh.cp={})"),
    "kind": Feature("other norms", "{}"),
}
"""Field of `Need` -> what it is called."""

_NOTHING = Need()


@dataclass(frozen=True, kw_only=True, eq=False)
class Capability:
    """One implementation.

    Attributes:
        field: of `BackendConfig`.
        name: the value of that field.
        what: in a few words.
        on: kind of device -> how it runs there; `ANY` stands for those that are not named.
        has: what of `FEATURES` it has -> how, in a word or two.
        implementation: transformers' name of an attention.
        package: where it is from, if not from torch.
    """

    field: str
    name: str | bool
    what: str
    on: Mapping[str, On]
    has: Mapping[str, str]
    implementation: str | None = None
    package: Package | None = None

    @property
    def title(self) -> str:
        """As errors call it."""
        return f"attention {self.name!r}" if self.field == "attn" else f"backend.{self.field}={self.name!r}"

    def on_device(self, device: torch.device) -> On | None:
        """How it runs there; None: not at all."""
        return self.on.get(device.type, self.on.get(ANY))


def _having(how: str, *features: str, **more: str) -> dict[str, str]:
    return dict.fromkeys(features, how) | more


_ASKED = "if torch is asked to be"
_RANKS = _having("yes", "tp", cp="all to all")
_FLASH = {
    **_having("yes", "window", "cache", "left_padding", "later"),
    **{"packing": "bounds", "deterministic": _ASKED, **_RANKS},
}

TABLE = (
    Capability(
        field="attn",
        name="sdpa",
        what="torch's scaled_dot_product_attention; without a mask cuDNN's kernel is tried first",
        implementation="sdpa",
        on={ANY: On()},
        has={
            **_having("yes", "window", "dropout", "cache", "left_padding", "mask", "later", "tp"),
            **{"packing": "a mask", "deterministic": _ASKED, "cp": "all to all; ring without a mask"},
        },
    ),
    Capability(
        field="attn",
        name="flex",
        what="torch's flex attention, compiled, with block masks",
        implementation="flex_attention",
        on={
            "cuda": On(dtypes=SINGLE, head_dims=range(16, 10**6), compute=(8, 0)),
            "cpu": On(dtypes=DOUBLE, backward=False),
        },
        has={
            **_having("yes", "window", "softcap", "cache", "left_padding", "mask", "later"),
            **{"packing": "block mask", "deterministic": "always", **_RANKS},
        },
    ),
    Capability(
        field="attn",
        name="varlen",
        what="torch's variable-length FlashAttention, which takes the documents' bounds for a mask",
        implementation="varlen",
        on={"cuda": On(dtypes=HALF, head_dims=range(8, 257, 8), compute=(8, 0))},
        has={"packing": "bounds", "window": "yes", "deterministic": _ASKED, **_RANKS},
    ),
    Capability(
        field="attn",
        name="flash2",
        what="FlashAttention 2",
        implementation="flash_attention_2",
        package=FLASH2,
        on={"cuda": On(dtypes=HALF, head_dims=range(1, 257), compute=(8, 0))},
        has={**_FLASH, **_having("yes", "softcap", "dropout")},
    ),
    Capability(
        field="attn",
        name="flash3",
        what="FlashAttention 3, for Hopper",
        implementation="flash_attention_3",
        package=FLASH3,
        on={"cuda": On(dtypes=HALF, head_dims=range(8, 257, 8), compute=(9, 0))},
        has={**_FLASH, "softcap": "if it was built in"},
    ),
    Capability(
        field="attn",
        name="flash4",
        what="FlashAttention 4, for Hopper and Blackwell",
        implementation="flash_attention_4",
        package=FLASH4,
        # 80 computed a wrong gradient, in silence (4.0.0b36)
        on={"cuda": On(dtypes=HALF, head_dims=(64, 96, 128, 256), compute=(9, 0))},
        has={**_FLASH, "softcap": "yes"},
    ),
    Capability(
        field="attn",
        name="te",
        what="Transformer Engine's DotProductAttention: cuDNN's kernels, or FlashAttention's where it is installed",
        implementation="te",
        package=TE,
        # head_dim 256 computed wrong gradients beside a second cuDNN, which `te.engine.package` refuses
        on={"cuda": On(dtypes=HALF, head_dims=range(8, 257, 8), compute=(8, 0))},
        has=_having("yes", "window", "dropout") | {"packing": "bounds", "deterministic": _ASKED, **_RANKS},
    ),
    Capability(
        field="attn",
        name="eager",
        what="plain operations, softmax in float32, all scores in memory: the reference",
        implementation="eager",
        on={ANY: On()},
        has=_having("yes", *(name for name in FEATURES if name != "kind"))
        | {"packing": "a mask", "deterministic": "always", "cp": "all to all"},
    ),
    Capability(
        field="linear",
        name="torch",
        what="torch.nn.Linear, and this library's kernels for its forward and adapters on a GPU",
        on={ANY: On()},
        has=_having("yes", "tp", "cp", "deterministic"),
    ),
    Capability(
        field="linear",
        name="te",
        what="Transformer Engine's Linear in every layer, in float8 with te_fp8; float32 rounds as TF32; no adapters",
        package=TE,
        on={"cuda": On(dtypes=SINGLE, compute=(8, 0))},
        has=_having("yes", "tp", "cp", "deterministic"),
    ),
    Capability(
        field="rms_norm",
        name="torch",
        what="statistics in float32, one cast at the end; this library's kernels on a GPU",
        on={ANY: On()},
        has=_having("yes", "tp", "cp", "deterministic", "kind"),
    ),
    Capability(
        field="rms_norm",
        name="torch_fp32",
        what="the same with the weight multiplied in float32",
        on={ANY: On()},
        has=_having("yes", "tp", "cp", "deterministic", "kind"),
    ),
    Capability(
        field="rms_norm",
        name="te",
        what="Transformer Engine's RMSNorm and LayerNorm in float32, also of weights that one is added to",
        package=TE,
        on={"cuda": On(dtypes=SINGLE, compute=(8, 0))},
        has=_having("yes", "tp", "cp", "deterministic"),
    ),
    Capability(
        field="rope_fusion",
        name=False,
        what="torch; on a GPU this library's kernel, together with the split of the projection",
        on={ANY: On()},
        has=_having("yes", "packing", "tp", "cp", "deterministic"),
    ),
    Capability(
        field="rope_fusion",
        name=True,
        what="Transformer Engine's, of every type, in float32 and rounded once",
        package=TE,
        on={"cuda": On(dtypes=SINGLE, compute=(8, 0))},
        has=_having("yes", "packing", "tp", "cp", "deterministic"),
    ),
)
"""Those of one field stand in the order in which they are named as alternatives."""


def of_field(field: str) -> dict[Any, Capability]:
    """Value of that field of `BackendConfig` -> its implementation."""
    return {each.name: each for each in TABLE if each.field == field}


ATTENTIONS = of_field("attn")
BY_IMPLEMENTATION: dict[str | None, Capability] = {
    each.implementation: each for each in ATTENTIONS.values() if each.implementation
}
"""transformers' name of an attention -> it."""


@cache
def missing(capability: Capability, need: Need) -> Gap | None:
    """The first thing that is needed and not there; None where nothing is missing."""
    if need.device is not None and (gap := _gap_on(capability, need.device, need)) is not None:
        return gap
    runs = capability.on.values() if need.device is None else filter(None, [capability.on_device(need.device)])
    head_dims = [on.head_dims for on in runs]
    if need.head_dim is not None and head_dims and all(_outside(need.head_dim, taken) for taken in head_dims):
        return Gap(f"head_dim of {need.head_dim}, only {head_dims_in_words(head_dims[0])}")
    for name, feature in FEATURES.items():
        if (value := getattr(need, name)) != getattr(_NOTHING, name) and name not in capability.has:
            return Gap(feature.words.format(value), feature.or_else)
    return None


def _gap_on(capability: Capability, device: torch.device, need: Need) -> Gap | None:
    on = capability.on_device(device)
    if on is None or (need.dtype is not None and need.dtype not in on.dtypes):
        kernel = "kernel" if need.dtype is None else f"kernel for {dtypes_in_words([need.dtype])}"
        runs = " and ".join(f"{dtypes_in_words(each.dtypes)} on {kind}" for kind, each in capability.on.items())
        return Gap(f"{kernel} on {device.type}, only for {runs}")
    if on.compute > (compute := compute_of(device)):
        return Gap("kernel for GPUs of compute capability {}.{}, only from {}.{} on".format(*compute, *on.compute))
    if need.backward and not on.backward:
        return Gap(f"backward pass on {device.type}", "torch.no_grad() where no gradient is wanted")
    return None


def _outside(head_dim: int, taken: Sequence[int] | None) -> bool:
    return taken is not None and head_dim not in taken


def compute_of(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; that of other devices, and of GPUs that are not there, is no reason to refuse."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return (99, 0)
    return torch.cuda.get_device_capability(device)


def dtypes_in_words(dtypes: Iterable[torch.dtype]) -> str:
    """``bfloat16 and float16``."""
    return _in_words(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _in_words(items: Iterable[Any]) -> str:
    *before, last = map(str, items)
    return f"{', '.join(before)} and {last}" if before else last


def head_dims_in_words(taken: Sequence[int] | None) -> str:
    """``multiples of 8 up to 256``, or ``64, 96 and 128``."""
    if taken is None:
        return "any"
    if not isinstance(taken, range):
        return _in_words(taken)
    upper = f" up to {taken[-1]}" if taken[-1] < 1024 else ""
    if taken.step > 1:
        return f"multiples of {taken.step}{upper}"
    return f"any{upper}" if taken.start <= 1 else f"{taken.start} and more"


def absent(capability: Capability) -> str | None:
    """Why it cannot be had at all, whatever is needed: its package is not installed; else None."""
    if capability.package is None or capability.package.installed():
        return None
    return f"needs {capability.package.name}, which is not installed: {capability.package.install}"


def alternatives(capability: Capability, need: Need) -> str:
    """What else has all that is needed, as ``backend.attn='sdpa' or 'flex'``; empty where nothing has."""
    found = [
        repr(each.name)
        for each in of_field(capability.field).values()
        if each.name != capability.name and absent(each) is None and missing(each, need) is None
    ]
    return f"backend.{capability.field}={' or '.join(found)}" if found else ""


def refuse(capability: Capability | None, need: Need) -> None:
    """Do nothing where ``capability`` has all that is needed, or is none of the table.

    Raises:
        ValueError: it has not; the message names what is missing, and what would do instead.
    """
    if capability is None or (gap := missing(capability, need)) is None:
        return
    instead = alternatives(capability, need)
    ways = ", or ".join(filter(None, (f"use {instead}" if instead else "", gap.or_else)))
    raise ValueError(f"{capability.title} has no {gap.what}{': ' if ways else ''}{ways}")


def refuse_absent(field: str, value: Any) -> None:
    """Do nothing where the implementation is installed.

    Raises:
        ImportError: its package is not; the message has the install line.
    """
    capability = of_field(field).get(value)
    if capability is not None and (reason := absent(capability)) is not None:
        here = Need(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        raise ImportError(f"backend.{field}={value!r} {reason}, or use {alternatives(capability, here)}")
