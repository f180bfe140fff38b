"""The threads of a run: one reader and one writer for each feed."""
