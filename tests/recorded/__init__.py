"""What AUTOMATIC1111's WebUI makes of prompts and LoRAs, recorded with its own code (`record.py`)."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
