from nemo_automodel.components.models.apertus.model import ApertusForCausalLM

__all__ = ["ApertusForCausalLM"]
