"""Fused experts: layers that keep the weights of all experts in one tensor."""
