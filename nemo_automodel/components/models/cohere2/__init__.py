from nemo_automodel.components.models.cohere2.model import Cohere2ForCausalLM

__all__ = ["Cohere2ForCausalLM"]
