"""What the files of a bundle are called."""

POLICY = "policy.json"
PROCESSOR = "processor"
"""Folder of the processor's files: they have names of their own, which must not meet those of the bundle."""
GRAPHS = "graphs.json"
"""Only bundles of graphs have it: which graphs and weights there are, and what else an engine must know."""
GRAPH_FOLDER, GRAPH_WEIGHTS = "graphs", "weights.safetensors"
