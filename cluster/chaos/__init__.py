"""`kvrelay chaos`: a real cluster under load whose processes are killed and stopped, and a check of
every answer. `run.py` is the whole of it in order; nothing else of kvrelay calls what is here."""
