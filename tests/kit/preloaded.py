"""What the fork server imports once, so that what it forks need not; it makes no other module of these.

Python's collector would look at all of it again and again, in each process that is forked, and write to the pages that
they share: here it does not look while modules are imported, and never looks at them afterwards.
"""

import gc

gc.disable()
import torch._inductor.compile_fx  # noqa: E402, F401 (what any backend of torch.compile imports)

import tests.kit.runs  # noqa: E402, F401
import titan_hd.train  # noqa: E402, F401

gc.freeze()
gc.enable()
