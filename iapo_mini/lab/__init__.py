"""What produces the committed results: experiments, studies and their figures."""
