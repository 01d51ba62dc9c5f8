"""Sources of problems, and the check whether two answers are equal."""
