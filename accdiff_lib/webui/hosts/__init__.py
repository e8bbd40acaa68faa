"""The host in a WebUI: what all share, and one adapter for each."""
