"""Errors of huggingface_hub as errors of this library: text that a Hub sends is cut before anything is matched."""

from featurizers.errors import HubError
from featurizers.hub.transport import translated


def message_of(text):
    try:
        with translated("owner/name"):
            raise RuntimeError(text)
    except HubError as error:
        return str(error)


def test_a_megabyte_of_addresses_is_cut_before_it_is_matched():
    """Matching all of it takes time that is quadratic in its length: hours."""
    assert len(message_of("https://a" * 120_000)) < 1000


def test_signatures_in_addresses_are_not_shown():
    assert "https://hub/file" in message_of("GET https://hub/file?X-Signature=secret failed")
    assert "secret" not in message_of("GET https://hub/file?X-Signature=secret failed")
