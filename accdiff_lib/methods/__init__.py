"""What a prediction of the canvas is made of: one file a method."""
