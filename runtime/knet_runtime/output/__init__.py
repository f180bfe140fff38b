"""Where results go: overlays, masks and lines, in files or to other processes."""
