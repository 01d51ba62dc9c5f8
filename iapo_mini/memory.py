"""How much is held at a time: what sampling, log-probabilities and early exits work within.

Numbers alone, so that the planner can predict with them without loading a model.
"""

CACHE_BLOCK = 128
"""Tokens by which the buffers of sampling grow beyond what is needed at once."""

LOGIT_BYTES = 14
"""Peak bytes that reading one logit takes, gradient included, as measured: the logit as the model
makes it, in fp32, tempered, log-softmax."""

LOGITS_MB = 512.0
"""MiB that logits and what is made of them may take; above it the head runs in chunks."""

CARD_BLOCK = 2**25
"""Numbers inside the MLP at a time on a card; they take about ten bytes each."""
