"""SDXL, SDXL-DPO and their twins: a UNet, IP-Adapter Plus with 16 tokens, 70 decoupled cross-attentions."""
