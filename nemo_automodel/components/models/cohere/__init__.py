from nemo_automodel.components.models.cohere.model import CohereForCausalLM

__all__ = ["CohereForCausalLM"]
