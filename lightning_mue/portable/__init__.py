"""A bundle of graphs that answers without torch: onnxruntime, numpy, tokenizers and Pillow are all it needs."""
