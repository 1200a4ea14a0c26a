"""How updates are folded into one: exact sums, stacks, and rules that withstand hostile clients."""
