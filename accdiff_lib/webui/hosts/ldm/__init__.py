"""Networks in ldm's layout, which every WebUI has kept."""
