"""Start the implementation of a new architecture from its config: ``automodel new``."""
