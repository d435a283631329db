"""The lines that TensorFlow prints on standard error when it is imported, whatever its log level."""

import re

__all__ = ["without_banner"]


def without_banner(text):
    """Returns standard error without those lines."""
    banner = r"^(WARNING: All log messages before absl::InitializeLog|I0000 00:00:.* oneDNN custom operations).*\n"
    return re.sub(banner, "", text, flags=re.MULTILINE)
