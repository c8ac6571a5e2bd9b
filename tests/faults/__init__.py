"""Runs of the real program that something goes wrong in: a warm parent, faults, and what must be true afterwards."""
