"""Triton kernels that trainer and engine share, so that both compute the same bits."""
