"""OpenAI's API over HTTP, in front of router/frontdoor.py; run by router/main.py."""
