"""What runs cost: the printed plan, the table of memory, and benchmarks that print ratios of one run."""
