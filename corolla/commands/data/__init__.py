"""`corolla data`: how the rows of a data set are read, before anything is trained on them."""
