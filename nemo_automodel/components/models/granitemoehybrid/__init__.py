from nemo_automodel.components.models.granitemoehybrid.model import GraniteMoeHybridForCausalLM

__all__ = ["GraniteMoeHybridForCausalLM"]
