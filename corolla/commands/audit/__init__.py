"""`corolla audit`: attacks on a private run, and the lower bounds they show."""
