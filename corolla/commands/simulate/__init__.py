"""`corolla simulate`: a federation on one machine, in this process or on Flower's engine."""
