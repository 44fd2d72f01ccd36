"""Advantages, losses and corrections: pure functions on tensors, no config tree, no rank, no logger."""
