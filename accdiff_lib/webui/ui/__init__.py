"""What a WebUI's user meets: panel, API, X/Y/Z axes, settings page, progress."""
