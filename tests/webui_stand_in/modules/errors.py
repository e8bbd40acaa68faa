"""modules.errors: what goes wrong is written to the console."""

import traceback


def report(message, *, exc_info=False):
    print(f"*** {message}")
    if exc_info:
        print(traceback.format_exc())
