"""The WebUI's side: panel, arguments, API, X/Y/Z axes and settings page, all made from the settings table.

Imports of the WebUI (`modules`, `gradio`) stand inside the functions that need them, so that what is pure can be used
and tested without one.
"""
