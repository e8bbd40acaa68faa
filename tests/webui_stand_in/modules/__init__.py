"""A stand-in of the WebUI's `modules`: only what the panel, the axes and the API touch, only as much as they do."""
