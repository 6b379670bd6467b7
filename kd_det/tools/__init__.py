"""The commands behind ``python -m kd_det``."""
