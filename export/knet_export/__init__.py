"""From a checkpoint to a bundle, and the proof that nothing was lost on the way."""
