"""`kvrelay bench goodput`: the highest rate that meets its SLOs, for several arrangements."""
