"""Weights of few values: ±1 and levels, with their estimators and distributions."""
