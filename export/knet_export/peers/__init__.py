"""What others run K-Net with, and how: the peers that `bench --compare` times."""
