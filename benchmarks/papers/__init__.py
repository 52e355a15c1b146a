"""Small-scale reproductions, one module a paper."""
