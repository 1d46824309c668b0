"""How a model of many tensors is stepped: its blocks, their settings, tiles, kernels, noise, trials and steps.

Imports `family`, `rule`, `correction`, `closures` and `errors`, and no family.
"""
