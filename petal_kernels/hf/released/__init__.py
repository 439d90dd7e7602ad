"""The checkpoints that the methods' authors train with their own code, as values of an attachment.

Each method says under which names, and in what layout, the authors keep what its adapter holds.
"""
