"""Optional engines: vLLM for sampling, TRL for training."""
