"""Gamma draws and functions without cancellation: names of `positive.gamma_functions`, for families of one's own."""

from .positive.gamma_functions import digamma, log_gamma, standard_draw, trigamma_excess

__all__ = ["digamma", "log_gamma", "standard_draw", "trigamma_excess"]
