"""The lines that TensorFlow's native code prints on standard error, whatever its log level."""

import re

__all__ = ["without_banner"]


def without_banner(text):
    """Returns standard error without those lines."""
    lines = ("WARNING: All log messages before absl::InitializeLog", "I0000 00:00:.* oneDNN custom operations")
    # Once on a CPU without float16 instructions, when float16 is first multiplied.
    lines += ("E0000 00:00:.* oneDNN supports DT_HALF only",)
    return re.sub(rf"^({'|'.join(lines)}).*\n", "", text, flags=re.MULTILINE)
