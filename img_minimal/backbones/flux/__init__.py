"""FLUX.1-dev and its twin: a transformer, XLabs' IP-Adapter with 4 tokens, heard in the 19 double-stream blocks."""
