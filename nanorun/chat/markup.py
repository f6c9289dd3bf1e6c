"""The tags of Nemotron's chat format, said once."""

from __future__ import annotations

THINK = "<think>"
END_THINK = "</think>"
CALL = "<tool_call>"
END_CALL = "</tool_call>"
BEGIN_TURN = "<|im_start|>"
END_TURN = "<|im_end|>"
END_TEXT = "</s>"
