"""How q moves: the Bayesian learning rule, what is measured for it, and VSGD's model of the gradient.

Imports `family` alone.
"""
