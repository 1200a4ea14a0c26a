"""Secure sums: the server learns the sum of a round's updates, and never one member's update."""
