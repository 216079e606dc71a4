"""Import this before DiffSynth-Studio: stand-ins for what it imports and what has no build for this CPU.

The folder ``absent`` has torchvision and torchaudio as far as importing DiffSynth-Studio needs them.
transformers looks for the same two, and would use them; it asks once, so let it ask before they are there.
"""

import sys
from pathlib import Path

from transformers.utils import is_torchaudio_available, is_torchvision_available

_ABSENT = str(Path(__file__).parent / "absent")

if not is_torchvision_available() and not is_torchaudio_available() and _ABSENT not in sys.path:
    sys.path.append(_ABSENT)
