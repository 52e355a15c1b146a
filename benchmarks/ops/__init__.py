"""One module an op, each with ``cases(device, quick)``."""
