"""What a prediction of a large canvas is made of: one file an idea."""
