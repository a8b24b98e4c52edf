"""Dense model to sparse model: scores, calibration, and the walk over blocks."""
