"""Tensor in, tensor out: the kernels of the model, each with a plain reference beside it."""

from qnext.ops.contracts import Ops, OpSpec
from qnext.ops.segments import Segments
from qnext.ops.select import invariant, select

__all__ = ["OpSpec", "Ops", "Segments", "invariant", "select"]
