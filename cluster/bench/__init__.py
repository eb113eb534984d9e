"""`kvrelay bench`: what this machine does with a model, measured beside other programs and beside
what the machine itself allows."""
