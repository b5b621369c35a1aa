"""Programs that use kldiv_ext: `python -m examples.demo`."""
