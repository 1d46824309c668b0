"""Gaussians: isotropic, diagonal and full, and those of a structured precision."""
