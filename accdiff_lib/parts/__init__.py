"""Building blocks without the state of a run."""
