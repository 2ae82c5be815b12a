from nemo_automodel.components.models.llama.model import LlamaForCausalLM, LlamaForSequenceClassification

__all__ = ["LlamaForCausalLM", "LlamaForSequenceClassification"]
