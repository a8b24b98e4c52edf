"""Arguments, data and the callback for transformers' Trainer and TRL."""
