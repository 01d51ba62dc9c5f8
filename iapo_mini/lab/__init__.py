"""Experiments, studies and figures that produce the committed results."""
