"""`kvrelay bench all`: every benchmark in its short form, and one page of what they found."""
