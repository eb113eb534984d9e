"""Open-loop load on a running server: every request is sent when it is due, whatever runs."""
