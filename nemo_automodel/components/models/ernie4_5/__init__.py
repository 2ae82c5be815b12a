from nemo_automodel.components.models.ernie4_5.model import Ernie4_5ForCausalLM

__all__ = ["Ernie4_5ForCausalLM"]
