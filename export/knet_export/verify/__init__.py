"""The proof: an artefact against its reference, measured, judged, shown and bisected."""
