"""Several sequences in one padded run are what each is alone."""

from __future__ import annotations

import pytest
import torch
from featurizers.errors import PositionError, SiteError, UsageError
from featurizers_derived_scalars.api import plan
from featurizers_derived_scalars.capturing import Edit, RawActivations, capture, logit_difference
from featurizers_derived_scalars.circuit import KINDS, Circuit, Need, Place
from featurizers_derived_scalars.nodes import Basis, Node

from tests.support.decoders import DECODERS, decoder, shared_decoder, tokens

METRIC = logit_difference([5, 9], [11])
TEXTS = [tokens()[:4], tokens(), tokens().flip(0)[:1], tokens().flip(0)]
NEEDS = [Need(kind, pass_) for kind in KINDS for pass_ in ("forward", "backward")]


def same(first: RawActivations, second: RawActivations) -> None:
    assert first.keys() == second.keys()
    assert torch.equal(first.tokens, second.tokens)
    assert (first.metric is None) == (second.metric is None)
    assert first.metric is None or first.metric == pytest.approx(second.metric, rel=1e-9)
    for key in first:
        torch.testing.assert_close(
            first[key], second[key], rtol=1e-8, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
        )
        storage = first[key].untyped_storage()
        assert storage.nbytes() <= first[key].nbytes  # nothing of the batch stays


@pytest.mark.parametrize("name", DECODERS)
def test_sequences_in_a_batch_are_those_one_at_a_time(name):
    circuit = Circuit(decoder(name, torch.float64))
    needs = [need for need in NEEDS if circuit.places(need.kind)]
    options = {"metric": METRIC, "freeze_norms": ("final", "attn", "mlp")}
    alone = [capture(circuit, text, needs, **options)[0] for text in TEXTS]
    runs = []
    handle = circuit.model.get_input_embeddings().register_forward_hook(lambda _, args, __: runs.append(args[0].shape))
    try:
        for size, shapes in ((4, [(4, 7)]), (3, [(3, 7), (1, 1)]), (2, [(2, 7), (2, 4)])):
            runs.clear()
            batched = capture(circuit, [text.tolist() for text in TEXTS], needs, batch_size=size, **options)
            assert [tuple(shape) for shape in runs] == shapes
            for one, other in zip(batched, alone, strict=True):
                same(one, other)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt"])
def test_what_is_computed_again_has_each_sequences_own_mask(name):
    circuit = Circuit(decoder(name, torch.float64))
    node = Node(Basis("attn.probs", via="q"), 1, (2, 1, 0), pre_activation=True)
    texts = [text for text in TEXTS if len(text) > 2]
    made = plan(circuit, ["act_times_grad", "write_to"], metric=node)
    alone = [made.run(text)[0] for text in texts]
    for (raw, found), (raw_alone, found_alone) in zip(made.run(texts, batch_size=3), alone, strict=True):
        same(raw, raw_alone)
        assert found.keys() == found_alone.keys()
        for key in found:
            torch.testing.assert_close(found[key], found_alone[key], rtol=1e-8, atol=1e-11)


def test_only_the_row_of_each_sequence_is_read():
    circuit, rows = Circuit(shared_decoder("llama")), []
    handle = circuit.model.lm_head.register_forward_hook(lambda _, __, out: rows.append(tuple(out.shape[:2])))
    needs = [Need("resid.final", "backward")]
    try:
        for metric in (logit_difference(5), logit_difference(5, position=0)):
            batched = capture(circuit, TEXTS, needs, metric=metric, batch_size=4)
            assert rows.pop() == (4, 1)
            for raw, text in zip(batched, TEXTS, strict=True):
                (row,) = raw[Place("resid.final"), "backward"].any(-1).nonzero().flatten().tolist()
                assert row == metric.position % len(text)
    finally:
        handle.remove()
    with pytest.raises(PositionError, match="position 2, but the prompt has 1 tokens"):
        capture(circuit, TEXTS, needs, metric=logit_difference(5, position=2), batch_size=4)


def test_without_a_metric_nothing_of_the_batch_is_copied_back():
    circuit = Circuit(decoder("gpt2", torch.float64))
    needs = [Need(kind) for kind in ("attn.probs", "mlp.neurons", "resid.post", "logits")]
    for raw, text in zip(capture(circuit, TEXTS, needs, batch_size=4), TEXTS, strict=True):
        same(raw, capture(circuit, text, needs)[0])


def test_what_cannot_run_in_a_batch_is_refused():
    circuit = Circuit(shared_decoder("gpt2"))
    for size in (0, True, 1.5, "2"):
        with pytest.raises(UsageError, match="batch_size is the number of sequences"):
            capture(circuit, TEXTS, [Need("logits")], batch_size=size)
    edit = Edit(Place("resid.post", 0), lambda x: x)
    with pytest.raises(UsageError, match="an edit is of one sequence"):
        capture(circuit, TEXTS, [Need("logits")], edits=[edit], batch_size=2)


def test_attention_to_later_tokens_is_refused():
    """As in a model of a prefix, where padding would be read."""
    from transformers.models.gpt2 import modeling_gpt2

    model = decoder("gpt2")
    circuit, eager = Circuit(model), modeling_gpt2.eager_attention_forward

    def without_mask(module, query, key, value, attention_mask, **kwargs):
        return eager(module, query, key, value, None, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gpt2, "eager_attention_forward", without_mask)
        with pytest.raises(SiteError, match="GPT2Attention attends to later tokens, so that padding changes"):
            capture(circuit, TEXTS, [Need("resid.post")], batch_size=2)
        assert len(capture(circuit, [TEXTS[1], TEXTS[3]], [Need("resid.post")], batch_size=2)) == 2  # no padding
