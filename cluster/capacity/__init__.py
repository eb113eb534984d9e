"""How fast a cluster is that is not there: a trace on any number of workers, in virtual time."""
