"""Ways to train that are compared, one class each."""
