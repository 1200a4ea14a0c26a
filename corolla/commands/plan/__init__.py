"""`corolla plan`: what a run will cost in bytes, memory and time."""
