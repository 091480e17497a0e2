"""What a capture need not hold: logits that nobody reads, holes in the heap, zeros. Beside plain autograd."""

from __future__ import annotations

import gc
import platform
from pathlib import Path

import pytest
import torch
from featurizers.errors import PositionError
from featurizers_derived_scalars.capturing import (
    Metric,
    RawActivations,
    capture,
    log_probability,
    logit_difference,
    logit_minus_mean,
)
from featurizers_derived_scalars.capturing import memory as heap
from featurizers_derived_scalars.circuit import Circuit, Need, Place
from torch import Tensor

from tests.support.decoders import DECODERS, LAYERS, decoder, shared_decoder, tokens

GRADIENTS = [Need("resid.embed", "backward"), Need("mlp.neurons", "backward")]


def plain_gradient(model, metric) -> tuple[float, Tensor]:
    """The metric and its gradient in the first block's input, by one plain pass with all logits."""
    seen = []

    def begin(_, args, kwargs):
        leaf = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        seen.append(leaf)
        return ((leaf, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf})

    block = model.get_submodule(Circuit(model).layout.blocks[0].block)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    handle = block.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        value = metric(model(input_ids=tokens()[None]).logits[0])
        (gradient,) = torch.autograd.grad(value, seen[0])
    finally:
        handle.remove()
        model.set_attn_implementation(before)
    return float(value.detach()), gradient[0]


@pytest.mark.parametrize("name", DECODERS)
def test_the_head_is_applied_to_the_token_that_is_read(name):
    model = decoder(name, torch.float64)
    circuit = Circuit(model)
    for metric, plain in (
        (logit_difference([5, 9], [11], position=-2), lambda logits: logits[-2, [5, 9]].mean() - logits[-2, 11]),
        (log_probability([5, 6], position=3), lambda logits: logits[3].log_softmax(-1)[5:7].logsumexp(-1)),
    ):
        rows, value, gradient = [], *plain_gradient(model, plain)
        head = model.get_submodule(circuit.layout.head)
        handle = head.register_forward_hook(lambda _, args, out: rows.append(tuple(out.shape[:-1])))  # noqa: B023
        try:
            [raw] = capture(circuit, tokens(), GRADIENTS, metric=metric, freeze_norms=())
        finally:
            handle.remove()
        assert rows == [(1, 1)]
        assert raw.metric == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(raw[Place("resid.embed"), "backward"], gradient, rtol=1e-9, atol=1e-12)


def test_all_logits_are_computed_where_they_are_asked_for():
    circuit = Circuit(shared_decoder("gpt2"))
    metric = logit_minus_mean(5, position=2)
    [one] = capture(circuit, tokens(), GRADIENTS, metric=metric)
    with torch.no_grad():
        logits = circuit.model(tokens()[None]).logits[0]
    expected = torch.zeros_like(logits)
    expected[2] = torch.full((logits.shape[1],), -1 / logits.shape[1])
    expected[2, 5] += 1
    for needs in ([Need("logits")], [Need("logits", "backward")]):
        [raw] = capture(circuit, tokens(), [*GRADIENTS, *needs], metric=metric)
        assert raw.metric == pytest.approx(one.metric)
        for place, pass_ in one:
            torch.testing.assert_close(raw[place, pass_], one[place, pass_])
        wanted = logits if needs[0].pass_ == "forward" else expected
        torch.testing.assert_close(raw[Place("logits"), needs[0].pass_], wanted)


class LastLogit(Metric):
    """A metric of somebody else's, that reads one token's logits and says so, or does not."""

    def __init__(self, says: bool) -> None:
        self.says, self.shapes = says, []

    @property
    def needs(self):
        return frozenset({Need("logits")})

    @property
    def logit_position(self) -> int | None:
        return -1 if self.says else super().logit_position

    def __call__(self, raw: RawActivations) -> Tensor:
        logits = raw[Place("logits"), "forward"]
        self.shapes.append(len(logits))
        return logits[-1, 3]


def test_other_metrics_may_say_that_they_read_one_token():
    circuit, values = Circuit(shared_decoder("llama")), []
    for metric, count in ((LastLogit(True), 1), (LastLogit(False), len(tokens()))):
        [raw] = capture(circuit, tokens(), GRADIENTS, metric=metric)
        assert metric.shapes == [count]
        values.append((raw.metric, raw[Place("resid.embed"), "backward"]))
    assert values[0][0] == pytest.approx(values[1][0])
    torch.testing.assert_close(values[0][1], values[1][1])


def test_a_position_that_is_not_there_is_refused_before_the_run():
    circuit, runs = Circuit(shared_decoder("gpt2")), []
    handle = circuit.model.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        for position in (len(tokens()), -len(tokens()) - 1):
            with pytest.raises(PositionError, match=f"at position {position}, but the prompt has {len(tokens())}"):
                capture(circuit, tokens(), GRADIENTS, metric=logit_difference(1, position=position))
    finally:
        handle.remove()
    assert runs == []


# ---- the heap


def resident() -> int:
    """Bytes of this process that are in memory."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_a_trim_returns_the_holes_between_tensors():
    tensors = [torch.ones(2**14) for _ in range(1024)]  # 64 KiB each, on the heap
    del tensors[::2]
    gc.collect()
    before = resident()
    heap.trim_heap()
    assert resident() <= before - 2**24
    assert all(bool((tensor == 1).all()) for tensor in tensors)


def test_without_malloc_trim_nothing_is_done(monkeypatch):
    for wrong in (OSError, TypeError):

        def fail(_, wrong=wrong):
            raise wrong

        monkeypatch.setattr(heap.ctypes, "CDLL", fail)
        heap.trim_heap()
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    heap.trim_heap()


def test_the_heap_is_trimmed_after_so_many_bytes_of_what_stays(monkeypatch):
    circuit, trims = Circuit(shared_decoder("gpt2")), []
    needs = [Need("attn.probs"), Need("attn.probs", "backward")]
    [plain] = capture(circuit, tokens(), needs, metric=logit_difference(5))
    monkeypatch.setattr(heap, "trim_heap", lambda: trims.append(1))
    capture(circuit, tokens(), needs, metric=logit_difference(5))
    assert trims == []  # a small capture
    size = plain[Place("attn.probs", 0), "forward"].nbytes
    for limit, times in ((1, 2 * LAYERS), (2 * size, LAYERS)):
        trims.clear()
        monkeypatch.setattr(heap, "TRIM_AFTER", limit)
        [raw] = capture(circuit, tokens(), needs, metric=logit_difference(5))
        extra = 1 if limit == 1 else 0  # the row of logits, held for the metric
        assert len(trims) == times + extra
        assert all(torch.equal(raw[key], plain[key]) for key in plain)


def test_zeros_where_no_bias_is_written_take_no_memory(tmp_path):
    circuit = Circuit(shared_decoder("mistral"))
    [raw] = capture(circuit, tokens(), [Need("attn.bias"), Need("mlp.bias")], dtype=torch.float64)
    for kind in ("attn.bias", "mlp.bias"):
        kept = raw[Place(kind, 1), "forward"]
        assert kept.shape == (len(tokens()), circuit.d_model)
        assert kept.dtype == torch.float64
        assert not kept.any()
        assert kept.untyped_storage().nbytes() == 8
    raw.save(tmp_path / "raw.safetensors")
    again = RawActivations.load(tmp_path / "raw.safetensors", circuit)
    assert all(torch.equal(raw[key], again[key]) for key in raw)
