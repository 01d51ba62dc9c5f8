"""What a user looks at a policy, a run or a card with."""
