"""Base models, and what is trained in them."""
