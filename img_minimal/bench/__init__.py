"""Costs: the plan of a training run, the table of memory, and benchmarks that print ratios."""
