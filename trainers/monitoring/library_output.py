"""What libraries print by themselves: their progress bars are turned off, for they would tear the
lines of a run.

Imports nothing: a library that is not loaded yet reads the environment when it is.
"""

from __future__ import annotations

import os
import sys

BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def silence_libraries() -> None:
    """Turn off the progress bars of huggingface_hub, transformers and datasets, in processes begun
    from here too. A user who has set one of their environment variables to 0 keeps them."""
    if any(os.environ.get(name) == "0" for name in BARS):
        return
    for name in BARS:
        os.environ.setdefault(name, "1")
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars as disable_datasets_bars

        disable_datasets_bars()
