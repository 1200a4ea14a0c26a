"""Products of a step, in fewer passes over memory than peft and torch take for them."""
