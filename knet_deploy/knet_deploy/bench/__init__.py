"""The benchmark: engines and baselines timed side by side, and how far they are from the limit."""
