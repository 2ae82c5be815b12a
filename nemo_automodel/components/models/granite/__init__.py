from nemo_automodel.components.models.granite.model import GraniteForCausalLM

__all__ = ["GraniteForCausalLM"]
