"""DoRA: the lengths of the rows of weights, trained beside the factors that turn them."""
