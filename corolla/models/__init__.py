"""Base models, what is trained in them, and what that needs in memory."""
