"""Thin shells over the network, the clock and the log: they decide nothing."""
