"""Many videos, cut into chunks, by many engines: the files that a run of each would write."""
