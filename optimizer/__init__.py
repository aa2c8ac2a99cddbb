"""Runs things: the command line, the driver, TensorRT, the runtimes, verification, packaging."""
