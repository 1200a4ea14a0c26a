"""Bounds on what a message may hold, checked before anything is read or allocated."""

MAX_HEADER = 8 << 20  # bytes of a task's header
MAX_REPLY_HEADER = 1 << 20  # bytes of a reply's header
MAX_CACHED = 4096  # groups that a task names as cached
MAX_SCALARS = 1 << 16  # scalars of one group, and directions that a pool can have
MAX_GROUPS = 64  # scalar groups of a message
MAX_ROWS = 1 << 16  # rows of a seed log
MAX_LOG_SCALARS = 1 << 24  # scalars of a seed log, all rows together
MAX_METRICS = 256  # metrics of a reply
MAX_METRIC = 1e30  # absolute value of a metric
MAX_NAME = 128  # characters of the name of a group, metric or client
MAX_ERROR = 2000  # characters of an error text
MAX_EXAMPLES = 1 << 40  # examples that a reply may claim
MAX_SEATS = 1 << 20  # clients that a reply may stand for
MAX_BUNDLE = 1 << 16  # replies of a bundle
MAX_FILES = 1024  # files of a manifest
MAX_TOLD = 1024  # methods, strategies and timings, of each, that a phone may tell
