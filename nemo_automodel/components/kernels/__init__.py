"""Triton kernels, each beside its readable PyTorch reference. A leaf: imports torch and, where there is one, triton."""
