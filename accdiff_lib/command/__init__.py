"""The standalone command."""
