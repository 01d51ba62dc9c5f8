"""Sizes of buffers and chunks in sampling, log-probabilities and early exits.

This module holds only numbers, so the planner can use them without loading a model.
"""

CACHE_BLOCK = 128
"""Number of extra tokens that sampling allocates each time its buffers grow."""

LOGIT_BYTES = 14
"""Measured peak of bytes per logit, including its gradient: the logit in the model's dtype, in
fp32, divided by the temperature, and its log-softmax."""

LOGITS_MB = 512.0
"""MiB for logits and tensors of their size; if they need more, the head runs in chunks."""

CARD_BLOCK = 2**25
"""Number of activations inside the MLP at a time on a GPU, each of about ten bytes."""
