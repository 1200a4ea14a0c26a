"""A device: its settings, its SuperNode, and the process that trains."""
