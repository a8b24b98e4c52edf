"""The only code that knows DeepSpeed's insides."""
