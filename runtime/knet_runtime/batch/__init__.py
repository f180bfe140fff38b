"""Many videos, cut into segments, by many engines: the masks that a run of each would give."""
