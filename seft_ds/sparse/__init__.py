"""Maths on one rank's tensors. Imports torch only."""
