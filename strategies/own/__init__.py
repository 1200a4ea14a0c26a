"""Strategies of people's own, in files beside Corolla."""
