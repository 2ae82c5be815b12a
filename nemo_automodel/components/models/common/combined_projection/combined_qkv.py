"""One projection for query, key and value, its rows grouped by KV head."""

from torch import Tensor, nn
from transformers import PreTrainedConfig

from nemo_automodel.components.kernels.linear import Linear
from nemo_automodel.components.layout import Fusion, qkv_fusion


class CombinedQKVAttentionMixin:
    """Gives an attention module (inherit beside ``nn.Module``) a fused ``qkv_proj``.

    The rows are ``[Q_group_0 | K_0 | V_0 | Q_group_1 | ...]``, a group per KV head, so that plain column-wise tensor
    parallelism gives every rank complete groups.
    """

    qkv_proj: nn.Linear
    qkv_layout: Fusion

    def setup_qkv_projection(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: bool = False,
    ) -> None:
        """Create ``self.qkv_proj``: ``[(num_attention_heads + 2 * num_key_value_heads) * head_dim, hidden_size]``.

        Call it in ``__init__``, after ``super().__init__()``.

        Raises:
            ValueError: when ``num_attention_heads`` is not a multiple of ``num_key_value_heads``.
        """
        self.qkv_layout = qkv_fusion(num_attention_heads, num_key_value_heads, head_dim)
        self.qkv_proj = Linear(hidden_size, num_key_value_heads * self.qkv_layout.group, bias=bias)

    def compute_qkv(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and split ``[..., hidden_size]`` into query, key and value.

        Returns:
            ``[..., heads * head_dim]``, ``[..., kv_heads * head_dim]`` twice, contiguous in the last dimension. The
            head counts are those of this rank's shard: they are read off the projection's output.
        """
        query, key, value = self.qkv_layout.split(self.qkv_proj(hidden_states), dim=-1)
        return query, key, value


def head_dim_of(config: PreTrainedConfig) -> int:
    """Channels of one head: ``config.head_dim`` where it is set, else ``hidden_size // num_attention_heads``."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads_of(config: PreTrainedConfig) -> int:
    """Key/value heads: ``config.num_key_value_heads`` where it is set, else as many as query heads."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
