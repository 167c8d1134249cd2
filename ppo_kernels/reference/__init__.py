"""Every op in eager PyTorch: the specification, and what runs where no kernel does.

Each function is the public one of the same name without its argument checks, differentiable by autograd.
Padded ``[B, T]`` and packed ``[N]`` share one path: tokens are flattened, and ``Rows`` holds the row of each.
A masked token is replaced before any arithmetic, so that what lies under a mask reaches neither a value nor a
gradient.
"""
