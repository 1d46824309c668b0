"""Weights on the positive half-line, the unit interval and the simplex."""
