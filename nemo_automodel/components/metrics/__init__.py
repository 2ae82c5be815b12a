"""Metrics of a run: JSONL, TensorBoard, and the loss curve as a picture."""

from nemo_automodel.components.metrics.log import MetricsLog, peak_memory_gb, plot_loss

__all__ = ["MetricsLog", "peak_memory_gb", "plot_loss"]
