"""One thread a process: the tensors of these tests are small, and threads on a busy machine wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
