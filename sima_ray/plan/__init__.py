"""What a run needs, before anything is rented: memory on each GPU, hours, disk, with the arithmetic shown.

Imports no torch, ray or transformers: a plan is made from a config and a model's config.json alone.
"""
