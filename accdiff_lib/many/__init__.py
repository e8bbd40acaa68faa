"""Many pictures: jobs from a file, made by workers on one machine or on many."""
