"""img_minimal: Implicit Multimodal Guidance (arXiv 2509.26231), from scratch and small enough to read."""
