"""Plans of tensor parallelism: what they cut, and what is refused by name."""

import re

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaForCausalLM

from nemo_automodel.components.distributed import parallelize_tensors
from nemo_automodel.components.models.common.tp_plan import LAYER_TP_PLAN, tp_plan_of
from nemo_automodel.components.models.llama.model import LlamaForCausalLM as Ours
from tests.conftest import tiny
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"head": "colwise_rep"}, "head: matches no module"),
        ({"model.layers.*.self_attn.q_proj": "colwise"}, r"model.layers.\*.self_attn.q_proj: matches no module"),
        ({"lm_head": "diagonal"}, "lm_head: 'diagonal' is no style; there are colwise, rowwise"),
        ({"lm_head": "x", "nothing": "colwise"}, "(?s)lm_head: 'x' is no style.*nothing: matches no module"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_name(plan: dict[str, str], message: str) -> None:
    model = Ours(tiny())
    with pytest.raises(ValueError, match=message):
        parallelize_tensors(model, plan, mesh=None)  # type: ignore[arg-type]
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_the_plan_of_a_class_wins_over_the_names_of_the_pattern() -> None:
    class Other(Ours):
        _tp_plan = {"lm_head": "colwise_rep", "model.layers.*.mlp.down_proj": "rowwise_rep"}  # noqa: RUF012

    inside = {
        f"model.{name}": style for name, style in LAYER_TP_PLAN.items() if not re.search(r"mlp.up_proj|_norm", name)
    }
    inside["model.embed_tokens"] = "embedding_rowwise"
    assert tp_plan_of(Ours(tiny())) == inside | {"lm_head": "colwise_rep"}
    assert tp_plan_of(Other(tiny())) == inside | Other._tp_plan
    assert tp_plan_of(LlamaForCausalLM(tiny())).keys() == {  # of the separate projections, those of the same name
        "model.embed_tokens",
        "model.layers.*.self_attn.o_proj",
        "model.layers.*.mlp.up_proj",
        "model.layers.*.mlp.down_proj",
        "lm_head",
    }


class _Tied(nn.Module):
    def __init__(self, padding: int | None):
        super().__init__()
        self.embedding, self.head = nn.Embedding(61, 8, padding), nn.Linear(8, 61, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids).tanh())


def _tied_on_a_rank(padding: int | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    whole, cut = _Tied(padding), _Tied(padding)
    cut.load_state_dict(whole.state_dict())
    parallelize_tensors(cut, {"head": "colwise_rep"}, init_device_mesh("cpu", (2,)))
    assert cut.head.weight is cut.embedding.weight
    assert cut.head.weight.placements == (Shard(0),)
    ids = torch.tensor([[0, 1, 40, 30, 31, 60, 40]])
    for model in (whole, cut):
        model(ids).square().mean().backward()
    torch.testing.assert_close(cut(ids), whole(ids))
    torch.testing.assert_close(cut.embedding.weight.grad.full_tensor(), whole.embedding.weight.grad)


@pytest.mark.parametrize("padding", [None, 1, 40])
def test_a_tied_embedding_is_cut_with_its_head(padding: int | None) -> None:
    """61 rows do not divide; padding, whose embedding learns nothing, is on the first rank or the second."""
    run_ranks(2, _tied_on_a_rank, padding)
