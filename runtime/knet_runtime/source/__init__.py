"""Where frames come from: image files, videos, cameras and streams."""
