"""The public functions, one file per op.

A file registers the op, with what tracing needs to know of its outputs, then defines its autograd function if it has
one, then the public function, which checks the arguments, chooses an implementation and calls it.
"""
