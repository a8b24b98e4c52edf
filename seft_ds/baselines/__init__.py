"""What repair by SEFT is compared with, in the same run: other methods, from their published descriptions."""
