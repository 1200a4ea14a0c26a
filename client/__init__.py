"""The device side: local training, memory, and the Flower ClientApp."""
