"""The fused model: a trained K-Net as the operations that a graph should have."""
