"""Transformer Engine's linear layers, norms, attention, RoPE and float8 recipes; it is imported where it computes."""
