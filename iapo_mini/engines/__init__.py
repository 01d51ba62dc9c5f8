"""Other people's engines: vLLM samples, TRL trains."""
