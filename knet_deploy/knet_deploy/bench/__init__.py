"""The ruler: engines and their peers, timed side by side, and how far they are from the limit."""
