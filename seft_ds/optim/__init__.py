"""Repair of optimizer state after an event, as pure functions on state tensors."""
