"""Runs the roles: Ray actor pools, command line, model preparation."""
