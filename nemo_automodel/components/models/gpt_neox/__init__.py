from nemo_automodel.components.models.gpt_neox.model import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

__all__ = ["GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"]
