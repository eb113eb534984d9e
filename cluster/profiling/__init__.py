"""`kvrelay profile`: what steps and hand-offs of a model take on this machine, and their fit."""
