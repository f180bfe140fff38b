"""The proof: a bundle against its reference, measured, held to a tolerance, shown and bisected."""
