"""The next-token loss."""

from nemo_automodel.components.loss.causal_lm import IGNORE, next_token_loss, next_token_targets, valid_tokens

__all__ = ["IGNORE", "next_token_loss", "next_token_targets", "valid_tokens"]
