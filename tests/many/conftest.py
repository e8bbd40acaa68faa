"""The embedded model, loaded once."""

from tests.command.conftest import loaded, models  # noqa: F401
