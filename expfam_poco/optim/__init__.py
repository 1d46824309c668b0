"""torch's side: the optimizers as `torch.optim.Optimizer`, their state in checkpoints, what can be asked of them.

Imports `engine` and what stands below it; it holds no mathematics.
"""
