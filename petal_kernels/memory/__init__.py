"""What a training step keeps in memory, and why: per module, over time, before a GPU is rented.

`profile(model, batch)` runs one step, on real tensors or on fake ones (shapes without storage: a
7B model on a laptop), and says what every module keeps for backward; `with_optimizer` of the result
adds an optimizer's states and step. `assert_saved_bytes` holds a model to a budget in a test.
"""

from petal_kernels.memory.checks import assert_saved_bytes
from petal_kernels.memory.fake import fake_tensors
from petal_kernels.memory.profile import Profile
from petal_kernels.memory.profiler import profile
from petal_kernels.memory.records import Saved

__all__ = ["Profile", "Saved", "assert_saved_bytes", "fake_tensors", "profile"]
