"""Where problems come from, and whether two answers are equal."""
