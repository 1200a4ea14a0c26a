"""Arithmetic on named tensors and on the factors of LoRA."""
