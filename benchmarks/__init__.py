"""Measurements of this project, each side by side with its peer where there is one."""
