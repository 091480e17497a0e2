"""GPT-J is left out where `transformers` does not compute its attention by the AttentionInterface, as in 5.9."""

import pytest
from transformers.models.gptj import modeling_gptj


def skip_gptj(item: pytest.Item) -> None:
    """Skip a test of GPT-J if its attention cannot be looked into."""
    values = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    is_gptj = any(isinstance(value, str) and value.startswith("gptj") for value in values)
    if is_gptj and not hasattr(modeling_gptj, "eager_attention_forward"):
        pytest.skip("GPT-J of this transformers does not compute attention by the AttentionInterface")
