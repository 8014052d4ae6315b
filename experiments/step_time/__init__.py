"""Where the time of a train step goes."""
