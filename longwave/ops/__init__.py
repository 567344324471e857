"""Numeric operations: one folder each, a plain torch reference beside its kernels."""
