"""Seeded directions of zeroth-order training: sign vectors, pools, moves and the seed log."""
