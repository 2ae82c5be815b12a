"""What selective checkpointing keeps."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nemo_automodel.components.distributed.parallelize import _keep_costly


def test_products_are_kept_and_buffers_are_not() -> None:
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default)
    assert {_keep_costly(None, each) for each in kept} == {CheckpointPolicy.MUST_SAVE}
    others = (torch.ops.aten.mm.out, torch.ops.aten.addmm.out, torch.ops.aten.silu.default)
    assert {_keep_costly(None, each) for each in others} == {CheckpointPolicy.PREFER_RECOMPUTE}


@pytest.mark.slow
def test_compiled_layers_within_a_checkpoint() -> None:
    """As transformers 5.17 nests them; 5.23 compiles the checkpoint as well."""
    layers = nn.Sequential(nn.Linear(32, 64, bias=False), nn.SiLU(), nn.Linear(64, 32, bias=False))
    compiled = torch.compile(layers)
    contexts = partial(create_selective_checkpoint_contexts, _keep_costly)
    found: list[list[Tensor]] = []
    for within in (False, True):
        x = torch.linspace(-1, 1, 5 * 32).reshape(5, 32).requires_grad_()
        output = checkpoint(compiled, x, use_reentrant=False, context_fn=contexts) if within else layers(x)
        found.append([output, *torch.autograd.grad(output.square().sum(), [x, *layers.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
