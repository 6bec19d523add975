"""Log-probabilities of tokens by the model's own head: TRL's calls, and those of loops of one's own."""
