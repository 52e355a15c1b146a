"""FOGZO at small scale."""
