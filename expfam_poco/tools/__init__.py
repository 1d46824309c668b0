"""Around training: predictions, files, mega-batches, binary networks, BatchNorm, logging, conversion.

Imports `optim` and what stands below it.
"""
