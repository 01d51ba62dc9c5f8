"""How a policy is asked for its answer after every prefix of every completion."""
