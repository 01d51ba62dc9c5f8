"""Tools for looking at a policy, a run or a GPU."""
