"""Commands that make what the tests and the embedded model need."""
