"""Which passes CUDA graphs take, and how they are called; what they compute is tested on a GPU (tests/gpu)."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Phi3Config, Starcoder2Config

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.models.common import graphs
from nemo_automodel.components.models.common.graphs import MOST, Graphs, in_the_way
from nemo_automodel.components.models.common.varlen import Documents
from tests.components.models.test_varlen import runs_anywhere
from tests.conftest import tiny, tokens

IDS = tokens(2, 12)
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


class Made:
    """What stands for torch's graphs on a CPU: the callable itself, counted."""

    def __init__(self) -> None:
        self.samples: list[tuple[Tensor, ...]] = []
        self.calls: list[tuple[Tensor, ...]] = []
        self.modes: list[str | int] = []
        self.allocated = [0] * 100
        """Bytes, as they are asked for."""

    def __call__(self, rows: Any, samples: tuple[Tensor, ...], **options: Any) -> Any:
        assert options == {"num_warmup_iters": 2, "allow_unused_input": True, "pool": "a pool"}
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
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: stand_in.allocated.pop(0))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", stand_in.modes.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"total_memory": 10**9}))
    return stand_in


def backbone_of(config_class: Any = LlamaConfig, asked: bool = True, **changes: Any) -> Any:
    torch.manual_seed(0)
    backbone = NeMoAutoModelForCausalLM.from_config(tiny(config_class, **changes)).base_model.train()
    backbone.graphs = Graphs(backbone, asked)
    return backbone


def twice(backbone: Any, *args: Any, **options: Any) -> Tensor:
    """What the second pass gives, of which there is a graph, where there can be."""
    for _ in range(2):
        hidden = None
        hidden = backbone(*args, use_cache=False, **options).last_hidden_state
    return hidden


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
        hidden = twice(backbone, ids)
        assert torch.equal(hidden, without(backbone, ids))
        assert hidden.requires_grad
    assert len(made.samples) == 2
    assert len(made.calls) == 6  # less the first pass of each shape
    assert made.modes == ["error", 0] * 2


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
        twice(backbone, IDS, position_ids=positions, **Documents.of(positions).as_inputs())
        bounds, longest = seen[-1]
        starts = [sum(lengths[:n]) + row * 12 for row in (0, 1) for n in range(len(lengths))]
        assert bounds.tolist() == starts + [24] * (len(bounds) - len(starts))
        assert (len(bounds), longest) == (16 if len(lengths) < 12 else 32, 12)
    assert [len(each) for *_, each in made.samples] == [16, 32]


def test_what_they_do_not_know_is_left_to_the_backbone(made: Made) -> None:
    backbone = backbone_of()
    positions = torch.cat((torch.arange(5), torch.arange(7))).expand(2, -1)
    for _ in range(2):
        backbone(IDS, use_cache=True)
        backbone(IDS, use_cache=False, output_hidden_states=True)
        backbone(IDS, use_cache=False, attention_mask=torch.ones_like(IDS))
        backbone(IDS, use_cache=False, position_ids=positions)
        backbone(IDS, use_cache=False, position_ids=positions, **Documents.of(positions).as_inputs())  # sdpa: a mask
        with torch.no_grad():
            backbone(IDS, use_cache=False)
        backbone.eval()(IDS, use_cache=False)
        backbone.train().config.output_hidden_states = True
        assert backbone(IDS, use_cache=False).hidden_states
        backbone.config.output_hidden_states = False
    assert not made.samples
    twice(backbone, IDS)
    assert len(made.calls) == 1


def test_a_second_pass_before_the_first_ones_backward_is_the_backbones_own(made: Made) -> None:
    """It would overwrite what the first one keeps for its gradients."""
    backbone = backbone_of()
    loss = twice(backbone, IDS).sum()
    backbone(IDS.flip(0), use_cache=False)
    assert len(made.calls) == 1
    loss.backward()
    del loss
    backbone(IDS.flip(0), use_cache=False)
    assert len(made.calls) == 2


def test_only_so_many_shapes_have_graphs(made: Made) -> None:
    backbone = backbone_of()
    for length in range(2, 4 + MOST):
        ours = twice(backbone, IDS[:, :length]).detach()
        assert torch.equal(ours, without(backbone, IDS[:, :length]))
    assert len(made.samples) == len(made.calls) == MOST


def test_for_weights_that_moved_or_froze_they_are_made_anew(made: Made) -> None:
    backbone = backbone_of()
    twice(backbone, IDS)
    backbone.norm.weight.data = backbone.norm.weight.data.clone()
    twice(backbone, IDS)
    assert len(made.samples) == 2
    backbone.norm.weight = torch.nn.Parameter(backbone.norm.weight.detach().clone())
    twice(backbone, IDS)
    assert len(made.samples) == 3
    backbone.norm.weight.requires_grad_(False)
    twice(backbone, IDS)
    assert len(made.samples) == 4


def test_auto_is_for_few_tokens_and_few_gradients(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_layer = sum(p.numel() for p in backbone_of().layers.parameters()) / len(backbone_of().layers)
    monkeypatch.setattr(graphs, "HOST_BOUND", 23 * of_a_layer)
    backbone = backbone_of(asked=False)
    assert backbone.graphs.description == "CUDA graphs for up to 23 tokens at a time"
    twice(backbone, IDS)
    assert not made.samples
    twice(backbone, IDS[:, :11])
    assert len(made.samples) == 1
    bytes_of_gradients = sum(p.numel() * p.element_size() for p in backbone.parameters())
    few = type("", (), {"total_memory": 25 * bytes_of_gradients})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: few)
    backbone = backbone_of(asked=False)
    for length in range(2, 7):
        twice(backbone, IDS[:, :length])
    assert len(made.samples) == 1 + 2  # a tenth of the memory has room for the gradients of two


def test_auto_leaves_alone_what_keeps_much(made: Made) -> None:
    """Its memory would be a graph's for good."""
    share = 10**9 // 10
    for asked, kept, made_of_it in ((False, share + 1, 0), (False, share, 1), (True, share + 1, 1)):
        made.samples.clear()
        made.allocated = [5, 5 + kept]
        backbone = backbone_of(asked=asked)
        twice(backbone, IDS)
        twice(backbone, IDS)  # and does not try once more
        assert len(made.samples) == made_of_it
        assert not made.allocated


def test_no_memory_to_try_is_as_without(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.autograd, "grad", fails)
    with pytest.warns(UserWarning, match="no memory"):
        twice(backbone_of(asked=False), IDS)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        twice(backbone_of(), IDS)


def test_a_model_that_waits_for_the_device_goes_without(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is found before anything is captured."""
    backbone, auto = backbone_of(), backbone_of(asked=False)

    def waits(self: Any, x: Tensor) -> Tensor:
        if made.modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return x

    monkeypatch.setattr(type(backbone.norm), "forward", waits)
    words = r"cannot be a CUDA graph; model.cuda_graphs=false does without \(called a synchronizing"
    with pytest.raises(ValueError, match=words):
        twice(backbone, IDS)
    with pytest.warns(UserWarning, match=words):
        hidden = twice(auto, IDS)
    assert torch.equal(hidden, without(auto, IDS))
    twice(auto, IDS)  # and no more
    assert made.modes == ["error", 0] * 2
    assert not made.samples


def test_a_capture_that_fails_is_an_error(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto as well: torch's stream and allocator stay as they are within one."""

    def fails(error: Exception) -> Any:
        def fail(*args: Any, **options: Any) -> None:
            raise error

        return fail

    for asked in (True, False):
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails(RuntimeError("operation not permitted")))
        with pytest.raises(ValueError, match=r"set model.cuda_graphs=false \(operation not permitted"):
            twice(backbone_of(asked=asked), IDS)
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails(torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            twice(backbone_of(asked=asked), IDS)


@pytest.mark.parametrize(
    ("reason", "config_class", "changes"),
    [
        ("dropout", LlamaConfig, {"attention_dropout": 0.1}),
        ("dropout", Phi3Config, {"resid_pdrop": 0.1, "pad_token_id": 0}),
        ("dropout", Starcoder2Config, {"embedding_dropout": 0.1, "residual_dropout": 0.0}),
        ("attention 'eager'", LlamaConfig, {"attn": "eager"}),
        ("attention 'eager'", Gemma2Config, {}),
        ("weights or adapters in float32", LlamaConfig, {"dtype": torch.float32}),
        ("RoPE of type 'dynamic', which asks how long rows are", LlamaConfig, {"rope_parameters": DYNAMIC}),
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
