"""How the user's loss is called: gradients, curvatures, random numbers, buffers, loss scaling, batched draws.

Imports nothing of the library but `errors`.
"""
