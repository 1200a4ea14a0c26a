"""How a model is scored: losses, answers, and the tasks of lm-eval."""
