"""Perplexity over ranks and lm-eval tasks."""
