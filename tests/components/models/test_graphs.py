"""Which passes CUDA graphs take, and how they are called; what they compute is tested on a GPU (tests/gpu)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.models.common import graphs
from nemo_automodel.components.models.common.graphs import MOST, Graphs, in_the_way
from nemo_automodel.components.models.common.varlen import Documents
from tests.components.models.test_varlen import runs_anywhere
from tests.conftest import tiny, tokens

IDS = tokens(2, 12)


class Made:
    """What stands for torch's graphs on a CPU: the callable itself, counted."""

    def __init__(self) -> None:
        self.samples: list[tuple[Tensor, ...]] = []
        self.calls: list[tuple[Tensor, ...]] = []

    def __call__(self, rows: Any, samples: tuple[Tensor, ...], **options: Any) -> Any:
        assert options == {"allow_unused_input": True, "pool": "a pool"}
        self.samples.append(samples)
        rows(*samples)  # as it is captured

        def call(*inputs: Tensor) -> Any:
            self.calls.append(inputs)
            backbone, rows.backbone.graphs = rows.backbone.graphs, None
            try:
                return Passed.apply(rows(*inputs))
            finally:
                rows.backbone.graphs = backbone

        return call


class Passed(torch.autograd.Function):
    """As torch's graphs are one node of autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    stand_in = Made()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"total_memory": 10**9}))
    return stand_in


def backbone_of(config_class: Any = LlamaConfig, always: bool = True, **changes: Any) -> Any:
    torch.manual_seed(0)
    backbone = NeMoAutoModelForCausalLM.from_config(tiny(config_class, **changes)).base_model.train()
    backbone.graphs = Graphs(backbone, always)
    return backbone


def without(backbone: Any, *args: Any, **options: Any) -> Tensor:
    graphs, backbone.graphs = backbone.graphs, None
    hidden: Tensor = backbone(*args, use_cache=False, **options).last_hidden_state
    backbone.graphs = graphs
    return hidden


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig])
def test_whole_rows(made: Made, config_class: Any) -> None:
    backbone = backbone_of(config_class, **({"sliding_window": 3} if config_class is MistralConfig else {}))
    for ids in (IDS, IDS.flip(0), IDS[:1], IDS):
        hidden = None
        hidden = backbone(ids, use_cache=False).last_hidden_state
        assert torch.equal(hidden, without(backbone, ids))
        assert hidden.requires_grad
    assert len(made.samples) == 2
    assert len(made.calls) == 4


def test_packed_rows_have_bounds_of_few_lengths(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of()
    runs_anywhere(monkeypatch, "varlen")
    seen: list[Documents] = []
    backbone.config._attn_implementation = "varlen"
    monkeypatch.setattr(
        type(backbone.layers[0].self_attn),
        "_attend",
        lambda self, query, key, value, mask, *_, **__: (seen.append(mask), (query.transpose(1, 2), None))[1],
    )
    for lengths in ([12], [5, 7], [1] * 12):
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
        backbone(IDS, position_ids=positions, use_cache=False, **Documents.of(positions).as_inputs())
        bounds, longest = seen[-1]
        starts = [sum(lengths[:n]) + row * 12 for row in (0, 1) for n in range(len(lengths))]
        assert bounds.tolist() == starts + [24] * (len(bounds) - len(starts))
        assert (len(bounds), longest) == (16 if len(lengths) < 12 else 32, 12)
    assert [len(each) for *_, each in made.samples] == [16, 32]


def test_what_they_do_not_know_is_left_to_the_backbone(made: Made) -> None:
    backbone = backbone_of()
    backbone(IDS, use_cache=True)
    backbone(IDS, use_cache=False, output_hidden_states=True)
    backbone(IDS, use_cache=False, attention_mask=torch.ones_like(IDS))
    backbone(IDS, use_cache=False, position_ids=torch.arange(12)[None])
    with torch.no_grad():
        backbone(IDS, use_cache=False)
    backbone.eval()(IDS, use_cache=False)
    assert not made.samples
    backbone.train()(IDS, use_cache=False)
    assert len(made.calls) == 1


def test_a_second_pass_before_the_first_ones_backward_is_the_backbones_own(made: Made) -> None:
    """It would overwrite what the first one keeps for its gradients."""
    backbone = backbone_of()
    loss = backbone(IDS, use_cache=False).last_hidden_state.sum()
    backbone(IDS.flip(0), use_cache=False)
    assert len(made.calls) == 1
    loss.backward()
    del loss
    backbone(IDS.flip(0), use_cache=False)
    assert len(made.calls) == 2


def test_only_so_many_shapes_have_graphs(made: Made) -> None:
    backbone = backbone_of()
    for length in range(2, 4 + MOST):
        ours = backbone(IDS[:, :length], use_cache=False).last_hidden_state.detach()
        assert torch.equal(ours, without(backbone, IDS[:, :length]))
    assert len(made.samples) == len(made.calls) == MOST


def test_for_weights_that_moved_or_froze_they_are_made_anew(made: Made) -> None:
    backbone = backbone_of()
    backbone(IDS, use_cache=False)
    backbone.norm.weight.data = backbone.norm.weight.data.clone()
    backbone(IDS, use_cache=False)
    backbone(IDS, use_cache=False)
    assert len(made.samples) == 2
    backbone.norm.weight.requires_grad_(False)
    backbone(IDS, use_cache=False)
    assert len(made.samples) == 3


def test_auto_is_for_few_tokens_and_few_gradients(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_layer = sum(p.numel() for p in backbone_of().layers.parameters()) / len(backbone_of().layers)
    monkeypatch.setattr(graphs, "HOST_BOUND", 23 * of_a_layer)
    backbone = backbone_of(always=False)
    assert backbone.graphs.words == "CUDA graphs for up to 23 tokens at a time"
    backbone(IDS, use_cache=False)
    assert not made.samples
    backbone(IDS[:, :11], use_cache=False)
    assert len(made.samples) == 1
    bytes_of_gradients = sum(p.numel() * p.element_size() for p in backbone.parameters())
    few = type("", (), {"total_memory": 25 * bytes_of_gradients})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: few)
    backbone = backbone_of(always=False)
    for length in range(2, 7):
        backbone(IDS[:, :length], use_cache=False)
    assert len(made.samples) == 1 + 2  # a tenth of the memory has room for the gradients of two


def test_what_cannot_be_captured_is_told(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    backbone, auto = backbone_of(), backbone_of(always=False)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    words = r"cannot be a CUDA graph; model.cuda_graphs=false .*not permitted when stream is capturing"
    with pytest.raises(ValueError, match=words):
        backbone(IDS, use_cache=False)
    with pytest.warns(UserWarning, match=words):
        hidden = auto(IDS, use_cache=False).last_hidden_state
    assert torch.equal(hidden, without(auto, IDS))
    auto(IDS, use_cache=False)  # and no more


@pytest.mark.parametrize(
    ("reason", "config_class", "changes"),
    [
        ("dropout", LlamaConfig, {"attention_dropout": 0.1}),
        ("attention 'eager'", LlamaConfig, {"attn": "eager"}),
        ("attention 'eager'", Gemma2Config, {}),
        ("weights or adapters in float32", LlamaConfig, {"dtype": torch.float32}),
        ("nothing that is trained", LlamaConfig, {"trained": False}),
        (None, LlamaConfig, {}),
    ],
)
def test_what_is_in_the_way(reason: str | None, config_class: Any, changes: dict[str, Any]) -> None:
    changes = dict(changes)
    dtype, trained = changes.pop("dtype", torch.bfloat16), changes.pop("trained", True)
    model = NeMoAutoModelForCausalLM.from_config(tiny(config_class, **changes), dtype=dtype).requires_grad_(trained)
    assert in_the_way(model.base_model) == "a device that is no GPU"
    for parameter in model.parameters():
        parameter.__class__ = type("OnAGpu", (torch.nn.Parameter,), {"device": torch.device("cuda")})
    assert in_the_way(model.base_model) == reason
