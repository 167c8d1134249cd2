"""The public functions, one file per op: fake, autograd, then the checks and the choice of an implementation."""
