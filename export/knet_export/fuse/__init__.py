"""The deploy form: a trained K-Net as the operations that a graph should have."""
