"""Static quantisation: ranges from pictures, Q/DQ in the graph, and what must stay float."""
