"""Settings of the property tests."""

from hypothesis import settings

# No deadline: a machine that is busy with something else is no failure.
settings.register_profile("unit", deadline=None, max_examples=50)
settings.load_profile("unit")
