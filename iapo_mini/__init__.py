"""iapo-mini: information-aware policy optimization (IAPO) on one consumer GPU or a laptop."""

import logging

__version__ = "0.1.0"

# bitsandbytes, where peft finds it, complains at import about an optional kernel nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
